"""One call to a provider: sent, sent again where that is safe, and read while it passes."""

import asyncio
import email.utils
import json
import random
import time
import zlib
from dataclasses import dataclass, field
from typing import Any, AnyStr

import httpx2

from sia.gateway.gateway import OpenLease
from sia.gateway.matching import Digest
from sia.gateway.provider import Provider, Usage
from sia.gateway.store import HEADERS, Exchange
from sia.gateway.wire import (
    MESSAGES,
    Format,
    Reader,
    error_body,
    error_event,
    error_text,
    estimate,
    text_length,
)

RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
CONNECT_S = 10.0
DRAIN_S = 5.0  # for the rest of a stream after its last event
LONGEST_BACKOFF = 60  # times the first one
ANSWER_BYTES = 64 * 2**20
ERROR_BYTES = 2**20
QUOTED = 200  # characters of an answer that is not JSON

JSON = {"content-type": "application/json"}
HOP = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "sia"}
REFUSED = {**JSON, "x-should-retry": "false"}  # an SDK need not try what was tried or refused here


class Unanswered(Exception):
    """A call that ended without an answer: `status` and the reason for the caller."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Again(Exception):
    """A vendor refused a call after it had accepted it: an error is the first event of a stream."""


@dataclass(eq=False, kw_only=True)
class Call:
    """A request and what becomes of it; several clients may follow one call.

    Attributes:
        request: With the exact id of the model; empty once the answer has been delivered.
        status: Of the answer; 0 as long as there is none.
        parts: What has come of the answer so far.
        done: Nothing more will come; the exchange has been recorded.
        dropped: It was never sent: nobody waited for it any more.
        charged: An answer began, which a vendor charges for.
        trouble: Why the last try failed.
        trouble_status: The status that it failed with, and the call with it in the end; 504 as long
            as no try has failed.
        left: Clients that went away without the whole answer.
    """

    lease: OpenLease
    wire: Format
    asked: str
    request: dict[str, Any]
    digest: Digest
    occurrence: int
    headers: dict[str, str]
    query: str = ""
    started_at: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)
    status: int = 0
    answer_headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    done: bool = False
    dropped: bool = False
    charged: bool = False
    failure: str = ""
    attempts: int = 0
    trouble: str = ""
    trouble_status: int = 504
    followers: int = 0
    left: int = 0
    joined: int = 0
    task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.reader = Reader(self.wire, hide_usage=self.hides_usage)
        self._news = asyncio.Event()
        self._packed: bytes | None = None

    @property
    def stream(self) -> bool:
        """Whether the client asked for a stream."""
        return self.request.get("stream") is True

    @property
    def hides_usage(self) -> bool:
        """Whether only the gateway wants to know the usage of a stream of chat completions."""
        if self.wire.name != "chat" or not self.stream:
            return False
        options = self.request.get("stream_options")
        return not (isinstance(options, dict) and options.get("include_usage"))

    def sent(self) -> dict[str, Any]:
        """The request as the provider gets it."""
        if not self.hides_usage:
            return self.request
        options = self.request.get("stream_options")
        return {
            **self.request,
            "stream_options": {
                **(options if isinstance(options, dict) else {}),
                "include_usage": True,
            },
        }

    def request_zlib(self) -> bytes:
        """The request as it is recorded."""
        return zlib.compress(json.dumps(self.request).encode(), 1)

    async def news(self) -> None:
        """Waits until something has changed."""
        await self._news.wait()

    def wake(self) -> None:
        """Says that something has changed."""
        self._news.set()
        self._news = asyncio.Event()

    def push(self, part: bytes) -> None:
        """Hands on the next part of the answer."""
        self.parts.append(part)
        self.wake()

    def begin(self, status: int, headers: dict[str, str]) -> None:
        """Fixes status and headers, unless that has happened."""
        if not self.status:
            self.status, self.answer_headers = status, headers

    def refuse(self, status: int, reason: str) -> bytes:
        """An answer of the gateway's own, in the format of the caller; gives its body."""
        self.begin(status, REFUSED)
        return error_body(reason, status=status, anthropic=self.wire.anthropic)

    def finish(self, last: bytes) -> None:
        """Hands on the last part."""
        if last:
            self.parts.append(last)
        self.done = True
        self.wake()

    def pack(self) -> None:
        """Makes a delivered call small; its client may still ask for the answer again."""
        self._packed = zlib.compress(b"".join(self.parts), 1)
        self.parts, self.request = [], {}

    def unpack(self) -> None:
        """Makes a packed answer one part again."""
        if self._packed is not None:
            self.parts, self._packed = [zlib.decompress(self._packed)], None

    def exchange(self, session: int, last: bytes, *, keep_bodies: bool) -> Exchange:
        """What is recorded of the call, whose answer ends with `last`."""
        usage, estimated = self._usage()
        provider = self.lease.route.provider
        return Exchange(
            id=0,
            session=session,
            scope=self.lease.scope,
            role=self.lease.role,
            format=self.wire.name,
            provider=provider.name,
            requested_model=self.asked,
            model=self.lease.model,
            served_model=self.reader.model,
            key=self.digest.key,
            exact=self.digest.exact,
            occurrence=self.occurrence,
            stream=self.stream,
            status=self.status,
            headers={k: v for k, v in self.answer_headers.items() if k in HEADERS},
            finish=self.reader.finish,
            failure=self.failure,
            source="",
            input_tokens=usage.input_tokens,
            cached_tokens=usage.cached_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            output_tokens=usage.output_tokens,
            estimated=estimated,
            counted=self.wire.counted,
            cost_usd=provider.cost(self.lease.model, usage) if self.charged else 0.0,
            attempts=self.attempts,
            started_at=self.started_at,
            wall_s=round(time.monotonic() - self.clock, 6),
            request_zlib=self.request_zlib() if keep_bodies else None,
            body_zlib=zlib.compress(b"".join([*self.parts, last]), 1) if keep_bodies else None,
        )

    def _usage(self) -> tuple[Usage, bool]:
        """The tokens, and whether they are a guess."""
        if not self.charged or not self.wire.counted:
            return Usage(), False
        if self.reader.usage is not None:
            return self.reader.usage, False
        return Usage(
            input_tokens=estimate(text_length(self.request)),
            output_tokens=estimate(self.reader.characters),
        ), True


