"""The gateway over real HTTP, with the vendors' own SDKs, against endpoints that misbehave."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sia.errors import ProviderError, RunDirectoryError
from sia.gateway import Budget, ModelGateway, Price, Provider, Role, Route, Spend
from sia.gateway.scripted import Scripted, serving
from sia.gateway.store import Exchange, read_exchanges, read_misses, read_spend
from sia.sandbox import Endpoint, forward

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

CANARY = "sk-canary-0123456789abcdef"
FORMATS = ("chat", "responses", "messages", "embeddings")
SAYS = {"when": {"text": "hello"}, "say": "Good morning to you, whoever you are.",
        "usage": {"input": 10, "output": 5}}  # fmt: skip
SCOPE = "g000-c0/target"
PRICES = {"scripted-1": Price(input=1, output=2)}


def provider(url: str, **changes: Any) -> Provider:
    given: dict[str, Any] = {
        "name": "scripted", "base_url": f"{url}/v1", "anthropic_url": url, "formats": FORMATS,
        "api_key_env": "SIA_TEST_KEY", "models": {"small": "scripted-1"}, "prices": PRICES,
    }  # fmt: skip
    return Provider(**given | changes)


@dataclass
class Caller:
    """A program that asks the gateway, with the SDKs that it would use."""

    endpoint: Endpoint

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.endpoint.port}"

    def ask(self, kind: str, text: str, *, stream: bool = False, **options: Any) -> str:
        """What an SDK makes of the answer, as text."""
        options = {"model": self.endpoint.model, **options}
        messages = [{"role": "user", "content": text}]
        with contextlib.ExitStack() as stack:
            if kind == "messages":
                client = stack.enter_context(self.anthropic())
                options = {"max_tokens": 99, "messages": messages, **options}
                if stream:
                    with client.messages.stream(**options) as events:
                        return "".join(events.text_stream)
                return "".join(block.text for block in client.messages.create(**options).content)
            client = stack.enter_context(self.openai())
            if kind == "chat":
                answer = client.chat.completions.create(messages=messages, stream=stream, **options)
                if stream:
                    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
                return answer.choices[0].message.content
            if kind == "responses":
                answer = client.responses.create(input=text, stream=stream, **options)
                if stream:
                    return "".join(event.delta for event in answer if event.type.endswith("delta"))
                return answer.output_text
            return str(len(client.embeddings.create(input=[text], **options).data[0].embedding))

    def openai(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.endpoint.key, **options)

    def anthropic(self, **options: Any) -> Any:
        return anthropic.Anthropic(base_url=self.url, api_key=self.endpoint.key, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        """A request as it goes over the wire."""
        headers = {"authorization": f"Bearer {self.endpoint.key}", **headers}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(self.url + path, content=content, headers=headers, timeout=30)

    def chat(self, text: str = "hello", **options: Any) -> dict[str, Any]:
        """The body of a chat completion."""
        return {
            "model": self.endpoint.model, "messages": [{"role": "user", "content": text}], **options
        }  # fmt: skip


@dataclass
class Run:
    """A run directory with a gateway, as often as it is opened."""

    path: Path

    @property
    def store(self) -> Path:
        return self.path / "gateway.sqlite"

    @contextlib.contextmanager
    def gateway(self, url: str, /, provided: Provider | None = None, **options: Any) -> Iterator:
        options = {"backoff_s": 0.01, "call_s": 20.0, **options}
        route = Route(provider=provided or provider(url), model="small")
        with ModelGateway(store=self.store, routes={Role.TARGET: route}, **options) as gateway:
            yield gateway

    @contextlib.contextmanager
    def caller(self, url: str, /, **options: Any) -> Iterator[Caller]:
        with self.gateway(url, **options) as gateway, gateway.lease(Role.TARGET, SCOPE) as lease:
            yield Caller(lease.endpoint)

    def exchanges(self) -> list[Exchange]:
        return list(read_exchanges(self.store))

    def spent(self) -> Spend:
        return read_spend(self.store).get(Role.TARGET, Spend())


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIA_TEST_KEY", CANARY)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def vendor() -> Iterator[Scripted]:
    with serving([SAYS]) as server:
        yield server


@contextlib.contextmanager
def raw_vendor(answer: Callable[[bytes], Iterator[bytes]]) -> Iterator[str]:
    """An endpoint that writes bytes of its own to each connection; for what no server sends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=speak, args=[connection], daemon=True).start()

    def speak(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            while len(body) < length:
                body += connection.recv(65536)
            for part in answer(head + b"\r\n\r\n" + body):
                connection.sendall(part)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def http(body: bytes, *, kind: str = "application/json", status: str = "200 OK") -> bytes:
    """An answer after which the connection is closed."""
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode() + body


def wait_until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_answered_and_recorded(
    run: Run, vendor: Scripted, kind: str, stream: bool
) -> None:
    if kind == "embeddings" and stream:
        pytest.skip("embeddings have no streams")
    with run.caller(vendor.url) as caller:
        said = caller.ask(kind, "hello", stream=stream)
    assert said == ("16" if kind == "embeddings" else SAYS["say"])
    (exchange,) = run.exchanges()
    output = 0 if kind == "embeddings" else 5
    assert (exchange.input_tokens, exchange.output_tokens) == (10, output)
    assert exchange.cost_usd == pytest.approx((10 + 2 * output) / 1e6)
    assert (exchange.format, exchange.stream, exchange.failure) == (kind, stream, "")
    assert (exchange.requested_model, exchange.served_model) == ("scripted-1", "scripted-1")
    assert (exchange.scope, exchange.role, exchange.attempts) == (SCOPE, Role.TARGET, 1)
    assert not exchange.estimated
    assert run.spent() == exchange.spend()
    (seen,) = vendor.seen
    assert seen.body["model"] == "scripted-1"


def test_a_stream_passes_while_it_comes(run: Run) -> None:
    gate = threading.Event()

    def answer(request: bytes) -> Iterator[bytes]:
        chunk = {"model": "m", "choices": [{"delta": {"content": "first"}}]}
        yield http(b"data: " + json.dumps(chunk).encode() + b"\n\n", kind="text/event-stream")
        assert gate.wait(10)
        chunk = {"model": "m", "choices": [{"delta": {}, "finish_reason": "stop"}]}
        yield b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"

    with raw_vendor(answer) as url, run.caller(url) as caller, caller.openai() as client:
        messages = [{"role": "user", "content": "?"}]
        chunks = iter(
            client.chat.completions.create(model="scripted-1", messages=messages, stream=True)
        )
        assert next(chunks).choices[0].delta.content == "first"
        gate.set()
        assert next(chunks).choices[0].finish_reason == "stop"
        assert next(chunks, None) is None
    (exchange,) = run.exchanges()
    assert exchange.estimated  # it sent no usage
    assert (exchange.input_tokens, exchange.output_tokens) == (4, 2)  # "user", "?", the model


def test_a_client_sees_the_usage_of_a_stream_only_if_it_asks(run: Run, vendor: Scripted) -> None:
    with run.caller(vendor.url) as caller:
        plain = caller.post("/v1/chat/completions", caller.chat(stream=True))
        options = {"include_usage": True}
        asked = caller.post(
            "/v1/chat/completions", caller.chat(stream=True, stream_options=options)
        )
    assert b'"usage"' not in plain.content
    assert b'"usage"' in asked.content
    assert plain.content.endswith(b"data: [DONE]\n\n")
    assert [e.output_tokens for e in run.exchanges()] == [5, 5]
    assert all(seen.body["stream_options"]["include_usage"] for seen in vendor.seen)


def test_two_hundred_streams_at_once(run: Run, vendor: Scripted) -> None:
    async def one(client: Any, number: int) -> str:
        messages = [{"role": "user", "content": f"hello {number}"}]
        stream = await client.chat.completions.create(model="small", messages=messages, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them(caller: Caller) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{caller.url}/v1", api_key=caller.endpoint.key, max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    with run.caller(vendor.url) as caller:
        assert asyncio.run(all_of_them(caller)) == [SAYS["say"]] * 200
    assert run.spent().calls == 200
    assert len({e.key for e in run.exchanges()}) == 200


ERRORS = (openai.APIError, anthropic.APIError)
FAULTS = {
    "hang": (504, "no whole answer within gateway.call_s=0.5 s"),
    "status": (500, "did not answer in"),
    "empty_choices": (502, "the answer is empty: no "),
    "truncated": (502, "cut off"),
    "invalid_json": (502, "the answer is not JSON"),
}


@pytest.mark.parametrize(
    ("fault", "kind"),
    # What happens before an answer begins does not depend on its format; errors do on the vendor.
    [(fault, kind) for fault in FAULTS for kind in FORMATS
     if fault not in ("hang", "status") or kind in ("chat", "messages")],
)  # fmt: skip
def test_a_fault_ends_in_time_with_its_reason_and_is_charged_once_at_most(
    run: Run, kind: str, fault: str
) -> None:
    status, reason = FAULTS[fault]
    rule = {**SAYS, "fault": fault}
    with serving([rule]) as vendor, run.caller(vendor.url, call_s=0.5) as caller:
        started = time.monotonic()
        with pytest.raises(ERRORS, match=reason) as error:
            caller.ask(kind, "hello")
        assert time.monotonic() - started < 20
        sent = len(vendor.seen)
    assert error.value.status_code == status
    (exchange,) = run.exchanges()
    assert reason in exchange.failure
    assert exchange.attempts == sent
    assert sent == 1 or fault == "status"
    charged = fault in ("empty_choices", "truncated", "invalid_json")
    assert (exchange.input_tokens > 0) == charged
    assert run.spent().failed == 1
    assert run.spent().calls == 0


def test_a_deadline_between_tries_and_one_within_a_try_end_alike(run: Run) -> None:
    rules = [{"when": {"times": 1}, "fault": "status", "status": 529}, {**SAYS, "fault": "hang"}]
    with (
        serving(rules) as vendor,
        run.caller(vendor.url, call_s=1.0) as caller,
        pytest.raises(openai.APIStatusError, match="did not answer in 2 tries") as error,
    ):
        caller.ask("chat", "hello")
    assert error.value.status_code == 529


@pytest.mark.parametrize("kind", FORMATS[:3])
def test_a_truncated_stream_ends_with_an_error_that_says_so(run: Run, kind: str) -> None:
    rule = {**SAYS, "fault": "truncated"}
    with serving([rule]) as vendor, run.caller(vendor.url) as caller:
        with pytest.raises(ERRORS, match="the stream was cut off before its end"):
            caller.ask(kind, "hello", stream=True)
        assert len(vendor.seen) == 1
    (exchange,) = run.exchanges()
    assert "cut off" in exchange.failure
    assert exchange.input_tokens > 0
    assert run.spent() == Spend(
        failed=1,
        input_tokens=exchange.input_tokens,
        output_tokens=exchange.output_tokens,
        cost_usd=exchange.cost_usd or 0,
    )


@pytest.mark.parametrize(
    ("fault", "stream"), [("huge", False), ("surrogate", False), ("surrogate", True)]
)
@pytest.mark.parametrize("kind", FORMATS[:3])
def test_odd_text_passes_unharmed(run: Run, kind: str, fault: str, stream: bool) -> None:
    with serving([{**SAYS, "fault": fault}]) as vendor:
        with run.caller(vendor.url) as caller:
            path = {"chat": "/v1/chat/completions"}.get(kind, f"/v1/{kind}")
            body = caller.chat(stream=stream)
            if kind == "responses":
                body["input"] = body.pop("messages")
            through = caller.post(path, body)
            hidden = (
                {"stream_options": {"include_usage": True}} if kind == "chat" and stream else {}
            )
            direct = httpx2.post(vendor.url + path, json=body | hidden, timeout=30)
        assert through.status_code == 200
        if not stream:
            assert through.content == direct.content
        assert len(through.content) > (5_000_000 if fault == "huge" else 0)
        assert (b"\\ud800" in through.content) == (fault == "surrogate")
    (exchange,) = run.exchanges()
    assert exchange.body() == through.content
    assert exchange.failure == ""


def test_a_stream_of_five_megabytes_passes_unharmed(run: Run) -> None:
    def answer(request: bytes) -> Iterator[bytes]:
        yield http(b"", kind="text/event-stream")
        yield from whole

    chunk = {"model": "m", "choices": [{"delta": {"content": "x" * 50_000}}]}
    whole = [b"data: " + json.dumps(chunk).encode() + b"\n\n"] * 100 + [b"data: [DONE]\n\n"]
    with raw_vendor(answer) as url, run.caller(url) as caller:
        got = caller.post("/v1/chat/completions", caller.chat(stream=True)).content
    assert got == b"".join(whole)
    (exchange,) = run.exchanges()
    assert exchange.body() == got
    assert exchange.output_tokens == 5_000_000 // 4


def test_a_request_with_half_a_character_passes(run: Run, vendor: Scripted) -> None:
    with run.caller(vendor.url) as caller:
        answer = caller.post("/v1/chat/completions", caller.chat("hello \ud800"))
        assert answer.status_code == 200
    assert vendor.seen[0].body["messages"][0]["content"] == "hello \ud800"
    assert run.exchanges()[0].request()["messages"][0]["content"] == "hello \ud800"


def test_a_failure_that_passes_is_tried_again_and_charged_once(run: Run) -> None:
    rules = [
        {"when": {"times": 1}, "fault": "status", "status": 529},
        {"when": {"times": 1}, "fault": "status", "status": 429, "retry_after": 0.3},
        SAYS,
    ]
    with serving(rules) as vendor, run.caller(vendor.url) as caller:
        started = time.monotonic()
        assert caller.ask("chat", "hello") == SAYS["say"]
        assert time.monotonic() - started > 0.3
    (exchange,) = run.exchanges()
    assert exchange.attempts == 3
    assert run.spent() == Spend(calls=1, input_tokens=10, output_tokens=5, cost_usd=2e-5)


def test_a_stream_that_begins_with_an_error_is_tried_again(run: Run) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    tries = iter(range(9))

    def answer(request: bytes) -> Iterator[bytes]:
        if next(tries) < 2:
            body = b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"
            yield http(body, kind="text/event-stream")
        else:
            direct = httpx2.post(
                f"{vendor.url}/v1/messages", content=request.partition(b"\r\n\r\n")[2]
            )
            yield http(direct.content, kind="text/event-stream")

    with serving([SAYS]) as vendor, raw_vendor(answer) as url:
        with run.caller(url) as caller:
            assert caller.ask("messages", "hello", stream=True) == SAYS["say"]
        assert next(tries) == 3
    (exchange,) = run.exchanges()
    assert (exchange.attempts, exchange.failure) == (3, "")
    assert run.spent() == Spend(calls=1, input_tokens=10, output_tokens=5, cost_usd=2e-5)


def test_a_pause_beyond_the_deadline_is_not_waited_for(run: Run) -> None:
    rule = {"fault": "status", "status": 429, "retry_after": 60}
    with serving([rule]) as vendor, run.caller(vendor.url, call_s=30) as caller:
        started = time.monotonic()
        with pytest.raises(
            openai.RateLimitError, match=r"in 1 try within .*: 429 the script answers"
        ):
            caller.ask("chat", "hello")
        assert time.monotonic() - started < 25  # it would have waited until 30
        assert len(vendor.seen) == 1


def test_a_provider_that_is_down_is_tried_until_the_deadline(run: Run) -> None:
    with (
        run.caller("http://127.0.0.1:9", call_s=0.5) as caller,
        pytest.raises(
            openai.InternalServerError, match=r"did not answer in \d+ tries .*ConnectError"
        ),
    ):
        caller.ask("chat", "hello")
    (exchange,) = run.exchanges()
    assert exchange.attempts > 3
    assert exchange.cost_usd == 0


def test_what_the_vendor_refuses_is_passed_on_as_it_is(run: Run, vendor: Scripted) -> None:
    with run.caller(vendor.url) as caller:
        answer = caller.post("/v1/chat/completions", caller.chat("nothing fits"))
        direct = httpx2.post(f"{vendor.url}/v1/chat/completions", json=caller.chat("nothing fits"))
    assert (answer.status_code, answer.content) == (400, direct.content)
    assert answer.headers["x-should-retry"] == "false"
    (exchange,) = run.exchanges()
    assert exchange.failure == (
        "provider 'scripted' answered 400: no rule of the script fits this request"
    )
    assert run.spent() == Spend(failed=1)


@pytest.mark.parametrize(
    ("budget", "reason", "made"),
    [
        (Budget(usd=3e-5), "budget.usd=3e-05 is used up ($0.0000 spent)", 2),
        (Budget(tokens=30), "budget.tokens=30 is used up (30 spent)", 2),
        (Budget(requests=3), "budget.requests=3 is used up (3 made)", 3),
    ],
)
def test_a_budget_refuses_the_next_call_and_says_why(
    run: Run, vendor, budget: Budget, reason: str, made: int
) -> None:
    for _ in range(2):  # what an earlier session has spent counts
        with (
            run.gateway(vendor.url, budget=budget) as gateway,
            gateway.lease(Role.TARGET, f"{SCOPE}{len(run.exchanges())}") as lease,
        ):
            caller = Caller(lease.endpoint)
            for _ in range(made - run.spent().calls):
                caller.ask("chat", "hello")
            assert lease.refused == ""
            for kind, error in (("chat", openai), ("messages", anthropic)):
                with pytest.raises(error.APIStatusError) as refusal:
                    caller.ask(kind, "hello")
                assert refusal.value.status_code == 402
                assert reason in str(refusal.value)
            assert lease.refused == reason
    assert len(vendor.seen) == made == len(run.exchanges())


def test_a_budget_of_requests_holds_among_calls_at_once(run: Run) -> None:
    rule = {**SAYS, "wait_s": 0.2}
    with serving([rule]) as vendor, run.caller(vendor.url, budget=Budget(requests=5)) as caller:
        statuses: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: statuses.append(
                    caller.post("/v1/chat/completions", caller.chat()).status_code
                )
            )
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(statuses) == [200] * 5 + [402] * 15
    assert len(vendor.seen) == 5


def test_calls_that_wait_their_turn_are_refused_when_the_budget_is_used_up(run: Run) -> None:
    rule = {**SAYS, "wait_s": 0.1}
    options = {"budget": Budget(tokens=15), "concurrency": 1}
    with serving([rule]) as vendor, run.caller(vendor.url, **options) as caller:
        threads = [
            threading.Thread(
                target=caller.post, args=["/v1/chat/completions", caller.chat(f"hello {number}")]
            )
            for number in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(vendor.seen) == 1


def test_a_key_is_worthless_after_its_step(run: Run, vendor: Scripted) -> None:
    with run.gateway(vendor.url) as gateway:
        with gateway.lease(Role.TARGET, SCOPE) as lease:
            caller = Caller(lease.endpoint)
            caller.ask("chat", "hello")
        with gateway.lease(Role.TARGET, SCOPE) as other:
            assert other.endpoint.key != lease.endpoint.key
            for kind, error in (("chat", openai), ("messages", anthropic)):
                with pytest.raises(error.AuthenticationError, match="its step has ended"):
                    caller.ask(kind, "hello")
            with pytest.raises(openai.AuthenticationError), caller.openai() as client:
                client.models.list()


def test_the_end_of_a_step_cancels_its_calls(run: Run) -> None:
    with serving([{"fault": "hang"}]) as vendor, run.gateway(vendor.url) as gateway:
        failures: list[Exception] = []

        def ask() -> None:
            try:
                Caller(lease.endpoint).ask("chat", "hello")
            except openai.APIError as error:
                failures.append(error)

        with gateway.lease(Role.TARGET, SCOPE) as lease:
            thread = threading.Thread(target=ask)
            thread.start()
            wait_until(lambda: vendor.seen)
            started = time.monotonic()
        thread.join(30)
        assert time.monotonic() - started < 20
    assert "the step ended" in str(failures[0])
    (exchange,) = run.exchanges()
    assert exchange.failure == "the step ended before the answer did"
    assert exchange.cost_usd == 0


def test_closing_is_quick_and_may_be_repeated(run: Run) -> None:
    with serving([{"fault": "hang"}]) as vendor:
        with run.gateway(vendor.url) as gateway, gateway.lease(Role.TARGET, SCOPE) as lease:
            caller = Caller(lease.endpoint)
            failures: list[Exception] = []

            def ask() -> None:
                try:
                    caller.ask("chat", "hello")
                except openai.APIError as error:
                    failures.append(error)

            thread = threading.Thread(target=ask)
            thread.start()
            wait_until(lambda: vendor.seen)
            started = time.monotonic()
            gateway.close()
            gateway.close()
            assert time.monotonic() - started < 20
            thread.join(30)
            assert failures
            with pytest.raises(httpx2.ConnectError):
                caller.post("/v1/chat/completions", caller.chat())
        assert not lease.endpoint.socket.parent.exists()


def test_an_exchange_without_its_client_is_finished_and_recorded(run: Run) -> None:
    rule = {**SAYS, "wait_s": 0.5}
    with serving([rule]) as vendor, run.caller(vendor.url) as caller:
        with (
            pytest.raises(openai.APITimeoutError),
            caller.openai(timeout=0.1, max_retries=0) as client,
        ):
            client.chat.completions.create(**caller.chat())
        wait_until(run.exchanges)
    (exchange,) = run.exchanges()
    assert exchange.failure == ""
    assert run.spent().calls == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_own_retry_is_answered_by_the_call_under_way(run: Run, stream: bool) -> None:
    rule = {**SAYS, "wait_s": 1.5}
    with serving([rule]) as vendor, run.caller(vendor.url) as caller:
        with caller.openai(timeout=0.3, max_retries=3) as client:
            answer = client.chat.completions.create(**caller.chat(stream=stream))
            assert not stream or len(list(answer)) == 4
        with caller.openai() as client:  # and by one that has ended
            again = client.chat.completions.create(
                **caller.chat(stream=stream), extra_headers={"x-stainless-retry-count": "1"}
            )
            assert not stream or len(list(again)) == 4
        assert len(vendor.seen) == 1
    assert run.spent().calls == 1
    assert len(run.exchanges()) == 1


def test_a_step_that_is_done_again_is_answered_from_the_record(run: Run) -> None:
    rules = [{"when": {"times": 1}, "say": "one"}, {"when": {"times": 1}, "say": "two"},
             {"say": "three"}]  # fmt: skip
    with serving(rules) as vendor:
        with run.caller(vendor.url) as caller:
            first = [caller.ask("chat", "hello", stream=True) for _ in range(2)]
        paid = run.spent()
        with run.caller(vendor.url) as caller:
            again = [caller.ask("chat", "hello", stream=True) for _ in range(3)]
        assert first == ["one", "two"]
        assert again == ["one", "two", "three"]
        assert len(vendor.seen) == 3
        assert run.spent().replayed == 2
        assert run.spent().calls == paid.calls + 1
        with run.caller(vendor.url) as caller:  # a third time, and all of it is there
            assert [caller.ask("chat", "hello", stream=True) for _ in range(3)] == again
        assert len(vendor.seen) == 3
        with run.gateway(vendor.url) as gateway, gateway.lease(Role.TARGET, "another") as lease:
            assert Caller(lease.endpoint).ask("chat", "hello", stream=True) == "three"
        assert len(vendor.seen) == 4


def test_a_failure_is_not_repeated_from_the_record(run: Run) -> None:
    rules = [{"when": {"times": 1}, "fault": "empty_choices"}, SAYS]
    with serving(rules) as vendor:
        with run.caller(vendor.url) as caller, pytest.raises(openai.APIError):
            caller.ask("chat", "hello")
        with run.caller(vendor.url) as caller:
            assert caller.ask("chat", "hello") == SAYS["say"]


KILLED = """
import os, pathlib, signal, sys, threading
sys.path.insert(0, {tests!r})
from test_gateway import Run, SCOPE, Role, Caller
run = Run(pathlib.Path({path!r}))
with run.caller({url!r}) as caller:
    said = [caller.ask("chat", f"hello {{n}}", stream=bool(n % 2)) for n in range(4)]
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_paid_for_survives_a_kill(run: Run, vendor: Scripted) -> None:
    program = KILLED.format(tests=str(Path(__file__).parent), path=str(run.path), url=vendor.url)
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert run.spent().calls == 4
    with run.caller(vendor.url) as caller:
        assert caller.ask("chat", "hello 0") == SAYS["say"]
        assert caller.ask("chat", "hello 3", stream=True) == SAYS["say"]
        assert len(vendor.seen) == 4
    assert run.spent().replayed == 2


def talk(caller: Caller) -> list[bytes]:
    """A conversation in all formats, as bytes."""
    answers = [
        caller.post("/v1/chat/completions", caller.chat(f"hello {n}", stream=stream)).content
        for n in range(2)
        for stream in (False, True)
    ]
    body = caller.chat("hello", max_tokens=9)
    answers.append(caller.post("/v1/messages", body).content)
    answers.append(caller.post("/v1/messages", {**body, "stream": True}).content)
    answers.append(caller.post("/v1/messages/count_tokens", body).content)
    answers.append(caller.post("/v1/chat/completions", caller.chat("no rule")).content)
    return answers


def test_a_replay_gives_the_same_bytes_without_a_provider_or_a_key(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving([SAYS]) as vendor, run.caller(vendor.url) as caller:
        recorded = talk(caller)
        url = vendor.url
    monkeypatch.delenv("SIA_TEST_KEY")
    copy = Run(tmp_path / "copy")
    with copy.caller(url, mode="replay", recording=run.path) as caller:
        assert talk(caller) == recorded
    assert copy.spent() == Spend(replayed=7)
    again = Run(tmp_path / "again")  # a replay can be replayed
    with again.caller(url, mode="replay", recording=copy.store) as caller:
        assert talk(caller) == recorded


OFFLINE = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import httpx2
from test_gateway import Run
run = Run(pathlib.Path({path!r}))
with run.caller("http://127.0.0.1:9", mode="replay", recording=pathlib.Path({recording!r})) as one:
    transport = httpx2.HTTPTransport(uds=str(one.endpoint.socket))
    with httpx2.Client(transport=transport) as client:
        headers = {{"x-api-key": one.endpoint.key}}
        answer = client.post(
            "http://gateway/v1/chat/completions", json=one.chat(stream=False), headers=headers
        )
        print(answer.json()["choices"][0]["message"]["content"])
"""


def test_a_replay_works_where_there_is_no_network_at_all(run: Run, vendor, tmp_path: Path) -> None:
    cut = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no network namespaces")
    with run.caller(vendor.url) as caller:
        caller.ask("chat", "hello")
    program = OFFLINE.format(
        tests=str(Path(__file__).parent), path=str(tmp_path / "copy"), recording=str(run.path)
    )
    done = subprocess.run(
        [*cut, sys.executable, "-c", program],
        capture_output=True, text=True, timeout=60, check=False,
        env={k: v for k, v in os.environ.items() if k != "SIA_TEST_KEY"},
    )  # fmt: skip
    assert done.stdout.strip() == SAYS["say"], done.stderr


def test_an_unknown_request_is_answered_with_the_nearest_recorded_one(
    run: Run, vendor, tmp_path: Path
) -> None:
    with run.caller(vendor.url) as caller:
        caller.ask("chat", "hello, which of the 191 charges fits?")
        caller.ask("chat", "hello, something else entirely")
    copy = Run(tmp_path / "copy")
    with copy.gateway("http://127.0.0.1:9", mode="replay", recording=run.path) as gateway:
        with gateway.lease(Role.TARGET, SCOPE) as lease:
            with pytest.raises(openai.NotFoundError) as miss:
                Caller(lease.endpoint).ask("chat", "hello, which of the 192 charges fits?")
            with pytest.raises(anthropic.NotFoundError, match="has no messages request"):
                Caller(lease.endpoint).ask("messages", "hello")
        with (
            gateway.lease(Role.TARGET, "elsewhere") as lease,
            pytest.raises(
                openai.NotFoundError, match=f"no chat request of elsewhere; it has {SCOPE}"
            ),
        ):
            Caller(lease.endpoint).ask("chat", "hello, something else entirely")
    message = miss.value.body["message"]
    assert "The nearest of 2 there is exchange 1; line 4 differs" in message
    assert 'recorded: "content": "hello, which of the 191 charges fits?"' in message
    assert 'now:      "content": "hello, which of the 192 charges fits?"' in message
    assert read_misses(copy.store)[0].message == message
    assert copy.exchanges() == []


def test_answers_are_shared_through_a_cache(run: Run, vendor, tmp_path: Path) -> None:
    options = {"mode": "cache", "cache": tmp_path / "cache"}
    with run.caller(vendor.url, **options) as caller:
        for _ in range(2):
            caller.ask("chat", "hello")
        assert len(vendor.seen) == 2  # two samples are two samples
    other = Run(tmp_path / "other")
    with (
        other.gateway(vendor.url, **options) as gateway,
        gateway.lease(Role.TARGET, "another") as lease,
    ):
        for _ in range(3):
            Caller(lease.endpoint).ask("chat", "hello")
    assert len(vendor.seen) == 3
    assert other.spent() == Spend(
        calls=1, replayed=2, input_tokens=10, output_tokens=5, cost_usd=2e-5
    )


def test_live_keeps_numbers_and_no_texts(run: Run, vendor, tmp_path: Path) -> None:
    with run.caller(vendor.url, mode="live") as caller:
        caller.ask("chat", "hello")
    (exchange,) = run.exchanges()
    assert (exchange.request(), exchange.body()) == (None, b"")
    assert run.spent().calls == 1
    with pytest.raises(ProviderError, match=r"holds no answers; a run with gateway.mode=live"):
        ModelGateway(store=tmp_path / "s", routes={}, mode="replay", recording=run.path)


@pytest.mark.parametrize("mode", ["record", "live"])
def test_the_providers_key_is_nowhere_even_if_the_provider_repeats_it(run: Run, mode: str) -> None:
    def answer(request: bytes) -> Iterator[bytes]:
        assert f"Bearer {CANARY}".encode() in request
        said = CANARY.encode()
        if b"ok" in request:
            yield http(b'{"model": "m", "choices": [{"message": {"content": "%s"}}]}' % said)
        elif b"stream" in request:
            event = b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % said
            yield http(event[:50], kind="text/event-stream")
            yield event[50:]
        else:
            status = b"401 No" if b"denied" in request else b"503 No"
            yield http(b'{"error": {"message": "%s is wrong"}}' % said, status=status.decode())

    with raw_vendor(answer) as url, run.caller(url, mode=mode, call_s=0.3) as caller:
        for text, stream in (("ok", False), ("denied", False), ("down", False), ("s", True)):
            got = caller.post("/v1/chat/completions", caller.chat(text, stream=stream))
            assert CANARY.encode() not in got.content
            assert caller.endpoint.key.encode() not in got.content
        files = [path for path in run.path.iterdir() if path.is_file()]
        assert all(CANARY.encode() not in path.read_bytes() for path in files)
    assert len(run.exchanges()) == 4
    for exchange in run.exchanges():
        assert CANARY not in f"{exchange} {exchange.request()}"
        assert CANARY.encode() not in exchange.body()
        assert caller.endpoint.key not in f"{exchange} {exchange.request()}"


def test_only_headers_that_change_the_answer_are_passed_on(run: Run, vendor: Scripted) -> None:
    with run.caller(vendor.url) as caller:
        caller.post(
            "/v1/messages?beta=true", caller.chat(max_tokens=9),
            **{"anthropic-beta": "thing-2025", "x-odd": "1", "cookie": "a=b"},
        )  # fmt: skip
        caller.ask("chat", "hello")
    messages, chat = (seen.headers for seen in vendor.seen)
    assert messages["x-api-key"] == CANARY
    assert messages["anthropic-beta"] == "thing-2025"
    assert messages["anthropic-version"] == "2023-06-01"
    assert chat["authorization"] == f"Bearer {CANARY}"
    for headers in (messages, chat):
        assert not {"x-odd", "cookie"} & set(headers)
        assert caller.endpoint.key not in str(headers)
    assert "authorization" not in messages


def test_wrong_requests_are_refused_in_the_callers_format(run: Run, vendor: Scripted) -> None:
    chat_only = provider(vendor.url, formats=("chat",))
    with run.caller(vendor.url, provided=chat_only) as caller:
        with pytest.raises(
            anthropic.NotFoundError, match="does not speak 'messages'; it speaks chat"
        ):
            caller.ask("messages", "hello")
        with pytest.raises(openai.NotFoundError, match=r"'gpt-9' is not .* ask for 'scripted-1'"):
            caller.ask("chat", "hello", model="gpt-9")
        refused = [
            caller.post("/v1/chat/completions", b"{"),
            caller.post("/v1/chat/completions", b"[1]"),
            caller.post("/v1/completions", b"{}"),
            caller.post("/v1/chat/completions", b" " * (64 * 2**20 + 1)),
        ]
    assert [answer.status_code for answer in refused] == [400, 400, 404, 413]
    said = [answer.json()["error"]["message"] for answer in refused]
    assert "is not JSON" in said[0]
    assert "names no model" in said[1]
    assert "POST /v1/completions is not here; there are POST /v1/chat/completions" in said[2]
    assert all(answer.headers["x-should-retry"] == "false" for answer in refused)
    assert vendor.seen == []
    assert run.exchanges() == []


def test_nothing_that_a_program_sends_or_a_vendor_says_stops_the_gateway(run: Run) -> None:
    deep = b"[" * 100_000
    nested = b'{"choices": [' + b"[" * 400 + b"]" * 400 + b"]}"
    odd = {
        "deep": deep,
        "nested": nested,
        "half": b'{"model": "\\ud800", "choices": [{"finish_reason": "\\udfff", "message": {}}]}',
        "many": b'{"choices": [{"message": {}}], "usage": {"prompt_tokens": 1%s}}' % (b"0" * 40),
        "null": b"null",
        "numbers": b'{"model": 1, "choices": [1], "usage": {"prompt_tokens": "x"}}',
    }

    def answer(request: bytes) -> Iterator[bytes]:
        kind = next(kind for kind in odd if f'"{kind}"'.encode() in request)
        yield http(odd[kind])

    with raw_vendor(answer) as url, run.caller(url) as caller:
        path = "/v1/chat/completions"
        asked = b'{"model": "scripted-1", "messages": %s}'
        sent = [
            deep, nested, asked % (b"[" * 900 + b"]" * 900), b"\xff\xfe", b"NaN", b'{"model": 5}',
        ]  # fmt: skip
        assert [caller.post(path, body).status_code for body in sent] == [400] * 6
        with socket.create_connection(("127.0.0.1", caller.endpoint.port)) as gone:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {caller.endpoint.key}\r\n"
            gone.sendall(f"{head}content-length: 99\r\n\r\n{{".encode())
        got = {kind: caller.post(path, caller.chat(kind)).status_code for kind in odd}
    assert got == {
        "deep": 502, "nested": 200, "half": 200, "many": 200, "null": 502, "numbers": 200
    }  # fmt: skip
    assert [exchange.served_model for exchange in run.exchanges()][2] == "?"


def test_an_alias_is_asked_for_by_its_exact_id(run: Run, vendor: Scripted) -> None:
    with run.caller(vendor.url) as caller:
        assert caller.endpoint.model == "scripted-1"
        caller.ask("chat", "hello", model="small")
        with caller.openai() as client:
            assert [model.id for model in client.models.list()] == ["scripted-1"]
        with caller.anthropic() as client:
            assert [model.id for model in client.models.list()] == ["scripted-1"]
    assert vendor.seen[0].body["model"] == "scripted-1"
    assert run.exchanges()[0].requested_model == "small"


def test_counting_tokens_is_neither_charged_nor_counted(run: Run, vendor: Scripted) -> None:
    messages = [{"role": "user", "content": "hello there"}]
    with (
        run.caller(vendor.url, budget=Budget(requests=0)) as caller,
        caller.anthropic() as client,
    ):
        assert client.messages.count_tokens(model="small", messages=messages).input_tokens == 2
    assert run.spent() == Spend()
    assert not run.exchanges()[0].counted


def test_a_policy_on_a_unix_socket(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "policy.sock"
    with serving([SAYS], uds=path):
        local = provider(f"unix://{path}", base_url=f"unix://{path}", api_key_env="")
        with run.caller("", provided=local) as caller:
            assert caller.ask("chat", "hello") == SAYS["say"]
            assert caller.ask("messages", "hello", stream=True) == SAYS["say"]


def test_the_socket_is_open_to_other_users_and_the_folder_around_it_is_not(
    run: Run, vendor
) -> None:
    with run.caller(vendor.url) as caller:
        path = caller.endpoint.socket
        assert path.stat().st_mode & 0o777 == 0o666
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path))) as client:
            headers = {"x-api-key": caller.endpoint.key}
            assert client.get("http://gateway/v1/models", headers=headers).status_code == 200


