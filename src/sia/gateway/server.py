"""The endpoint itself: Starlette on uvicorn, in a thread with an event loop of its own.

A request is answered by the first of: the call that it repeats (a client's own retry), what was
recorded before, the provider. A call that was sent goes on without its client, because it is paid
for; it ends with its lease.
"""

import asyncio
import contextlib
import json
import socket as sockets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sia.errors import RunDirectoryError
from sia.gateway.calls import REFUSED, Call, Caller
from sia.gateway.gateway import Budget, OpenLease
from sia.gateway.matching import digest
from sia.gateway.protocol import Role, Spend
from sia.gateway.recording import Recording, explain_miss
from sia.gateway.store import Exchange, Store
from sia.gateway.wire import WIRES, Format, error_body, error_event

REQUEST_BYTES = 64 * 2**20
FORWARDED = ("anthropic-beta", "anthropic-version", "openai-beta")
KEEP_ALIVE_S = 3_600  # clients close; a connection closed by us may meet a request under way
START_S = 30.0
STOP_S = 5.0


class Refusal(Exception):
    """A request that is answered with an error of the gateway's own, and not recorded."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Following(Response):
    """The answer of a call to one client, as far as it has come and as it comes."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer; notices when the client goes away."""
        call = self._call
        call.followers += 1
        gone = asyncio.create_task(_client_gone(receive, call))
        try:
            await self._follow(send, gone)
            if gone.done():
                call.left += 1
            elif call.followers == 1:
                call.pack()
        except asyncio.CancelledError:
            call.left += 1
            raise
        finally:
            call.followers -= 1
            gone.cancel()

    async def _follow(self, send: Send, gone: "asyncio.Task[None]") -> None:
        call = self._call
        call.unpack()
        started, sent = False, 0
        while not gone.done():
            if not started and (call.parts or call.done):
                headers = call.answer_headers
                if call.done:
                    length = sum(map(len, call.parts))
                    headers = {**headers, "content-length": str(length)}
                raw = [(k.encode(), v.encode("latin-1", "replace")) for k, v in headers.items()]
                await send({"type": "http.response.start", "status": call.status, "headers": raw})
                started = True
            done = call.done
            if started and (done or sent < len(call.parts)):
                body = b"".join(call.parts[sent:])
                sent = len(call.parts)
                await send({"type": "http.response.body", "body": body, "more_body": not done})
                if done:
                    return
            if call.done == done and sent == len(call.parts):
                await call.news()


