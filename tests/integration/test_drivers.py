"""The drivers of agents: real SDKs in real sandboxes, against an endpoint that follows a script."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile.stage import SANDBOXES, why_not

from sia.errors import MetaBackendError
from sia.gateway.matching import canonical
from sia.gateway.scripted import Seen, serving
from sia.meta.agents import Agent, Claude, PydanticAI
from sia.records import Outcome
from sia.sandbox import Endpoint, Job, Limits
from sia.sandbox.execution import Cancel, Execution, execute, free_slot

SECRET = "sk-the-secret-of-the-parent"
MODEL = "claude-sonnet-4-5-20250929"
AGENTS: dict[str, type[Agent]] = {"claude": Claude, "pydantic_ai": PydanticAI}
TOOLS = {
    "claude": ["Bash", "Edit", "Glob", "Grep", "Read", "Write"],
    "pydantic_ai": ["edit_file", "list_files", "read_file", "run", "search", "write_file"],
}
WRITE = {"claude": "Write", "pydantic_ai": "write_file"}
LIMITS = Limits(memory_mib=4096, processes=64)
REASONS = {kind: why_not(kind) for kind in SANDBOXES}
A_FILE = {"path": "harness/new.py", "text": "x = 1\n"}
USER = 1000
WRITES = {"write": A_FILE, "usage": {"output": 40}}


@dataclass(frozen=True, kw_only=True)
class Session:
    end: str
    detail: str
    turns: int
    execution: Execution
    seen: Sequence[Seen]
    work: Path

    @property
    def answers(self) -> str:
        """What the tools told the model."""
        return json.dumps(self.seen[-1].body["messages"], ensure_ascii=False)


Run = Callable[..., Session]


@pytest.fixture(params=sorted(AGENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(name: str, tmp_path: Path) -> Run:
    """Runs a session: a list of rules, and what differs from the usual job."""
    try:
        runtime = AGENTS[name](model=MODEL).runtime()
    except MetaBackendError as error:
        pytest.skip(str(error))

    def session(
        rules: Sequence[dict[str, Any]], *, kind: str = "bwrap", place: str = "s", **changes: Any
    ) -> Session:
        if REASONS[kind]:
            pytest.skip(REASONS[kind])
        root = tmp_path / place
        for folder in ("data", "code", "work/harness"):
            (root / folder).mkdir(parents=True)
        (root / "data" / "train.csv").write_text("id,answer\n0,b\n")
        (root / "work" / "harness" / "old.py").write_text("y = 1\n")
        shutil.copy(AGENTS[name](model=MODEL).program, root / "code" / "driver.py")
        job = {
            "prompt": "Improve the harness.", "system": "You improve harnesses.", "model": MODEL,
            "max_turns": 20, "max_tokens": None, **changes,
        }  # fmt: skip
        (root / "code" / "job.json").write_text(json.dumps(job))
        sandbox = SANDBOXES[kind]()
        sandbox.check()
        cancel = Cancel()
        with free_slot() as slot, serving(rules, uds=root / "gateway.sock") as scripted:
            started = Job(
                data=root / "data",
                code=root / "code",
                work=root / "work",
                runtime=runtime,
                limits=LIMITS,
                slot=slot,
                marker=f"driver-{os.getpid()}-{time.monotonic_ns()}",
                entry="driver.py",
                endpoint=Endpoint(
                    socket=root / "gateway.sock",
                    port=int(scripted.url.rsplit(":", 1)[1]),
                    key="throw-away",
                    model=MODEL,
                ),
            )
            launch = sandbox.launch(started)
            if launch.owner is not None:
                for path in (root / "work").rglob("*"):
                    os.chown(path, launch.owner, launch.owner)
            execution = execute(launch, started, deadline_s=90, cancel=cancel)
        cancel.close()
        stdout, stderr = execution.stdout.text(), execution.stderr.text()
        assert execution.outcome is Outcome.OK, f"{execution.reason}\n{stdout}\n{stderr}"
        ending = json.loads(stdout.splitlines()[-1])
        assert sorted(ending) == ["detail", "end", "turns"]
        assert len(ending["detail"]) <= 500
        assert "\n" not in ending["detail"]
        return Session(**ending, execution=execution, seen=scripted.seen, work=root / "work")

    return session


def offered(seen: Seen) -> list[str]:
    return sorted(tool.get("name") or tool["function"]["name"] for tool in seen.body["tools"])


def call(turn: int, name: str, **arguments: Any) -> dict[str, Any]:
    return {"when": {"turn": turn}, "tool": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("kind", SANDBOXES)
def test_agent_edits_its_workspace_and_ends(run: Run, name: str, kind: str) -> None:
    session = run(
        [
            {"when": {"turn": 0}, **WRITES},
            {"when": {"turn": 1}, "bash": "cat harness/new.py >> harness/old.py; pwd"},
            {"say": "The harness is\nbetter."},
        ],
        kind=kind,
    )
    assert (session.end, session.detail, session.turns) == ("done", "The harness is better.", 3)
    files = {path.name: path.read_text() for path in session.work.rglob("*") if path.is_file()}
    assert files == {"new.py": "x = 1\n", "old.py": "y = 1\nx = 1\n"}
    # Nothing else was asked: no title, no counting of tokens, no greeting.
    assert len(session.seen) == 3
    for seen in session.seen:
        assert offered(seen) == TOOLS[name]
        assert seen.body["model"] == MODEL
        text = json.dumps(seen.body)
        assert "You improve harnesses." in text
        assert "Improve the harness." in text


def test_turn_limit_is_an_end_and_files_stay(run: Run) -> None:
    session = run([WRITES], max_turns=2)
    assert (session.end, session.detail) == ("turns", "max_turns=2 reached")
    assert session.turns == len(session.seen) == 2
    assert (session.work / "harness" / "new.py").read_text() == "x = 1\n"


def test_token_limit_is_an_end_after_the_tools_of_the_last_answer(run: Run) -> None:
    session = run(
        [{"when": {"turn": 0}, "bash": "true", "usage": {"output": 40}}, WRITES], max_tokens=80
    )
    assert (session.end, session.detail) == ("tokens", "max_tokens=80 reached: 80 generated")
    assert session.turns == len(session.seen) == 2
    assert (session.work / "harness" / "new.py").read_text() == "x = 1\n"


@pytest.mark.parametrize(
    "fault",
    [
        {"fault": "status", "status": 402},
        {"fault": "status", "status": 401},
        {"fault": "status", "status": 500},
        {"fault": "empty_choices", "say": "x"},
        {"fault": "truncated", "say": "word " * 50},
        {"fault": "invalid_json"},
    ],
    ids=lambda fault: str(fault.get("status", fault["fault"])),
)
def test_failing_provider_is_an_end_and_is_asked_once(run: Run, fault: dict[str, Any]) -> None:
    session = run([{"when": {"turn": 0}, **WRITES}, fault])
    assert session.end == "error"
    assert str(fault.get("status", "")) in session.detail
    assert session.detail
    assert len(session.seen) == 2
    assert (session.work / "harness" / "new.py").exists()


def test_empty_last_answer_is_a_good_end(run: Run) -> None:
    session = run([{"when": {"turn": 0}, **WRITES}, {"say": ""}], max_turns=5)
    assert (session.end, session.detail) == ("done", "")


def test_half_a_character_does_not_crash_the_driver(run: Run) -> None:
    session = run([{"when": {"turn": 0}, "fault": "surrogate", "bash": "true"}, {"say": "end"}])
    assert session.end in ("done", "error")


def test_bad_arguments_and_unknown_tools_are_told_to_the_model(run: Run, name: str) -> None:
    session = run(
        [call(0, WRITE[name], nonsense=1), call(1, "WebFetch", url="http://x"), {"say": "end"}]
    )
    assert (session.end, session.turns) == ("done", 3)
    assert "nonsense" in session.answers
    assert re.search("No such tool|Unknown tool", session.answers)


def test_path_outside_is_out_of_reach(run: Run, name: str, tmp_path: Path) -> None:
    outside = tmp_path / "s" / "outside.txt"
    paths = [str(outside), "/sia/outside.txt", "../data/new.csv"]
    session = run(
        [
            *({"when": {"turn": turn}, "write": {"path": path, "text": "x"}}
              for turn, path in enumerate(paths)),
            {"say": "end"},
        ]
    )  # fmt: skip
    assert session.end == "done"
    assert not outside.exists()
    assert [path.name for path in (tmp_path / "s" / "data").iterdir()] == ["train.csv"]
    # What is /tmp to Claude is a folder of the sandbox's own.
    refusal, times = {"claude": ("EROFS", 2), "pydantic_ai": ("lies outside of /sia/work", 3)}[name]
    assert session.answers.count(refusal) == times


def test_data_can_be_read(run: Run, name: str) -> None:
    arguments = {"claude": {"file_path": "/sia/data/train.csv"}}.get(
        name, {"path": "/sia/data/train.csv"}
    )
    tool = {"claude": "Read", "pydantic_ai": "read_file"}[name]
    session = run([call(0, tool, **arguments), {"say": "end"}])
    assert "id,answer" in session.answers


def test_command_that_hangs_is_killed_with_what_it_started(run: Run, name: str) -> None:
    command = "(sleep 300; true) & sleep 300"
    first = {
        "claude": call(0, "Bash", command=command, timeout=1000),
        "pydantic_ai": call(0, "run", command=command, timeout_s=1),
    }[name]
    look = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 30[0]' || true"
    session = run([first, {"when": {"turn": 1}, "bash": look}, {"say": "end"}])
    assert session.end == "done"
    assert re.search("timed out after 1s|killed after 1 s", session.answers)
    last = json.dumps(session.seen[-1].body["messages"][-1])
    assert re.search(r'"0(\\n\[exit code 0\])?"', last)


def test_nothing_of_our_environment_is_seen(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("CLAUDE_CODE_EXTRA_BODY", '{"temperature": 0.123}')
    look = "cat /proc/[0-9]*/environ | tr '\\0' '\\n'; echo END"
    session = run([{"when": {"turn": 0}, "bash": look}, {"say": "end"}])
    asked = json.dumps([[seen.body, seen.headers] for seen in session.seen])
    assert "OPENAI_API_KEY=throw-away" in asked
    assert "END" in asked
    for ours in (SECRET, "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_EXTRA_BODY", "0.123"):
        assert ours not in asked
    inside = set(re.findall(r"(?:\\n|\")([A-Z][A-Z0-9_]*)=", session.answers))
    assert "SIA_MODEL" in inside
    assert not [variable for variable in inside if variable in os.environ and variable not in (
        "HOME", "LANG", "LOGNAME", "MKL_NUM_THREADS", "OLDPWD", "OMP_NUM_THREADS",
        "OPENAI_API_KEY", "OPENBLAS_NUM_THREADS", "PATH", "PWD", "PYTHONDONTWRITEBYTECODE",
        "PYTHONHASHSEED", "PYTHONUNBUFFERED", "SHELL", "SHLVL", "TMPDIR", "USER", "_",
    ) and not variable.startswith(("CLAUDE", "DISABLE_"))]  # fmt: skip


def test_requests_do_not_depend_on_place_and_time(run: Run, tmp_path: Path) -> None:
    rules = [
        {"when": {"turn": 0}, **WRITES},
        {"when": {"turn": 1}, "bash": "seq 1 50000"},  # more than a model is shown
        {"when": {"turn": 2}, "bash": "ls -la . && ls -l --full-time harness"},
        {"when": {"turn": 3}, "bash": "echo no >&2; exit 3"},
        {"say": "end"},
    ]
    one = run(rules, place="one")
    two = run(rules, place="a/longer/path/two")
    assert one.end == two.end == "done"
    assert len(one.seen) == len(two.seen) == 5
    for ours, theirs in zip(one.seen, two.seen, strict=True):
        assert canonical(ours.body) == canonical(theirs.body)
        assert ours.body.get("metadata") == theirs.body.get("metadata")
        assert str(tmp_path) not in json.dumps(ours.body)


@pytest.mark.parametrize("name", ["pydantic_ai"])
def test_tool_that_never_works_ends_the_session(run: Run) -> None:
    session = run([{"tool": {"name": "read_file", "arguments": {"path": "/etc/passwd"}}}])
    assert session.end == "error"
    assert "read_file" in session.detail
    assert session.turns == 11


@pytest.fixture
def home() -> Iterator[Path]:
    """Of an ordinary user; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, USER, USER)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="you are an ordinary user: so are the other tests")
