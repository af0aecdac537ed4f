"""The server of the pages over HTTP: whom it answers, and what hostile content can do."""

import asyncio
import http.client
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from made_runs import make_run
from sia import rundir
from sia.pages import Runs
from sia.web import child
from sia.web.address import listen

pytest.importorskip("fastapi", reason="the extra web is not installed")
from fastapi import FastAPI

from sia.web.app import make_app

SECRET = "a-secret-of-this-machine"
HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    '" onmouseover="window.ran = 1" x=" \' onfocus=\'window.ran = 1\' autofocus '
    "[click](javascript:window.ran=1) ![x](javascript:window.ran=1) <https://evil.example> "
    "</pre></td></title></style><svg onload=window.ran=1> {{ 7*7 }} {% raw %} "
    'hx-get="/evil" \x1b]8;;http://evil.example\x07link\x1b]8;;\x07 \x1b[2J \u202e'
)
VIEWS = ("overview", "diff", "harness", "prompt", "trajectories", "calls", "logs", "update")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str


@dataclass(frozen=True)
class Server:
    port: int
    said: str

    def get(self, path: str, *, method: str = "GET", **headers: str) -> Answer:
        """One request, sent to the letter."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            sent = {"Host": f"127.0.0.1:{self.port}", **headers}
            connection.request(method, path, headers=sent)
            response = connection.getresponse()
            known = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, known, response.read().decode())
        finally:
            connection.close()


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "sia.web", str(folder), "--port", str(free_port()), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = re.search(r":(\d+)/", line)
        assert port is not None, line
        yield Server(int(port[1]), line)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that hold what a hostile model might write, and what it might link to."""
    base = tmp_path_factory.mktemp("hostile")
    (base / "secret.txt").write_text(SECRET)
    runs = base / "runs"
    make_run(runs / "toy" / "one", trajectories=2, said=HOSTILE, exam=True)
    make_run(runs / "toy" / "two", seed=1)
    folder = runs / "toy" / "one" / "gen-001" / "cand-0"
    for name in ("linked.log", "harness/linked.py", "agent_execution/execution_qlinked.json"):
        (folder / name).symlink_to(base / "secret.txt")
    (folder / "improvement.md").unlink()
    (folder / "improvement.md").symlink_to(base / "secret.txt")
    (folder / "harness" / "away").symlink_to(base)
    (folder / "harness" / "<b>&.py").write_text("x = 1\n")
    with (folder / "stdout.log").open("wb") as log:
        line = f"{HOSTILE}\n".encode()
        log.write(line * (50 * 2**20 // len(line)))
        log.write(b"the end of it")
    (runs / "linked").symlink_to(base)
    return runs


@pytest.fixture(scope="module")
def server(hostile: Path) -> Iterator[Server]:
    with serving(hostile) as started:
        yield started


class Elements(HTMLParser):
    """What a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str | None] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.scripts.append(dict(attrs).get("src"))
        self.attributes += attrs


def pages() -> list[str]:
    views = [f"/candidate/g001-c0/toy/one?view={view}" for view in VIEWS]
    return [
        "/", "/run/toy/one", "/compare?run=toy/one&run=toy/two", *views,
        "/candidate/g003-c0/toy/one", "/candidate/g002-c0/toy/one?view=update",
        "/candidate/g001-c0/toy/one?view=trajectories&name=execution_qn00000.json&text=<script>",
        "/candidate/g001-c0/toy/one?view=trajectories&text=window.ran",
        "/candidate/g001-c0/toy/one?view=logs&start=0",
        "/candidate/g001-c0/toy/one?view=harness&file=%3Cb%3E%26.py",
        "/?text=<script>alert(1)</script>", "/run/<script>alert(1)</script>", "/nothing",
    ]  # fmt: skip


@pytest.mark.parametrize("path", pages())
def test_no_page_holds_anything_that_runs_or_leads_away(server: Server, path: str) -> None:
    answer = server.get(quote(path, safe="/?&=%"))
    assert answer.status in (200, 404)
    found = Elements()
    found.feed(answer.text)
    assert all(src and src.startswith("/assets/vendor/") for src in found.scripts)
    for name, value in found.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src", "action", "hx-get", "sse-connect"):
            assert re.match(r"(/(?!/)|#)", value or ""), value
    assert SECRET not in answer.text
    assert "evil.example\x07" not in answer.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", answer.text)


def test_what_a_model_said_is_shown_to_the_letter(server: Server) -> None:
    text = server.get("/candidate/g003-c0/toy/one").text
    assert "&lt;script&gt;window.ran = 1&lt;/script&gt;" in text
    assert "{{ 7*7 }} {% raw %}" in text
    assert "[U+202E]" in text


def test_every_answer_forbids_what_a_page_does_not_need(server: Server) -> None:
    for path in ("/", "/run/toy/one", "/nothing", "/assets/style.css", "/events/toy/one"):
        headers = server.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "path",
    [
        "/run/../secret.txt", "/run/toy/../../secret.txt", "/run/%2e%2e/", "/run/toy%2f..%2f..%2f",
        "/run/linked", "/run//etc", "/run/toy", "/run/toy/one/gen-001", "/run/toy/one%00",
        "/events/../..", "/assets/../app.py", "/assets/%2e%2e/render.py", "/assets/..%2frender.py",
        "/candidate/g009-c0/toy/one", "/candidate/..%2f..%2fx/toy/one",
        "/candidate/g001-c0/toy/one?view=../x",
        "/candidate/g001-c0/toy/one?view=harness&file=../../../../../../secret.txt",
        "/candidate/g001-c0/toy/one?view=harness&file=linked.py",
        "/candidate/g001-c0/toy/one?view=harness&file=away/secret.txt",
        "/candidate/g001-c0/toy/one?view=harness&file=/etc/passwd",
        "/candidate/g001-c0/toy/one?view=logs&name=../../../config.yaml",
        "/candidate/g001-c0/toy/one?view=logs&name=linked.log",
        "/candidate/g001-c0/toy/one?view=trajectories&name=../stdout.log",
        "/candidate/g001-c0/toy/one?view=trajectories&name=execution_qlinked.json",
        "/compare?run=../..&run=toy/one",
    ],
)  # fmt: skip
def test_no_address_leads_out_of_the_runs(server: Server, path: str) -> None:
    answer = server.get(path)
    assert answer.status == 404
    assert SECRET not in answer.text
    assert "root:" not in answer.text


def test_links_are_not_even_listed(server: Server) -> None:
    for view in ("harness", "logs", "trajectories"):
        assert "linked" not in server.get(f"/candidate/g001-c0/toy/one?view={view}").text
    assert "No notes were written" in server.get("/candidate/g001-c0/toy/one").text


def test_a_log_of_50_mb_is_shown_by_its_end_with_a_way_to_the_rest(server: Server) -> None:
    answer = server.get("/candidate/g001-c0/toy/one?view=logs&name=stdout.log")
    assert "the end of it" in answer.text
    assert len(answer.text) < 500_000
    assert "50.0 MiB" in answer.text
    earlier = re.search(r'rel="prev" href="([^"]+)">Earlier', answer.text)
    assert earlier is not None
    before = server.get(earlier[1].replace("&amp;", "&"))
    assert before.status == 200
    assert "the end of it" not in before.text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::2]:80"])
def test_a_foreign_name_gets_no_answer(server: Server, host: str) -> None:
    answer = server.get("/", Host=host)
    assert answer.status == 421
    assert "toy" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "[::1]:80", "127.0.0.1"])
def test_the_names_of_this_machine_are_answered(server: Server, host: str) -> None:
    assert server.get("/", Host=host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(server: Server, method: str) -> None:
    assert server.get("/run/toy/one", method=method).status == 405


@pytest.mark.parametrize("query", ["page=0", "page=x", f"page={10**30}", f"text={'x' * 300}"])
def test_an_odd_query_is_an_error_with_a_way_back(server: Server, query: str) -> None:
    answer = server.get(f"/?{query}")
    assert answer.status in (200, 400)
    assert "Runs" in answer.text or "All runs" in answer.text


def test_a_token_is_asked_for_and_then_kept_in_a_cookie(hostile: Path) -> None:
    with serving(hostile, "--token", "the-right-one") as server:
        assert "?token=the-right-one" in server.said
        for path in ("/", "/run/toy/one", "/events/toy/one", "/assets/style.css"):
            assert server.get(path).status == 401
        assert server.get("/?token=wrong").status == 401
        assert server.get("/", Cookie="sia_token=wrong").status == 401
        entered = server.get("/run/toy/one?token=the-right-one&a=1")
        assert entered.status == 303
        assert entered.headers["location"] == "/run/toy/one?a=1"
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert server.get("/", Cookie=cookie.split(";")[0]).status == 200
        away = server.get("//evil.example/?token=the-right-one")
        assert away.headers["location"] == "/evil.example/"


def test_any_address_but_loopback_needs_a_token_and_a_name(hostile: Path) -> None:
    command = [sys.executable, "-m", "sia.web", str(hostile), "--host", "0.0.0.0"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "--name" in refused.stderr
    with serving(hostile, "--host", "0.0.0.0", "--name", "lab.example") as server:
        assert "http://lab.example:" in server.said
        assert "?token=" in server.said
        assert server.get("/").status == 421
        assert server.get("/", Host="lab.example").status == 401


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "no folder 'nowhere'"),
        ([".", "--port", "1", "--host", "203.0.113.1"], "listen"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, options: list[str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sia.web", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("steps", range(8))
def test_a_run_can_be_looked_at_after_any_of_its_steps(tmp_path: Path, steps: int) -> None:
    """Also one without a single step."""
    run = make_run(tmp_path / "one", generations=2, failed=0, retrained=1, ended=False)
    journal = run / rundir.JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:steps]))
    app = make_app(Runs(tmp_path))
    assert answered(app, "/run/one") == 200
    assert answered(app, "/") == 200
    assert answered(app, "/compare", "run=one&run=one") == 200
    for view in VIEWS:
        known = 200 if steps else 404
        assert answered(app, "/candidate/g000-c0/one", f"view={view}") == known


def answered(app: FastAPI, path: str, query: str = "") -> int:
    """The status of one answer, without a server."""
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "headers": [],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return int(sent[0]["status"])


def test_the_events_of_a_run_that_is_over_end(server: Server) -> None:
    answer = server.get("/events/toy/one")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert re.fullmatch(r"event: changed\ndata: \w+\n\nevent: ended\ndata: \n\n", answer.text)


def test_a_run_opens_a_page_that_outlives_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    done = subprocess.run(
        [sys.executable, "-m", "sia", "task=toy", "tracking=none", "generations=1", "web=true",
         f"hydra.run.dir={run}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"^page +http://127\.0\.0\.1:(\d+)/run/one +\(later: (.+)\)$", done.stdout, re.M
    )
    assert found is not None, done.stdout
    assert found[2] == "python -m sia.web runs"
    try:
        answer = Server(int(found[1]), "").get("/run/one")
        assert answer.status == 200
        assert "finished" in answer.text
        assert "web" not in (run / rundir.CONFIG_FILE).read_text()
    finally:
        end(run)


def test_a_page_that_cannot_be_opened_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sia.web.address.TRIES", 1)
    with listen("127.0.0.1", 0) as taken:
        monkeypatch.setattr("sia.web.address.PORT", taken.getsockname()[1])
        said = child.start(run)
    assert said.startswith("none: Cannot listen")
    assert said.endswith("python -m sia.web runs")


def test_a_page_closes_when_its_run_is_over_and_nobody_looks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one", ended=False)
    held = rundir.RunDir.resume(run)
    command = [sys.executable, "-m", "sia.web", str(run.parent), "--port", str(free_port())]
    process = subprocess.Popen(
        [*command, "--run", "one", "--idle-s", "0.2"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert "shown at" in process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        held.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def end(run: Path) -> None:
    """Ends the server that a run has started, found by what it was told."""
    for folder in Path("/proc").iterdir():
        try:
            told = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sia.web" in told and os.fsencode(run.parent) in told:
            os.kill(int(folder.name), 15)
