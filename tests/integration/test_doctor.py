"""The doctor against real endpoints, sandboxes, folders and databases."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from sia import doctor
from sia.doctor import FAIL, OK, WARN, Finding, examine
from sia.gateway.scripted import serving

ROOT = Path(__file__).resolve().parents[2]
CANARY = "sk-canary-6f1d2a9b7c3e4f50"
QUICK = ["task=toy", "tracking=none"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "ACME_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A folder with a provider, an agent and a target of somebody's own."""
    folder = tmp_path / "conf"
    for group in ("provider", "meta", "target"):
        (folder / group).mkdir(parents=True)
    (folder / "meta" / "agent.yaml").write_text(
        "defaults:\n  - /schema/meta/pydantic_ai@_here_\nmodel: big\n"
    )
    (folder / "target" / "asking.yaml").write_text("harness: reference\nmodel: small\n")
    return folder


def provider(conf: Path, url: str, *, formats: str = "chat", more: str = "") -> list[str]:
    (conf / "provider" / "acme.yaml").write_text(
        f"name: acme\nbase_url: {url}/v1\nanthropic_url: {url}\nformats: [{formats}]\n"
        "api_key_env: ACME_API_KEY\nmodels: {big: acme-big-1, small: acme-small-1}\n"
        "prices: {acme-big-1: {input: 3, output: 15}}\nprices_as_of: 2026-01-01\n" + more
    )
    return ["-cd", str(conf), "provider=acme", *QUICK]