def test_ordinary_user_runs_an_agent(name: str, home: Path) -> None:
    """This same module as somebody else."""
    if REASONS["bwrap"]:
        pytest.skip(REASONS["bwrap"])
    # Through a shell: what setpriv starts itself is still opened with root's rights.
    somebody = [
        "setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--",
        "sh", "-c", 'exec "$@"', "sh",
    ]  # fmt: skip
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}
    check = [*somebody, sys.executable, "-c", f"import pytest, ssl; open({__file__!r})"]
    tried = subprocess.run(check, env=env, capture_output=True, text=True, cwd="/", check=False)
    if tried.returncode != 0:
        pytest.skip(
            f"an ordinary user cannot read {sys.executable}, its packages or this file: "
            f"{tried.stderr.strip().splitlines()[-1]}"
        )
    done = subprocess.run(
        [
            *somebody, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            f"--basetemp={home}/tmp", "--rootdir", str(Path(__file__).parents[2]),
            f"{__file__}::test_agent_edits_its_workspace_and_ends[{name}-bwrap]",
        ],
        env=env, capture_output=True, text=True, timeout=240, cwd=home, check=False,
    )  # fmt: skip
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["pydantic_ai"])
def test_commands_answers_are_bounded_and_leave_nothing_running(run: Run) -> None:
    look = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 20[0]' || true"
    session = run(
        [
            call(0, "run", command="seq 1 1000000"),
            call(1, "run", command="sleep 200 & echo quick; exit 3"),
            call(2, "run", command=look),
            {"say": "end"},
        ]
    )
    long, quick, left = (
        message["content"]
        for message in session.seen[-1].body["messages"]
        if message["role"] == "tool"
    )
    assert len(long) < 20_100
    assert re.search(
        r"\n\[6868896 bytes were cut\]\n.*\n1000000\n\[exit code 0\]$", long, re.DOTALL
    )
    assert quick == "quick\n[exit code 3]"
    assert left == "0\n[exit code 0]"