def test_the_forwarder_of_the_sandbox_serves_one_client_after_the_other(
    run: Run, vendor: Scripted
) -> None:
    with run.caller(vendor.url) as caller:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        program = [forward.__file__, str(port), str(caller.endpoint.socket)]
        waiting = "print('ready', flush=True); import sys; sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, *program, sys.executable, "-c", waiting],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                process.stdout.readline()
                inside = Caller(replace(caller.endpoint, port=port))
                for stream in (False, True, False):  # a client, and with it a connection, each
                    assert inside.ask("chat", "hello", stream=stream) == SAYS["say"]
            finally:
                os.killpg(process.pid, signal.SIGTERM)


def test_exchanges_can_be_read_while_they_are_written(run: Run, vendor: Scripted) -> None:
    assert run.exchanges() == []
    assert run.spent() == Spend()
    with run.caller(vendor.url) as caller:
        caller.ask("chat", "hello 0")
        reader = read_exchanges(run.store)
        assert next(reader).id == 1
        started = time.monotonic()
        for number in range(1, 4):
            caller.ask("chat", f"hello {number}")
        assert time.monotonic() - started < 30
        assert [exchange.id for exchange in reader] == [2, 3, 4]
        assert [exchange.id for exchange in read_exchanges(run.store, after_id=3)] == [4]
        assert run.spent().calls == 4
    assert [path.name for path in run.path.iterdir()] == ["gateway.sqlite"]