class Caller:
    """Sends calls to providers. For one event loop."""

    def __init__(
        self, *, keys: dict[str, str], call_s: float, concurrency: int, backoff_s: float
    ) -> None:
        self._keys = keys
        self._call_s = call_s
        self._concurrency = concurrency
        self._backoff_s = backoff_s
        self._random = random.Random()
        self._clients: dict[str, httpx2.AsyncClient] = {}
        self._places: dict[tuple[str, str, str], tuple[httpx2.AsyncClient, httpx2.URL]] = {}

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            await client.aclose()

    async def send(self, call: Call, content: bytes) -> bytes:
        """Sends a call and reads its answer to the end; never raises for a failure of the call.

        Afterwards `status` and `failure` of the call are final. The last part of the answer is
        returned, not handed on: it is to follow when the exchange has been recorded.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._call_s
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    response = await self._open(call, content, deadline)
                    try:
                        return await self._take(call, response)
                    except Again as error:
                        call.charged = False
                        call.reader = Reader(call.wire, hide_usage=call.hides_usage)
                        await self._pause(call, 529, str(error), None, deadline)
                    finally:
                        await response.aclose()
        except Unanswered as error:
            call.failure = str(error)
            return call.refuse(error.status, call.failure)
        except TimeoutError:
            call.failure = self._gave_up(call)
            return self._broken(call, call.trouble_status)
        except asyncio.CancelledError:
            call.failure = "the step ended before the answer did"
            return self._broken(call, 502)

    def _broken(self, call: Call, status: int) -> bytes:
        """The end of an answer that failed, for a client that may have a part of it already."""
        if call.parts:
            return b"" if call.reader.told else error_event(call.failure, call.wire)
        call.status = 0
        return call.refuse(status, call.failure)

    def _gave_up(self, call: Call) -> str:
        """Why the deadline ended a call."""
        limit = f"gateway.call_s={self._call_s:g}"
        if not call.trouble:
            return f"no whole answer within {limit} s"
        tries = "1 try" if call.attempts == 1 else f"{call.attempts} tries"
        name = call.lease.route.provider.name
        return f"provider {name!r} did not answer in {tries} within {limit} s: {call.trouble}"

    async def _open(self, call: Call, content: bytes, deadline: float) -> httpx2.Response:
        """Sends until somebody answers with something other than "try again".

        Raises:
            Unanswered: The next try would come after the deadline, or cannot help.
        """
        provider = call.lease.route.provider
        client, url = self._place(provider, call)
        headers = {**HOP, **call.headers, **JSON, **self._auth(provider, call)}
        while True:
            call.attempts += 1
            asked_for = None
            try:
                request = httpx2.Request("POST", url, headers=headers, content=content)
                response = await client.send(request, stream=True)
            except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol) as error:
                raise Unanswered(502, f"provider {provider.name!r}: {error}") from error
            except httpx2.TransportError as error:
                status = 502
                trouble = f"{type(error).__name__} {error}".strip()
            else:
                status = response.status_code
                if status not in RETRIED or response.headers.get("x-should-retry") == "false":
                    return response
                asked_for = retry_after(response.headers)
                trouble = f"{status} {await _error_of(response)}".strip()
            await self._pause(call, status, trouble, asked_for, deadline)

    async def _pause(
        self, call: Call, status: int, trouble: str, asked_for: float | None, deadline: float
    ) -> None:
        """Waits before the next try.

        Raises:
            Unanswered: It would come after the deadline.
        """
        call.trouble = self._scrub(call.lease.route.provider, trouble)
        call.trouble_status = status
        wait = self._backoff_s * min(2 ** (call.attempts - 1), LONGEST_BACKOFF)
        wait = max(wait * self._random.uniform(0.5, 1.0), asked_for or 0.0)
        if asyncio.get_running_loop().time() + wait >= deadline:
            raise Unanswered(status, self._gave_up(call))
        await asyncio.sleep(wait)

    async def _take(self, call: Call, response: httpx2.Response) -> bytes:
        """Reads an answer; gives what is to be handed on last."""
        headers = {k: v for k, v in response.headers.items() if k in HEADERS}
        status = response.status_code
        provider = call.lease.route.provider
        if status == 200:
            call.charged = call.wire.counted
            if headers.get("content-type", "").startswith("text/event-stream"):
                return await self._take_stream(call, response, headers)
        try:
            body = await _read(response, ANSWER_BYTES if status == 200 else ERROR_BYTES)
        except httpx2.TransportError as error:
            raise Unanswered(502, f"the answer was cut off: {error}") from error
        body = self._scrub(provider, body)
        if status == 200:
            call.reader.whole(body)
            if not call.reader.failure:
                call.begin(200, headers)
                return body
            quoted = body[:QUOTED].decode(errors="replace")
            raise Unanswered(502, f"provider {provider.name!r}: {call.reader.failure}: {quoted!r}")
        text = error_text(_json(body) or body[:QUOTED].decode(errors="replace"))
        if status < 400:
            raise Unanswered(502, f"provider {provider.name!r} answered {status}: {text}")
        call.failure = f"provider {provider.name!r} answered {status}: {text}"
        call.begin(status, {**headers, "x-should-retry": "false"})
        return body

    async def _take_stream(
        self, call: Call, response: httpx2.Response, headers: dict[str, str]
    ) -> bytes:
        reader, provider = call.reader, call.lease.route.provider
        held: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(None) as drain:
                async for chunk in response.aiter_bytes():
                    size += len(chunk)
                    part = self._scrub(provider, reader.feed(chunk))
                    if size > ANSWER_BYTES:
                        reader.failure = f"the answer is longer than {ANSWER_BYTES} bytes"
                    if reader.failure or held or reader.ended:
                        held.append(part)
                    elif part:
                        call.begin(200, headers)
                        call.push(part)
                    if reader.failure:
                        break
                    if reader.ended and drain.when() is None:
                        drain.reschedule(asyncio.get_running_loop().time() + DRAIN_S)
        except (httpx2.TransportError, TimeoutError):
            pass  # what has come decides whether that was the end
        held.append(self._scrub(provider, reader.finish_stream()))
        if reader.failure:
            if reader.told and not call.parts:
                raise Again(reader.failure)
            call.failure = f"provider {provider.name!r}: {reader.failure}"
            if not call.parts:
                return call.refuse(502, call.failure)
            if not reader.told:
                return error_event(call.failure, call.wire)
        call.begin(200, headers)
        return b"".join(held)

    def _place(self, provider: Provider, call: Call) -> tuple[httpx2.AsyncClient, httpx2.URL]:
        """The connections to a provider, and the address for a call there."""
        url = provider.url_of(call.wire.spoken)
        place = url, call.wire.name, call.query
        if place in self._places:
            return self._places[place]
        anthropic = call.wire.anthropic
        socket, base = split_socket(url.rstrip("/"), "" if anthropic else "/v1")
        path = ("/v1" if anthropic else "") + call.wire.path + call.query
        name = socket or base
        if name not in self._clients:
            limits = httpx2.Limits(
                max_connections=self._concurrency, max_keepalive_connections=self._concurrency
            )
            timeout = httpx2.Timeout(None, connect=min(CONNECT_S, self._call_s))
            self._clients[name] = (
                httpx2.AsyncClient(
                    transport=httpx2.AsyncHTTPTransport(uds=socket, limits=limits, verify=False),
                    timeout=timeout,
                )
                if socket
                # Without TLS there is nothing to verify, and certificates take long to load.
                else httpx2.AsyncClient(
                    limits=limits, timeout=timeout, verify=not base.startswith("http:")
                )
            )
        self._places[place] = self._clients[name], httpx2.URL(base + path)
        return self._places[place]

    def _auth(self, provider: Provider, call: Call) -> dict[str, str]:
        key = self._keys[provider.name]
        if call.wire.spoken == MESSAGES.spoken:
            version = {"anthropic-version": call.headers.get("anthropic-version", "2023-06-01")}
            return {**version, "x-api-key": key} if key else version
        return {"authorization": f"Bearer {key}"} if key else {}

    def _scrub(self, provider: Provider, text: AnyStr) -> AnyStr:
        """Text of a provider without its key: some repeat it when they refuse it."""
        key = self._keys[provider.name]
        if not key:
            return text
        if isinstance(text, str):
            return text.replace(key, "[key]")
        return text.replace(key.encode(), b"[key]")


def split_socket(url: str, path: str) -> tuple[str, str]:
    """The Unix socket of a `unix://` address and its URL there, by default with `path`.

    No socket for any other address.
    """
    if not url.startswith("unix://"):
        return "", url
    head, found, rest = url.removeprefix("unix://").partition(".sock")
    return head + found, f"http://localhost{rest or path}"


def retry_after(headers: httpx2.Headers) -> float | None:
    """How many seconds a provider asks to wait; None if it does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        when = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(0.0, when.timestamp() - time.time())


async def _read(response: httpx2.Response, limit: int) -> bytes:
    parts, size = [], 0
    async for chunk in response.aiter_bytes():
        size += len(chunk)
        if size > limit:
            raise Unanswered(502, f"the answer is longer than {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


async def _error_of(response: httpx2.Response) -> str:
    """What an answer that is an error says; closes it."""
    try:
        body = await _read(response, ERROR_BYTES)
    except (httpx2.TransportError, Unanswered):
        return ""
    finally:
        await response.aclose()
    return error_text(_json(body) or body[:QUOTED].decode(errors="replace"))


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