class Server:
    """The thread with the endpoint; all methods may be called from any other thread."""

    def __init__(
        self,
        *,
        store: Store,
        shared: Store | None,
        recordings: Sequence[Recording],
        spent: dict[Role, Spend],
        keep_bodies: bool,
        offline: bool,
        keys: dict[str, str],
        budget: Budget,
        call_s: float,
        concurrency: int,
        backoff_s: float,
        listeners: Sequence[sockets.socket],
    ) -> None:
        """Takes over bound sockets: a Unix socket and, where there is a loopback, one of it.

        Args:
            store: Where exchanges are written.
            shared: Where usable ones are written as well.
            recordings: Asked in this order before a call is sent; the last one is `shared`, if
                there is such a store.
            spent: What earlier sessions have spent.
            keep_bodies: Whether texts are recorded.
            offline: Nothing is sent at all.
            keys: Key of each provider by its name.
            budget: Checked right before a call is sent.
            call_s: See `ModelGateway`.
            concurrency: See `ModelGateway`.
            backoff_s: See `ModelGateway`.
            listeners: The sockets.
        """
        self.socket = Path(listeners[0].getsockname())
        self.port: int = listeners[1].getsockname()[1] if len(listeners) > 1 else 0
        self._listeners = listeners
        self._store, self._shared = store, shared
        self._recordings = recordings
        self._spent = {role: Spend() for role in Role} | spent
        self._keep_bodies = keep_bodies
        self._offline = offline
        self._budget = budget
        self._caller = partial(
            Caller, keys=keys, call_s=call_s, concurrency=concurrency, backoff_s=backoff_s
        )
        self._concurrency = concurrency
        self._leases: dict[str, OpenLease] = {}
        self._asked: dict[OpenLease, dict[str, list[Call]]] = {}
        self._occurrences: Counter[tuple[str, str]] = Counter()
        self._sending = 0
        self._failure: Exception | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="sia-gateway", daemon=True)

    def start(self) -> None:
        """Returns when connections are accepted."""
        self._thread.start()
        if not self._ready.wait(START_S) or self._failure:
            raise RuntimeError("the gateway did not start") from self._failure

    def stop(self) -> None:
        """Cancels all calls and ends the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(2 * STOP_S)

    def admit(self, lease: OpenLease) -> None:
        """Lets the holder of a lease's key in."""
        self._asked[lease] = {}
        self._leases[lease.endpoint.key] = lease

    def revoke(self, lease: OpenLease) -> None:
        """Makes a key worthless; returns when its calls have ended and are recorded."""
        self._leases.pop(lease.endpoint.key, None)
        if self._thread.is_alive():
            ended = asyncio.run_coroutine_threadsafe(self._end(lease), self._loop)
            with contextlib.suppress(TimeoutError):
                ended.result(STOP_S)

    def check(self) -> None:
        """Raises the first failure that was not one of a provider."""
        if self._failure is not None:
            raise self._failure

    def spend(self) -> dict[Role, Spend]:
        """What each role has spent."""
        return {role: spent for role, spent in self._spent.items() if spent != Spend()}

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._slots = asyncio.Semaphore(self._concurrency)
        self._out = self._caller()
        config = uvicorn.Config(
            self._app(),
            loop="none",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(STOP_S),
        )
        server = _Endpoint(config, ready=self._ready, stopping=self._stopping)
        stop = asyncio.create_task(self._end_all())
        await server.serve(sockets=list(self._listeners))
        await stop
        await self._out.close()

    async def _end_all(self) -> None:
        await self._stopping.wait()
        self._leases.clear()
        await asyncio.gather(*map(self._end, list(self._asked)))

    async def _end(self, lease: OpenLease) -> None:
        calls = [call for asked in self._asked.pop(lease, {}).values() for call in asked]
        tasks = [call.task for call in calls if call.task and not call.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _app(self) -> Starlette:
        routes = [
            Route(f"/v1{wire.path}", self._endpoint(wire), methods=["POST"]) for wire in WIRES
        ]
        routes.append(Route("/v1/models", self._models, methods=["GET"]))
        return Starlette(routes=routes, exception_handlers={HTTPException: _unknown_path})

    def _endpoint(self, wire: Format) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                return await self._answer(wire, request)
            except Refusal as refusal:
                return _error(refusal, anthropic=wire.anthropic)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it

        return endpoint

    async def _models(self, request: Request) -> Response:
        anthropic = "anthropic-version" in request.headers
        try:
            lease = self._holder(request)
        except Refusal as refusal:
            return _error(refusal, anthropic=anthropic)
        item: dict[str, Any] = {"id": lease.model}
        if anthropic:
            item |= {
                "type": "model", "display_name": lease.model, "created_at": "1970-01-01T00:00:00Z"
            }  # fmt: skip
            ends = {"has_more": False, "first_id": lease.model, "last_id": lease.model}
            data = {"data": [item], **ends}
        else:
            item |= {"object": "model", "created": 0, "owned_by": lease.route.provider.name}
            data = {"object": "list", "data": [item]}
        return Response(json.dumps(data), media_type="application/json")

    def _holder(self, request: Request) -> OpenLease:
        """The lease whose key the request carries."""
        key = request.headers.get("x-api-key") or request.headers.get(
            "authorization", ""
        ).removeprefix("Bearer ")
        lease = self._leases.get(key)
        if lease is None:
            raise Refusal(401, "this key is not known, or its step has ended")
        return lease

    async def _answer(self, wire: Format, request: Request) -> Response:
        lease = self._holder(request)
        body = await _body(request)
        asked, data = self._parse(lease, wire, body)
        try:
            known = digest(wire.name, lease.model, data)
        except RecursionError as error:
            raise Refusal(400, "the request is nested too deeply") from error
        if (call := self._repeated(lease, request, known.exact)) is not None:
            call.joined += 1
            call.left = max(0, call.left - 1)
            return Following(call)
        occurrence = self._occurrences[lease.scope, known.key]
        self._occurrences[lease.scope, known.key] += 1
        call = Call(
            lease=lease,
            wire=wire,
            asked=asked,
            request=data,
            digest=known,
            occurrence=occurrence,
            headers={k: v for k in FORWARDED if (v := request.headers.get(k, "")) and v.isascii()},
            query="?beta=true" if request.query_params.get("beta") == "true" else "",
        )
        for recording in self._recordings:
            found = recording.find(lease.scope, known, lease.route.provider.name)
            if found is not None:
                self._replay(call, found, recording.source)
                break
        else:
            if self._offline:
                await self._miss(call, recording)
            if wire.counted:
                self._check_budget(lease)
            call.task = asyncio.create_task(self._run(call))
        if lease in self._asked:
            self._asked[lease].setdefault(known.exact, []).append(call)
        elif call.task:
            call.task.cancel()  # the step ended a moment ago
        return Following(call)

    def _parse(self, lease: OpenLease, wire: Format, body: bytes) -> tuple[str, dict[str, Any]]:
        """The model that was asked for, and the request with its exact id."""
        provider = lease.route.provider
        if wire.spoken not in provider.formats:
            raise Refusal(
                404,
                f"provider {provider.name!r} does not speak {wire.spoken!r}; "
                f"it speaks {', '.join(provider.formats)}",
            )
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the request is not JSON: {error}") from error
        asked = data.get("model") if isinstance(data, dict) else None
        if not isinstance(asked, str):
            raise Refusal(400, "the request names no model")
        if provider.resolve(asked) != lease.model:
            raise Refusal(404, f"model {asked!r} is not this step's; ask for {lease.model!r}")
        return asked, {**data, "model": lease.model}

    def _repeated(self, lease: OpenLease, request: Request, exact: str) -> Call | None:
        """The call that a client's own retry repeats."""
        if request.headers.get("x-stainless-retry-count", "0") == "0":
            return None
        calls = [call for call in self._asked.get(lease, {}).get(exact, ()) if not call.dropped]
        # First those whose clients have gone; then any whose client is about to.
        return min(calls, key=lambda call: (call.left == 0, call.joined), default=None)

    def _check_budget(self, lease: OpenLease) -> None:
        spent = sum(self._spent.values(), Spend())
        if reason := self._budget.refusal(spent, self._sending):
            lease.refused = lease.refused or reason
            raise Refusal(402, reason)

    async def _run(self, call: Call) -> None:
        """Sends a call when it is its turn, records it, and hands on its last part."""
        try:
            async with self._turn(call):
                last = await self._out.send(call, json.dumps(call.sent()).encode())
                call.finish(self._record(call, last))
        except Refusal as refusal:
            call.dropped = True
            call.finish(call.refuse(refusal.status, str(refusal)))
        except asyncio.CancelledError:
            call.dropped = True
            call.finish(call.refuse(502, "the step has ended"))
        except Exception as error:  # a bug: `check` raises it, and no client waits for ever
            self._failure = self._failure or error
            call.dropped = True
            call.finish(call.refuse(500, f"the gateway failed: {error!r}"))

    @contextlib.asynccontextmanager
    async def _turn(self, call: Call) -> AsyncIterator[None]:
        """Waits for a slot; nobody need wait for a call any more that no client waits for."""
        async with self._slots:
            if call.left and not call.followers:
                raise Refusal(502, "the client went away before the call was sent")
            if call.wire.counted:
                self._check_budget(call.lease)
            self._sending += call.wire.counted
            try:
                yield
            finally:
                self._sending -= call.wire.counted

    def _record(self, call: Call, last: bytes) -> bytes:
        """Writes down what has happened; gives what is to be handed on."""
        exchange = call.exchange(self._store.session, last, keep_bodies=self._keep_bodies)
        try:
            self._keep(exchange)
        except RunDirectoryError as error:
            self._failure = self._failure or error
            if call.parts:  # a stream that has begun
                return error_event(str(error), call.wire)
            call.status = 0
            return call.refuse(500, str(error))
        call.lease.answered += not exchange.failure
        return last

    def _keep(self, exchange: Exchange) -> None:
        self._spent[exchange.role] += exchange.spend()  # it was paid for, recorded or not
        self._store.add(exchange)
        if self._shared is not None and not exchange.failure and not exchange.source:
            shared = self._shared.add(replace(exchange, session=self._shared.session))
            self._recordings[-1].give(exchange.scope, shared)

    def _replay(self, call: Call, found: Exchange, source: str) -> None:
        """Answers a call with what was recorded."""
        copy = replace(
            found,
            session=self._store.session,
            scope=call.lease.scope,
            role=call.lease.role,
            requested_model=call.asked,
            occurrence=call.occurrence,
            exact=call.digest.exact,
            source=source,
            cost_usd=0.0,
            request_zlib=call.request_zlib() if self._keep_bodies else None,
            started_at=call.started_at,
            wall_s=round(time.monotonic() - call.clock, 6),
        )
        call.begin(found.status, {**found.headers, **({} if found.status == 200 else REFUSED)})
        try:
            self._keep(copy)
        except RunDirectoryError as error:
            self._failure = self._failure or error
            raise Refusal(500, str(error)) from error
        call.lease.answered += not found.failure
        call.finish(found.body())

    async def _miss(self, call: Call, recording: Recording) -> None:
        """Says why there is no answer.

        Raises:
            Refusal: Always.
        """
        reason = await asyncio.to_thread(
            explain_miss, recording.path, call.lease.scope, call.wire.name, call.request
        )
        if call.wire.counted:
            self._store.miss(call.lease.scope, reason, call.started_at)
        raise Refusal(404, reason)


class _Endpoint(uvicorn.Server):
    """Says when it is ready and stops when told, without looking ten times a second."""

    def __init__(
        self, config: uvicorn.Config, *, ready: threading.Event, stopping: asyncio.Event
    ) -> None:
        super().__init__(config)
        self._ready_event = ready
        self._stopping_event = stopping

    async def main_loop(self) -> None:
        self._ready_event.set()
        await self._stopping_event.wait()


async def _client_gone(receive: Receive, call: Call) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call.wake()


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > REQUEST_BYTES:
            raise Refusal(413, f"the request is longer than {REQUEST_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _error(refusal: Refusal, *, anthropic: bool) -> Response:
    body = error_body(str(refusal), status=refusal.status, anthropic=anthropic)
    return Response(body, refusal.status, headers=REFUSED)


async def _unknown_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ", ".join(f"POST /v1{wire.path}" for wire in WIRES)
    reason = f"{request.method} {request.url.path} is not here; there are {known}, GET /v1/models"
    return _error(Refusal(error.status_code, reason), anthropic=False)