INTERRUPTED = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from test_gateway import Run
run = Run(pathlib.Path({path!r}))
try:
    with run.caller({url!r}) as caller:
        caller.ask("chat", "hello")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_ends_calls_that_hang(run: Run) -> None:
    with serving([{"fault": "hang"}]) as vendor:
        program = INTERRUPTED.format(
            tests=str(Path(__file__).parent), path=str(run.path), url=vendor.url
        )
        # A shell that starts jobs in the background lets them ignore interrupts.
        program = f"import signal; signal.signal(2, signal.default_int_handler)\n{program}"
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        ) as process:
            wait_until(lambda: vendor.seen, 30)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=10)[0] == "interrupted\n"
    assert run.spent().failed == 1


FULL = """
import pathlib, resource, sys
sys.path.insert(0, {tests!r})
from test_gateway import Run, openai, RunDirectoryError
run = Run(pathlib.Path({path!r}))
try:
    with run.caller({url!r}) as caller:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        for n in range(400):
            caller.ask("chat", f"hello {{n}}")
except RunDirectoryError as error:
    print(error)
    assert isinstance(error.__context__, openai.InternalServerError)
    assert str(error) in str(error.__context__)
"""


def test_a_full_disk_ends_the_step_and_keeps_what_was_written(run: Run, vendor: Scripted) -> None:
    program = FULL.format(tests=str(Path(__file__).parent), path=str(run.path), url=vendor.url)
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=120, check=False, capture_output=True, text=True
    )
    assert "Cannot write" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr
    assert 10 < run.spent().calls < 400


def test_a_store_of_another_kind_is_refused(run: Run) -> None:
    run.path.mkdir()
    run.store.write_text("this is not a database, and long enough to be seen as none " * 20)
    with (
        pytest.raises(RunDirectoryError, match=r"Cannot write .*gateway.sqlite"),
        run.gateway("http://127.0.0.1:9"),
    ):
        pass
