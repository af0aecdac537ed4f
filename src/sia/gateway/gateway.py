"""The gateway of a run: a thread that owns the keys, the way out, the budget and the record."""

import contextlib
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sia.errors import ProviderError
from sia.gateway.matching import KEY_DIGITS, KEY_PREFIX
from sia.gateway.protocol import Role, Spend
from sia.gateway.provider import Provider
from sia.gateway.recording import Recording, open_recording
from sia.gateway.store import STORE_FILE, Store, spend_in
from sia.sandbox import Endpoint

if TYPE_CHECKING:
    from sia.gateway.server import Server

MODES = ("record", "live", "replay", "cache")
SHARED = "~/.cache/sia/calls"
SOCKET_PATH_LIMIT = 90  # of 107 bytes that the kernel allows


@dataclass(frozen=True, kw_only=True)
class Route:
    """Who answers a role: a provider, and a model by its exact id or by an alias."""

    provider: Provider
    model: str


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may spend on model calls, all roles and sessions together; None: no limit."""

    usd: float | None = None
    tokens: int | None = None
    requests: int | None = None

    def refusal(self, spent: Spend, sending: int = 0) -> str:
        """Why no further call may be made; empty if one may.

        Calls under way count as requests; what they will cost is not known before they end.
        """
        tokens = spent.input_tokens + spent.output_tokens
        requests = spent.calls + spent.failed
        if self.usd is not None and spent.cost_usd >= self.usd:
            return f"budget.usd={self.usd:g} is used up (${spent.cost_usd:.4f} spent)"
        if self.tokens is not None and tokens >= self.tokens:
            return f"budget.tokens={self.tokens} is used up ({tokens} spent)"
        if self.requests is not None and requests + sending >= self.requests:
            under_way = f", {sending} under way" if sending else ""
            return f"budget.requests={self.requests} is used up ({requests} made{under_way})"
        return ""


@dataclass(eq=False, kw_only=True)
class OpenLease:
    """A lease that is in force: who the holder of a key is, and how its calls fare."""

    role: Role
    scope: str
    route: Route
    endpoint: Endpoint
    refused: str = field(default="", init=False)
    answered: int = field(default=0, init=False)

    @property
    def model(self) -> str:
        """The exact id of the one model that may be asked."""
        return self.endpoint.model


class ModelGateway:
    """A `sia.gateway.protocol.Gateway` for one run; a context manager.

    What was recorded before answers first; then the provider of the role does, with retries under
    one deadline. See docs/gateway.md for what is promised.
    """

    def __init__(
        self,
        *,
        store: Path,
        routes: Mapping[Role, Route],
        mode: str = "record",
        recording: Path | None = None,
        cache: Path | None = None,
        budget: Budget | None = None,
        call_s: float = 600.0,
        concurrency: int = 64,
        backoff_s: float = 0.5,
        trained: Callable[[Path], contextlib.AbstractContextManager[Route]] | None = None,
    ) -> None:
        """Checks that the routes can be used; opens nothing yet.

        Args:
            store: `gateway.sqlite` of the run; made if it is not there.
            routes: Who answers which role. A role without one gets no lease.
            mode: `record`: what earlier sessions of the run recorded answers first. `live`: keeps
                the numbers, no texts. `replay`: only `recording` answers; no key, no network.
                `cache`: like `record`, and answers are shared between runs in the folder `cache`.
            recording: Directory of the run to replay, or its store.
            cache: Folder of shared answers; None: `SHARED`.
            budget: Checked before each call.
            call_s: Deadline of a call from its sending on, all retries included.
            concurrency: Calls that are under way at once; further ones wait.
            backoff_s: Pause before the first retry; doubles with each one, up to 60 times this.
            trained: The route to the target's model with what an update of its weights has left;
                None where the target's model cannot be trained.

        Raises:
            ProviderError: A key or a price is missing, or there is no recording to replay.
        """
        if mode not in MODES:
            raise ProviderError(f"gateway.mode={mode!r} is none of {', '.join(MODES)}.")
        if mode == "replay" and recording is None:
            raise ProviderError(
                "gateway.mode=replay needs a recorded run: gateway.recording=runs/..."
            )
        self.mode = mode
        self.routes = dict(routes)
        self.budget = budget or Budget()
        self.call_s = call_s
        self.concurrency = concurrency
        self.backoff_s = backoff_s
        self.keys = {} if mode == "replay" else _keys(self.routes)
        if mode != "replay" and self.budget.usd is not None:
            _check_prices(self.routes)
        self.recording = open_recording(recording) if mode == "replay" and recording else None
        self._trained = trained
        self._store_path = store
        self._cache_path = cache or Path(SHARED).expanduser()
        self._stack = contextlib.ExitStack()
        self._server: Server | None = None

    def __enter__(self) -> Self:
        from sia.gateway.server import Server

        with contextlib.ExitStack() as stack:
            now = time.time()
            store = Store(self._store_path, mode=self.mode, now=now)
            stack.callback(store.close)
            recordings = [Recording(store.reader, self._store_path, "store", before=store.session)]
            shared = None
            if self.recording is not None:
                recordings = [self.recording]
                stack.callback(self.recording.close)
            elif self.mode == "cache":
                shared_path = self._cache_path / STORE_FILE
                shared = Store(shared_path, mode=self.mode, now=now)
                stack.callback(shared.close)
                recordings.append(Recording(shared.reader, shared_path, "cache"))
            elif self.mode == "live":
                recordings = []
            folder = _socket_folder()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._server = Server(
                store=store,
                shared=shared,
                recordings=recordings,
                spent=spend_in(store.reader),
                keep_bodies=self.mode != "live",
                offline=self.mode == "replay",
                keys=self.keys,
                budget=self.budget,
                call_s=self.call_s,
                concurrency=self.concurrency,
                backoff_s=self.backoff_s,
                listeners=(_unix_listener(folder / "gateway.sock"), *_loopback_listeners()),
            )
            stack.callback(self._server.stop)  # first of all at the end
            self._server.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is under way and stops; returns within seconds, and may be called again."""
        self._stack.close()

    @contextlib.contextmanager
    def lease(self, role: Role, scope: str, *, policy: Path | None = None) -> Iterator[OpenLease]:
        """Opens the way for one step; see `protocol.Gateway`.

        Raises:
            ProviderError: The role has no provider, or its trained model cannot be served.
            RunDirectoryError: After the block, whatever ended it: an answer could not be recorded.
        """
        route = self.routes.get(role)
        if route is None:
            raise ProviderError(f"No provider answers the role {role.value!r}.")
        if self._server is None:
            raise RuntimeError("the gateway has not been started")
        with contextlib.ExitStack() as stack:
            if policy is not None and self._trained is not None:
                route = stack.enter_context(self._trained(policy))
            lease = OpenLease(
                role=role,
                scope=scope,
                route=route,
                endpoint=Endpoint(
                    socket=self._server.socket,
                    port=self._server.port,
                    key=KEY_PREFIX + secrets.token_hex(KEY_DIGITS // 2),
                    model=route.provider.resolve(route.model),
                ),
            )
            self._server.admit(lease)
            try:
                yield lease
            finally:
                self._server.revoke(lease)
                self._server.check()

    def spend(self) -> dict[Role, Spend]:
        """What each role has spent so far, earlier sessions of the run included."""
        return {} if self._server is None else self._server.spend()


def _keys(routes: Mapping[Role, Route]) -> dict[str, str]:
    """The key of every provider by its name; all that are missing are named at once."""
    keys: dict[str, str] = {}
    missing: dict[str, str] = {}
    for route in routes.values():
        try:
            keys[route.provider.name] = route.provider.key()
        except ProviderError as error:
            missing[route.provider.name] = str(error)
    if missing:
        raise ProviderError("\n".join(missing.values()))
    return keys


def _check_prices(routes: Mapping[Role, Route]) -> None:
    for route in routes.values():
        model = route.provider.resolve(route.model)
        if route.provider.price(model) is None:
            escaped = model.replace(":", r"\:")  # as the command line wants it
            raise ProviderError(
                f"budget.usd needs the price of {model!r}, and provider {route.provider.name!r} "
                "has none. Give it one, in USD per million tokens: "
                f"'++provider.prices={{{escaped}: {{input: 1, output: 2}}}}'"
            )


def _socket_folder() -> Path:
    """A private folder whose path is short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="sia-"))
    if len(bytes(folder)) > SOCKET_PATH_LIMIT:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="sia-", dir="/tmp"))
    return folder


def _unix_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o666)  # targets run as other users
    return listener


def _loopback_listeners() -> list[socket.socket]:
    """One, or none in a network namespace without a loopback interface."""
    listener = socket.socket()
    # Inherited by what it accepts; without it an answer in two parts waits 40 ms for the client's
    # receipt of the first. (asyncio does it for sockets that name their protocol.)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(("127.0.0.1", 0))
    except OSError:
        listener.close()
        return []
    return [listener]
