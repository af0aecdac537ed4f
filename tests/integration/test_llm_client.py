"""The client in the language-model harnesses, against a server on loopback that misbehaves."""

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TEMPLATE = Path(__file__).resolve().parents[2] / "src" / "sia" / "tasks" / "llm_harness"
SETTINGS = {
    "concurrency": 4, "timeout_s": 5.0, "retries": 2, "give_up_after": 50, "ask_s": 60.0,
    "max_tokens": 20, "temperature": 0, "backoff_s": 0.01,
}  # fmt: skip
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TEMPLATE))
    sys.modules.pop("model", None)
    yield importlib.import_module("model")
    sys.modules.pop("model", None)


@dataclass
class Server:
    """Answers with what `answer` makes of the number of the request and its body."""

    answer: Callable[[int, dict[str, Any]], Answer]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    running: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[int, dict[str, Any]], Answer]) -> Server:
        server, lock = Server(answer), threading.Lock()
        now = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal now
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    now += 1
                    server.most_at_once = max(server.most_at_once, now)
                status, headers, data = server.answer(number, body)
                with lock:
                    now -= 1
                if not status:  # hangs up
                    return
                with suppress(ConnectionError):  # nobody waits any more
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        running.append(http)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "throw-away")
        monkeypatch.setenv("SIA_MODEL", "some-model")
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def said(text: str, **more: object) -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


def refused(status: int, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": "the reason"}}).encode()


def prompts(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": str(number)}] for number in range(count)]


def test_replies_stand_in_the_order_of_the_prompts(client: ModuleType, serve: Callable) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        asked = body["messages"][0]["content"]
        time.sleep(0.02 * (int(asked) % 3 == 0))
        return said(f"to {asked}")

    server = serve(answer)
    seen: list[int] = []
    model = client.Model(**SETTINGS)
    replies = model.ask_all(prompts(12), each=lambda number, reply: seen.append(number))
    assert [reply.text for reply in replies] == [f"to {number}" for number in range(12)]
    assert sorted(seen) == list(range(12))
    assert 1 < server.most_at_once <= 4
    assert server.bodies[0] | {"messages": []} == {
        "model": "some-model", "max_tokens": 20, "temperature": 0, "messages": [],
    }  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer throw-away"
    assert dict(model.tokens) == {"in": 84, "out": 24}


def test_settings_that_are_null_are_not_sent_and_further_ones_are(
    client: ModuleType, serve: Callable
) -> None:
    server = serve(lambda number, body: said("yes"))
    changed = {"max_tokens": None, "temperature": None, "extra": {"max_completion_tokens": 9}}
    client.Model(**{**SETTINGS, **changed}).ask_all(prompts(1))
    assert server.bodies[0].keys() == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize("fault", [refused(500), refused(503), refused(429), (0, {}, b"")])
def test_a_passing_fault_is_survived(client: ModuleType, serve: Callable, fault: Answer) -> None:
    server = serve(lambda number, body: fault if number < 2 else said("yes"))
    model = client.Model(**SETTINGS)
    assert model.ask_all(prompts(1))[0].text == "yes"
    assert len(server.bodies) == 3
    assert not model.errors


@pytest.mark.parametrize(
    ("fault", "calls", "error"),
    [
        (refused(500), 3, "HTTP 500: the reason"),
        (refused(500, x_should_retry="false"), 1, "HTTP 500: the reason"),
        (refused(429, X_Should_Retry="False"), 1, "HTTP 429: the reason"),
        (refused(400), 1, "HTTP 400: the reason"),
        (refused(401), 1, "HTTP 401: the reason"),
        ((0, {}, b""), 3, "connection lost: Remote end closed connection"),
        ((200, {}, b"{"), 1, "not a chat completion"),
        ((200, {}, b"[]"), 1, "not a chat completion"),
        ((200, {}, b'{"choices": []}'), 1, "not a chat completion"),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), 1, "without text"),
        ((200, {"Content-Length": "900"}, b'{"choices"'), 1, "not a chat completion"),
        ((200, {}, b" " * (2**22 + 1)), 1, "more than 4194304 bytes"),
    ],
)
def test_a_lasting_fault_is_a_counted_reply_without_text(
    client: ModuleType, serve: Callable, fault: Answer, calls: int, error: str
) -> None:
    server = serve(
        lambda number, body: fault if body["messages"][0]["content"] == "1" else said("yes")
    )
    model = client.Model(**{**SETTINGS, "concurrency": 1})
    replies = model.ask_all(prompts(3))
    assert [reply.text for reply in replies] == ["yes", "", "yes"]
    assert error in replies[1].error
    assert len(server.bodies) == calls + 2
    assert sum(model.errors.values()) == 1


