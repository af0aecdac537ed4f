"""Whole runs of real agent SDKs on LawBench, against an endpoint that follows docs/rehearsal.yaml.

Everything else is real: the sandbox, the gateway, the harness that calls its model, the verifier.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from openhands_interpreter import openhands_python
from sia import rundir
from sia.errors import TargetError
from sia.gateway import Role
from sia.gateway.scripted import Scripted, read_rules, serving
from sia.gateway.store import read_spend
from sia.meta.agents import Claude, PydanticAI
from sia.sandbox import Bwrap
from sia.tasks import find_task_dir, load_task

ROOT = Path(__file__).resolve().parents[2]
CANARY = "sk-canary-5f1d9c3a77e24b60"  # the vendor's key; worth something, so it may not leave us
BYSTANDER = "canary-of-another-service-91ab"
GENERATIONS = 2
RUN_S = 400
ORDINARY = 1000  # a user id without privileges
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # up and running
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, request)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@dataclass(frozen=True)
class Run:
    """A finished run and what it printed."""

    agent: str
    path: Path
    output: str
    scripted: Scripted


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter; those of pytest are private."""
    with tempfile.TemporaryDirectory(prefix="sia-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def task_dir(open_folder: Path) -> Path:
    """LawBench where any user can read it, its private side included: runs verify in there."""
    task = load_task(find_task_dir("tasks/lawbench"))
    if not task.has_data():
        pytest.skip("no data: dvc repro split@lawbench")
    try:
        Bwrap().check()
    except TargetError as error:
        pytest.skip(str(error))
    copy = open_folder / "lawbench"
    shutil.copytree(task.root, copy, ignore=shutil.ignore_patterns("raw"))
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


# Each takes two minutes and OpenHands twice as much. How the other two edit, decide and are
# replayed is seen in tests/integration: test_agents.py and test_openhands.py.
OPENHANDS = pytest.param("openhands", marks=pytest.mark.slow)


@pytest.fixture(
    scope="module",
    params=["claude", pytest.param("pydantic_ai", marks=pytest.mark.slow), OPENHANDS],
)
def agent(request: pytest.FixtureRequest) -> str:
    for known in (Claude, PydanticAI):
        if request.param == known.name and importlib.util.find_spec(known.package) is None:
            pytest.skip(known.install)
    return str(request.param)


@pytest.fixture(scope="module")
def recorded(agent: str, task_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two generations with one agent."""
    folder = tmp_path_factory.mktemp(f"recorded-{agent}")
    with serving(read_rules(ROOT / "docs" / "rehearsal.yaml")) as scripted:
        done = sia(folder, arguments(agent, task_dir), url=scripted.url)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Run(agent, folder / "run", done.stdout + done.stderr, scripted)


def arguments(agent: str, task_dir: Path) -> list[str]:
    interpreter = [f"meta.python={openhands_python()}"] if agent == "openhands" else []
    return [
        f"task.dir={task_dir}", f"meta={agent}", "meta.model=scripted-1", *interpreter,
        "target=llm", "target.model=scripted-1", "provider=scripted", "sandbox=bwrap",
        "provider.api_key_env=THE_KEY", "feedback=traces", f"generations={GENERATIONS}",
        "tracking=none",
    ]  # fmt: skip


def sia(
    folder: Path, overrides: list[str], *, url: str, before: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m sia` in `folder`, into `folder/run`."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "SIA_SCRIPTED_URL": url,
        "THE_KEY": CANARY,
        "ANOTHER_SECRET": BYSTANDER,
    }
    program = [*(before or [sys.executable]), "-m", "sia"]
    return subprocess.run(
        [*program, *overrides, f"hydra.run.dir={folder / 'run'}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False,
    )  # fmt: skip


def test_generations_are_scored_and_their_calls_counted_by_role(recorded: Run) -> None:
    result = rundir.read_result(recorded.path)
    assert result is not None
    assert (result.status, result.generations, result.failures) == ("finished", GENERATIONS, {})
    # The script takes the first charge that the harness suggests.
    assert result.best_score == pytest.approx(0.70, abs=0.03)
    spend = read_spend(recorded.path / "gateway.sqlite")
    items = 800 + 913
    assert spend[Role.TARGET].calls == GENERATIONS * items
    assert spend[Role.META].calls >= 2
    assert spend[Role.FEEDBACK].calls >= 2 * (GENERATIONS - 1)  # decisions and edits
    assert sum(one.failed for one in spend.values()) == 0
    for role in Role:
        assert re.search(rf"^{role} +[\d,]+ +0 +0 ", recorded.output, re.MULTILINE), role


def test_hypothesis_and_edit_of_each_generation_are_kept(recorded: Run) -> None:
    records = rundir.records(recorded.path)
    for generation in range(1, GENERATIONS):
        candidate = records[f"{generation:04}/0/candidate"]
        assert candidate["proposal"]["hypothesis"] == "One more comment."
        assert candidate["proposal"]["source"] == recorded.agent
        assert records[f"{generation - 1:04}/decision"]["evidence"] == "history.md"
        folder = recorded.path / f"gen-{generation:03}" / "cand-0"
        assert "lines of history" in (folder / "harness.diff").read_text()
        assert "# Improve the harness" in (folder / "prompt.md").read_text()


@pytest.mark.parametrize("agent", ["claude", "pydantic_ai", OPENHANDS], indirect=True)
def test_a_secret_of_ours_is_in_no_file_and_no_environment_of_a_sandbox(
    agent: str, tmp_path: Path
) -> None:
    look = "env; cat /proc/[0-9]*/environ | tr '\\0' '\\n'"
    print_all = "__import__('os').system(\"(env; cat /proc/[0-9]*/environ) >&2 2>&1\")"
    spying = [
        {"when": {"text": "# Write the first harness", "turn": 0}, "bash": look},
        {"when": {"text": "# Write the first harness", "turn": 1},
         "bash": f"echo {shlex.quote(print_all)} >> harness/target_agent.py"},
    ]  # fmt: skip
    rules = read_rules(ROOT / "docs" / "rehearsal.yaml")
    done_rule = {"when": {"text": "# Write the first harness", "turn": 2}, "say": "Done."}
    with serving([*spying, done_rule, *rules]) as scripted:
        overrides = [
            *arguments(agent, find_task_dir("tasks/toy")), "task=toy", "target=embedded",
            "generations=2", "tracking=mlflow", "sandbox.limits.output_kib=4096",
        ]  # fmt: skip
        done = sia(tmp_path, overrides, url=scripted.url)
    assert done.returncode == 0, done.stdout + done.stderr
    # The vendor was shown the key, so it was in use all the time.
    headers = [seen.headers for seen in scripted.seen]
    assert all(CANARY in (h.get("x-api-key", "") + h.get("authorization", "")) for h in headers)
    # What the agent and the harness can see did come out.
    seen = [str(one.body) for one in scripted.seen]
    assert any("SIA_ATTEMPT" in text for text in seen)
    assert "SIA_ATTEMPT" in (tmp_path / "run/gen-000/cand-0/stderr.log").read_text()
    for secret in (CANARY, BYSTANDER):
        assert secret not in done.stdout + done.stderr
        assert not any(secret in text for text in seen)
        for path in tmp_path.rglob("*"):  # the run, and MLflow's database and files
            if path.is_file() and not path.is_symlink():
                assert secret.encode() not in path.read_bytes(), path


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace of its own needs root")
def test_a_replay_without_a_network_gives_the_same_records(
    recorded: Run, task_dir: Path, tmp_path: Path
) -> None:
    overrides = [
        *arguments(recorded.agent, task_dir), "gateway.mode=replay",
        f"gateway.recording={recorded.path}",
    ]  # fmt: skip
    alone = ["unshare", "--net", sys.executable, "-c", LOOPBACK_UP]
    done = sia(tmp_path, overrides, url="http://127.0.0.1:9", before=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    again = tmp_path / "run"
    assert rundir.records(again) == rundir.records(recorded.path)
    spend = read_spend(again / "gateway.sqlite")
    assert sum(one.calls for one in spend.values()) == 0
    before = read_spend(recorded.path / "gateway.sqlite")
    assert {role: one.replayed for role, one in spend.items()} == {
        role: one.calls for role, one in before.items()
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_runs_it_as_well(agent: str, task_dir: Path, open_folder: Path) -> None:
    # By way of a shell: setpriv itself would still open the program with the rights of root.
    become = [
        "setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups",
        "sh", "-c", 'exec "$0" "$@"',
    ]  # fmt: skip
    for python in {sys.executable, openhands_python() if agent == "openhands" else sys.executable}:
        probe = subprocess.run([*become, python, "-c", ""], capture_output=True, check=False)
        if probe.returncode != 0:
            pytest.skip(f"user {ORDINARY} may not run {python}")
    home = open_folder / agent
    home.mkdir()
    os.chown(home, ORDINARY, ORDINARY)
    with serving(read_rules(ROOT / "docs" / "rehearsal.yaml")) as scripted:
        before = [*become, sys.executable]
        done = sia(home, arguments(agent, task_dir), url=scripted.url, before=before)
    assert done.returncode == 0, done.stdout + done.stderr
    result = rundir.read_result(home / "run")
    assert result is not None
    assert (result.generations, result.failures) == (GENERATIONS, {})