@contextmanager
def answering(status: int, body: bytes = b"{}", *, wait_s: float = 0) -> Iterator[str]:
    """A server that gives one answer to everything, the key it was sent included."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stopped.wait(wait_s)
            sent = self.headers.get("authorization") or self.headers.get("x-api-key") or ""
            self.send_response(status)
            self.send_header("location", f"https://elsewhere.invalid/{sent}")
            self.end_headers()
            self.wfile.write(body.replace(b"KEY", sent.encode()))

        def log_message(self, *args: object) -> None:
            pass

    stopped = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def found(argv: Sequence[str], *, offline: bool = False) -> dict[str, Finding]:
    return {one.name: one for one in examine(argv, offline=offline)}


def test_an_embedded_run_needs_nothing_that_is_missing(tmp_path: Path) -> None:
    names = found([*QUICK, "sandbox=process"])
    assert {one.state for one in names.values()} <= {OK, WARN}
    assert names["sandbox"].state == WARN
    assert "NOT protected" in names["sandbox"].value
    assert names["budget"].value == "none, and no model is called"
    assert not {"agent", "tracking"} & set(names)
    assert not list(tmp_path.iterdir()), "the doctor left something behind"


def test_a_provider_in_order_is_confirmed(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    with serving([], models=["acme-big-1", "acme-small-1"]) as server:
        argv = provider(conf, server.url, formats="chat, messages")
        names = found([*argv, "target=asking", "budget.requests=9"])
    assert names["key of acme"].value == "$ACME_API_KEY is set, of usual length"
    assert names["endpoint of acme"].state == OK
    assert names["model acme-small-1"].value == "offered"
    assert names["price of acme-small-1"].state == WARN
    assert names["budget"].value == "requests=9"


def test_a_model_that_is_not_offered_is_doubted(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    with serving([], models=["acme-small-2"]) as server:
        names = found([*provider(conf, server.url), "target=asking"])
    assert names["model acme-small-1"].state == WARN
    assert names["model acme-small-1"].help == "Did you mean 'acme-small-2'?"


@pytest.mark.parametrize(
    ("status", "state", "says"),
    [
        (401, FAIL, "refuses the key (401)"),
        (403, FAIL, "refuses the key (403)"),
        (404, WARN, "lists no models (404)"),
        (301, WARN, "answers 301"),
        (503, WARN, "answers 503"),
        (200, OK, "accepts"),
    ],
)
def test_an_answer_is_explained(
    conf: Path, monkeypatch: pytest.MonkeyPatch, status: int, state: str, says: str
) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    with answering(status) as url:
        finding = found([*provider(conf, url), "target=asking"])["endpoint of acme"]
    assert (finding.state, says in finding.value) == (state, True), finding


def test_an_endpoint_that_never_answers_costs_five_seconds(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    with answering(200, wait_s=60) as url:
        argv = [*provider(conf, url), "target=asking"]
        began = time.monotonic()
        finding = found(argv)["endpoint of acme"]
        assert time.monotonic() - began < 30
    assert finding.state == FAIL
    assert "no answer within 5 s" in finding.value


def test_an_endpoint_that_is_not_there_fails_unless_offline(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    argv = [*provider(conf, "http://127.0.0.1:9"), "target=asking"]
    assert found(argv)["endpoint of acme"].state == FAIL
    assert "endpoint of acme" not in found(argv, offline=True)


def test_a_missing_key_and_a_missing_price_are_both_named(conf: Path) -> None:
    argv = [*provider(conf, "http://127.0.0.1:9"), "target=asking", "budget.usd=1"]
    names = found(argv)
    assert "$ACME_API_KEY, which is not set: export ACME_API_KEY=" in names["key of acme"].value
    assert names["price of acme-small-1"].state == FAIL
    price = names["price of acme-small-1"].help.partition(": ")[2].strip("'")
    assert found([*argv, price], offline=True)["price of acme-small-1"].state == OK
    assert "endpoint of acme" not in names  # without a key its answer says nothing


def test_an_agent_is_asked_to_import_its_sdk(conf: Path) -> None:
    argv = [*provider(conf, "http://127.0.0.1:9"), "meta=agent"]
    pytest.importorskip("pydantic_ai")
    assert found(argv, offline=True)["agent"].value.startswith("pydantic_ai in Python 3")
    names = found([*argv, "meta.python=/nowhere/python"], offline=True)
    assert names["agent"].state == FAIL
    assert "meta.python='/nowhere/python' does not run" in names["agent"].value


def test_two_formats_at_one_address_are_one_question(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    with serving([], models=["acme-small-1"]) as server:
        argv = [*provider(conf, server.url, formats="chat, messages"), "target=asking"]
        names = [one.name for one in examine(argv, offline=False)]
    assert names.count("endpoint of acme") == 1
    assert names.count("model acme-small-1") == 1


@pytest.mark.parametrize("status", [200, 301, 401, 500])
def test_no_output_holds_the_key(
    conf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    body = b'{"error": "bad key KEY", "data": [{"id": "KEY"}]}'
    with answering(status, body) as url:
        argv = provider(conf, url, formats="chat, messages")
        doctor.main([*argv, "target=asking", "budget.usd=1"])
    shown = "".join(capfd.readouterr())
    assert "key of acme" in shown
    assert CANARY not in shown
    assert CANARY[3:] not in shown


def test_a_key_that_is_none_is_not_shown_either(
    conf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACME_API_KEY", f"{CANARY}\x07 export")
    assert doctor.main([*provider(conf, "http://127.0.0.1:9"), "target=asking"]) == 2
    assert CANARY not in "".join(capfd.readouterr())


def test_a_password_in_an_address_is_not_shown(
    conf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACME_API_KEY", CANARY)
    with answering(404) as url:
        secret = url.replace("//", "//user:hunter2@")
        doctor.main([*provider(conf, secret), "target=asking"])
    doctor.main([*provider(conf, "http://user:hunter2@127.0.0.1:9"), "target=asking"])
    shown = "".join(capfd.readouterr())
    assert "***@127.0.0.1" in shown
    assert "hunter2" not in shown


def test_a_wrong_command_line_is_explained_and_ends_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main(["task=toyy"]) == 2
    assert "Did you mean 'toy'?" in capsys.readouterr().out


def test_values_out_of_range_are_findings() -> None:
    names = found([*QUICK, "generations=0", "workers=0"])
    assert names["disk"].state == OK  # what can be looked at, is
    assert names["values"].state == FAIL
    assert "generations=0" in names["values"].value
    assert "workers=0" in names["values"].value


def test_a_launcher_that_is_not_installed_hides_nothing_else() -> None:
    names = found([*QUICK, "hydra/launcher=nebula"])
    assert names["launcher"].state == FAIL
    assert names["configuration"].state == OK


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding(name="first", state=OK, value="")
        raise RuntimeError("boom")

    both = list(doctor._guarded("second", broken))
    assert [one.state for one in both] == [OK, FAIL]
    assert both[1].value == "could not be checked: RuntimeError: boom"


def test_the_database_is_really_opened(fresh_database: Path, tmp_path: Path) -> None:
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    finding = found(["task=toy"])["tracking"]
    assert (finding.state, "holds 1 experiments" in finding.value) == (OK, True), finding
    (tmp_path / "mlflow.db").write_bytes(b"no database, " * 1000)
    finding = found(["task=toy"])["tracking"]
    assert finding.state == WARN
    assert "cannot be used as an MLflow database" in finding.value


def test_a_database_that_is_not_there_yet_is_no_problem(tmp_path: Path) -> None:
    finding = found(["task=toy"])["tracking"]
    assert finding == Finding(
        name="tracking", state=OK, value=f"{tmp_path / 'mlflow.db'} is made by the first run"
    )
    assert not list(tmp_path.iterdir())


def test_data_that_were_changed_are_refused(tmp_path: Path) -> None:
    here = tmp_path / "checkout"
    mine = here / "tasks" / "mine"
    shutil.copytree(
        ROOT / "tasks" / "toy", mine, ignore=shutil.ignore_patterns("data", "__pycache__")
    )
    facts = (mine / "task.yaml").read_text()
    (mine / "task.yaml").write_text(facts.replace("name: toy", "name: mine"))
    (here / "dvc.yaml").write_text(
        "stages:\n  split:\n    foreach: [mine]\n    do:\n"
        "      cmd: python -m sia.tasks split ${item} --seed 0\n"
        "      outs:\n      - tasks/${item}/data/public\n      - tasks/${item}/data/private\n"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (["init", "-q", "--no-scm"], ["repro", "-q"]):
        subprocess.run(
            [sys.executable, "-m", "dvc", *command],
            cwd=here, env={**os.environ, "PATH": path}, check=True, timeout=120,
        )  # fmt: skip
    argv = [*QUICK, "task.name=mine", f"task.dir={mine}"]
    assert found(argv)["data"].value == "mine v1, as in dvc.lock"
    (mine / "data" / "public" / "items.csv").write_text("id\n")
    finding = found(argv)["data"]
    assert finding.state == FAIL
    assert finding.value == "not those of dvc.lock: tasks/mine/data/public"
    assert finding.help == "dvc checkout split@mine"