def test_a_call_that_times_out_is_not_paid_for_twice(client: ModuleType, serve: Callable) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.6 * (number == 0))
        return said("yes")

    server = serve(answer)
    model = client.Model(**{**SETTINGS, "timeout_s": 0.2, "concurrency": 1})
    replies = model.ask_all(prompts(2))
    assert [reply.error for reply in replies] == ["no answer within 0.2 s", ""]
    assert len(server.bodies) == 2


def test_lone_surrogates_can_be_written(client: ModuleType, serve: Callable) -> None:
    serve(lambda number, body: said("half \ud800 of it"))
    assert client.Model(**SETTINGS).ask_all(prompts(1))[0].text.encode() == b"half ? of it"


def test_a_reply_that_was_cut_says_so(client: ModuleType, serve: Callable) -> None:
    serve(lambda number, body: said("and th", finish_reason="length", logprobs={"content": []}))
    reply = client.Model(**SETTINGS).ask_all(prompts(1))[0]
    assert reply.cut
    assert reply.choice["logprobs"] == {"content": []}


def test_a_refusal_for_lack_of_budget_ends_everything_at_once(
    client: ModuleType, serve: Callable
) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        if number == 5:
            return refused(402)
        time.sleep(25 * (number > 5))
        return said("yes")

    server = serve(answer)
    began = time.monotonic()
    with pytest.raises(client.Refused, match="the reason"):
        client.Model(**{**SETTINGS, "timeout_s": 60.0}).ask_all(prompts(200))
    assert time.monotonic() - began < 20  # the calls that were under way take 25 s
    assert len(server.bodies) < 15


def test_an_endpoint_that_is_gone_is_left_alone_after_some_failures(
    client: ModuleType, serve: Callable
) -> None:
    server = serve(lambda number, body: said("yes") if number < 2 else refused(400))
    model = client.Model(**{**SETTINGS, "concurrency": 1, "give_up_after": 3})
    replies = model.ask_all(prompts(50))
    assert len(server.bodies) == 5
    assert [reply.text for reply in replies[:2]] == ["yes", "yes"]
    assert replies[-1].error == "not asked: 3 calls in a row had failed"
    assert sum(model.errors.values()) == 48


def test_what_is_not_asked_in_time_counts_as_failed(client: ModuleType, serve: Callable) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.05)
        return said("yes")

    serve(answer)
    model = client.Model(**{**SETTINGS, "concurrency": 1, "ask_s": 0.2})
    replies = model.ask_all(prompts(50))
    assert replies[0].text == "yes"
    assert replies[-1].error == "not asked: 0.2 s were over"


def test_an_endpoint_that_never_answers_is_an_error(client: ModuleType, serve: Callable) -> None:
    serve(lambda number, body: refused(401))
    with pytest.raises(client.NoModel, match=r"no call was answered: 3 x HTTP 401: the reason"):
        client.Model(**SETTINGS).ask_all(prompts(3))


def test_a_program_without_a_model_says_what_is_missing(
    client: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("SIA_MODEL", raising=False)
    with pytest.raises(client.NoModel, match="OPENAI_BASE_URL and SIA_MODEL not set"):
        client.Model(**SETTINGS)


def test_gpqa_reads_the_probabilities_of_the_letters(serve: Callable, tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        tops = [
            {"token": token, "logprob": p} for token, p in (("B", -1.0), (" C", -1.2), ("C", -2))
        ]
        return said("B", logprobs={"content": [{"token": "B", "top_logprobs": tops}]})

    serve(answer)
    header = "id,domain,subdomain,question,A,B,C,D"
    (tmp_path / "train.csv").write_text(f"{header},label\n")
    (tmp_path / "items.csv").write_text(f"{header}\nx,Physics,Optics,Why?,1,2,3,4\n")
    folder = TEMPLATE.parents[3] / "tasks" / "gpqa" / "harness_llm"
    for file in folder.iterdir():
        if file.is_file():
            text = file.read_text().replace("ask: reason", "ask: likelihood")
            (tmp_path / file.name).write_text(text)
    subprocess.run(
        [sys.executable, str(tmp_path / "target_agent.py"), "--dataset_dir", str(tmp_path),
         "--working_dir", str(tmp_path)],
        check=True, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "submission.csv").read_text() == "id,answer\nx,C\n"
