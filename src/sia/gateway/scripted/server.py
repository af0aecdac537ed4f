"""The endpoint itself: HTTP on loopback or on a Unix socket, in a thread."""

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sia.gateway.scripted import formats
from sia.gateway.scripted.rules import Reply, Rule, choose, parse_rules

PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embeddings",
}
HUGE = 5_000_000  # characters of the answer of the fault `huge`
NEVER_S = 3600.0
START_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request that has come in."""

    kind: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Scripted:
    """A scripted endpoint: an ASGI application, and what it has seen.

    Attributes:
        url: Where it listens, without `/v1`; empty on a Unix socket.
        seen: All requests that were answered or refused, in order.
    """

    rules: Sequence[Rule]
    models: tuple[str, ...] = ("scripted-1",)
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    used: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.used = [0] * len(self.rules)
        routes = [Route(path, self._answer, methods=["POST"]) for path in PATHS]
        routes.append(Route("/v1/messages/count_tokens", self._count, methods=["POST"]))
        routes.append(Route("/v1/models", self._models))
        self.app = Starlette(routes=routes)

    async def _answer(self, request: Request) -> Response:
        kind = PATHS[request.url.path]
        body = json.loads(await request.body())
        self.seen.append(Seen(kind=kind, headers=dict(request.headers), body=body))
        chosen = choose(self.rules, self.used, formats.asked(kind, body))
        if chosen is None:
            message = "no rule of the script fits this request"
            return JSONResponse(formats.error(kind, 400, message), 400)
        rule, reply = chosen
        if rule.wait_s:
            await asyncio.sleep(rule.wait_s)
        identity = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
        if rule.fault:
            return await _fault(kind, body, rule, reply, identity)
        if body.get("stream") and kind != "embeddings":
            return _events(formats.stream(kind, body, reply, identity))
        return JSONResponse(formats.whole(kind, body, reply, identity))

    async def _count(self, request: Request) -> Response:
        body = json.loads(await request.body())
        count = sum(map(len, formats.asked("messages", body).texts)) // 4
        return JSONResponse({"input_tokens": count})

    async def _models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "sia"}
                  for name in self.models]  # fmt: skip
        return JSONResponse({"object": "list", "data": models, "has_more": False})


@contextlib.contextmanager
def serving(
    rules: Sequence[Rule | dict[str, Any]],
    *,
    port: int = 0,
    uds: Path | None = None,
    models: Sequence[str] = ("scripted-1",),
) -> Iterator[Scripted]:
    """A scripted endpoint while the block lasts.

    Args:
        rules: `Rule`s, or plain dictionaries with the same fields.
        port: On the loopback interface; 0 takes a free one.
        uds: Path of a Unix socket to listen on as well.
        models: What it says it offers.
    """
    parsed = [rule if isinstance(rule, Rule) else parse_rules([rule])[0] for rule in rules]
    scripted = Scripted(parsed, tuple(models))
    listeners = [socket.create_server(("127.0.0.1", port))]
    # Inherited by what it accepts. asyncio would do it for sockets that name their protocol.
    listeners[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    scripted.url = f"http://127.0.0.1:{listeners[0].getsockname()[1]}"
    if uds is not None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(uds))
        uds.chmod(0o666)
        listener.listen(512)
        listeners.append(listener)
    config = uvicorn.Config(
        scripted.app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": listeners}, name="scripted endpoint", daemon=True
    )
    thread.start()
    until = time.monotonic() + START_S
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            raise RuntimeError("the scripted endpoint did not start")
        time.sleep(0.005)
    try:
        yield scripted
    finally:
        server.should_exit = True
        thread.join(START_S)
        for listener in listeners:
            listener.close()


async def _fault(
    kind: str, body: dict[str, Any], rule: Rule, reply: Reply, identity: str
) -> Response:
    if rule.fault == "hang":
        await asyncio.sleep(NEVER_S)
    if rule.fault == "status":
        headers = {} if rule.retry_after is None else {"retry-after": f"{rule.retry_after:g}"}
        message = f"the script answers with {rule.status}"
        return JSONResponse(formats.error(kind, rule.status, message), rule.status, headers)
    if rule.fault == "invalid_json":
        return Response(b'{"id": "broken", "choices": [{', media_type="application/json")
    if rule.fault == "empty_choices":
        answer = formats.whole(kind, body, reply, identity)
        answer |= {name: [] for name in ("choices", "content", "output", "data") if name in answer}
        return JSONResponse(answer)
    streamed = bool(body.get("stream")) and kind != "embeddings"
    if rule.fault == "truncated":
        whole = json.dumps(formats.whole(kind, body, reply, identity)).encode()
        pieces = list(formats.stream(kind, body, reply, identity)) if streamed else [whole]
        kept = pieces[: max(1, len(pieces) // 2)] if streamed else [whole[: len(whole) // 2]]
        return _cut(kept, "text/event-stream" if streamed else "application/json")
    text = "x" * HUGE if rule.fault == "huge" else f"half a character: \ud800 {reply.text}"
    changed = Reply(
        text=text,
        calls=reply.calls,
        input_tokens=reply.input_tokens,
        output_tokens=reply.output_tokens,
        cached_tokens=reply.cached_tokens,
    )
    if streamed:
        return _events(formats.stream(kind, body, changed, identity))
    data = json.dumps(formats.whole(kind, body, changed, identity))  # escapes the surrogate
    return Response(data.encode(), media_type="application/json")


def _events(events: Iterator[bytes]) -> Response:
    return StreamingResponse(_async(events), media_type="text/event-stream")


def _cut(pieces: Sequence[bytes], media_type: str) -> Response:
    """An answer whose connection breaks after `pieces`."""

    async def parts() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        raise ConnectionAbortedError("the script ends here")

    return StreamingResponse(parts(), media_type=media_type)


async def _async(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
