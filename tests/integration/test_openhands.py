"""OpenHands, the real one, against an endpoint that follows a script, in real sandboxes."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile.stage import SANDBOXES, why_not

from openhands_interpreter import openhands_python
from sia.errors import MetaBackendError
from sia.gateway.scripted import Scripted, serving
from sia.meta.agents import OpenHands
from sia.records import Outcome
from sia.sandbox import Endpoint, Job, Limits, Sandbox
from sia.sandbox.execution import Cancel, execute

KEY = "sia-throw-away"
LIMITS = Limits(memory_mib=1024, processes=64, output_kib=64)


@dataclass(frozen=True)
class Session:
    """How a session of the agent went."""

    ending: dict[str, Any]
    work: Path
    requests: list[dict[str, Any]]


def session(
    root: Path,
    rules: list[dict[str, Any]],
    *,
    sandbox: Sandbox | None = None,
    **job: object,
) -> Session:
    """One session, in bwrap unless told otherwise, with the agent's own driver and interpreter."""
    agent = OpenHands(model="m-1", python=openhands_python())
    for name in ("data", "code", "work"):
        (root / name).mkdir(parents=True)
    shutil.copy(agent.program, root / "code")
    asked = {"prompt": "Do it.", "system": "You are the Meta-Agent.", "model": "m-1"}
    limited = {"max_turns": 10, "max_tokens": None}
    (root / "code/job.json").write_text(json.dumps(asked | limited | job))
    if sandbox is None:
        sandbox = sandbox_or_skip("bwrap")
    with serving(rules, uds=root / "endpoint.sock") as server:
        work = Job(
            data=root / "data",
            code=root / "code",
            work=root / "work",
            runtime=agent.runtime(),
            limits=LIMITS,
            slot=700,
            marker=f"test-{root.name}",
            entry=agent.program.name,
            endpoint=endpoint(root, server),
        )
        cancel = Cancel()
        done = execute(sandbox.launch(work), work, deadline_s=120, cancel=cancel)
        cancel.close()
    assert done.outcome is Outcome.OK, (done.reason, done.stderr.text())
    return Session(
        ending=json.loads(done.stdout.text().splitlines()[-1]),
        work=root / "work",
        requests=[seen.body for seen in server.seen],
    )


def sandbox_or_skip(kind: str) -> Sandbox:
    if reason := why_not(kind):
        pytest.skip(reason)
    sandbox: Sandbox = SANDBOXES[kind]()
    sandbox.check()
    return sandbox


def endpoint(root: Path, server: Scripted) -> Endpoint:
    port = int(server.url.rpartition(":")[2])
    return Endpoint(socket=root / "endpoint.sock", port=port, key=KEY, model="m-1")


def finish(turn: int) -> dict[str, Any]:
    return {
        "when": {"turn": turn},
        "tool": {"name": "finish", "arguments": {"message": "It is done."}},
    }


def write(path: str = "/sia/work/target_agent.py") -> dict[str, Any]:
    return {"when": {"turn": 0}, "write": {"path": path, "text": "print('hello')\n"}}


def last_texts(request: dict[str, Any]) -> str:
    return json.dumps(request["messages"][-1]["content"])


@pytest.mark.parametrize("kind", ["bwrap", "bwrap-userns", "process"])
def test_the_agent_writes_a_file_runs_it_and_is_done(tmp_path: Path, kind: str) -> None:
    sandbox = sandbox_or_skip(kind)
    work = str(tmp_path / "work") if kind == "process" else "/sia/work"
    rules = [
        write(f"{work}/target_agent.py"),
        {"when": {"turn": 1}, "bash": "python target_agent.py && id -u"},
        finish(2),
    ]
    done = session(tmp_path, rules, sandbox=sandbox)
    assert done.ending == {"end": "done", "detail": "", "turns": 3}
    assert (done.work / "target_agent.py").read_text() == "print('hello')\n"
    said = last_texts(done.requests[2])
    uid = os.getuid() if kind == "process" else 64800
    assert f"hello\\n{uid}\\n" in said
    assert f"[Current working directory: {work}]" in said
    # Nothing of the SDK's own lies in the workspace.
    assert [path.name for path in done.work.iterdir()] == ["target_agent.py"]


def test_the_same_session_elsewhere_sends_the_same_requests(tmp_path: Path) -> None:
    rules = [write(), {"when": {"turn": 1}, "bash": "cat *.py; ls -a; env | sort"}, finish(2)]
    first, second = (session(tmp_path / name, rules).requests for name in ("one", "two"))
    assert len(first) == 3
    # The variable by which strays are found is the run's, not the agent's.
    masked = json.dumps(second).replace("test-two", "test-one")
    assert json.loads(masked) == first
    tools = [tool["function"]["name"] for tool in first[0]["tools"]]
    assert tools == ["terminal", "file_editor", "finish"]
    system, prompt = first[0]["messages"]
    assert system["content"] == [{"type": "text", "text": "You are the Meta-Agent."}]
    assert prompt["content"] == [{"type": "text", "text": "Do it."}]


@pytest.mark.parametrize(
    ("limit", "turns", "detail"),
    [
        ({"max_turns": 2}, 2, "max_turns=2 reached"),
        ({"max_tokens": 70}, 3, "max_tokens=70 reached"),
        ({}, 5, "stuck: it repeated itself"),
    ],
)
def test_a_limit_is_an_end_and_what_was_written_stays(
    tmp_path: Path, limit: dict[str, int], turns: int, detail: str
) -> None:
    usage = {"input": 5, "output": 30}
    rules = [write() | {"usage": usage}, {"bash": "true", "usage": usage}]
    done = session(tmp_path, rules, **limit)
    end = "tokens" if "max_tokens" in limit else "turns"
    assert done.ending == {"end": end, "detail": detail, "turns": turns}
    assert len(done.requests) == turns
    assert (done.work / "target_agent.py").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"fault": "status", "status": 402}, "APIError"),
        ({"fault": "status", "status": 500}, "InternalServerError"),
        ({"fault": "empty_choices"}, "LLMNoResponseError"),
    ],
)
def test_a_failing_provider_is_asked_once_and_ends_the_session(
    tmp_path: Path, fault: dict[str, Any], said: str
) -> None:
    done = session(tmp_path, [write(), fault])
    assert done.ending["end"] == "error"
    assert said in done.ending["detail"]
    assert len(done.requests) == 2
    assert (done.work / "target_agent.py").exists()


def test_an_interpreter_without_openhands_is_refused_with_the_command_that_helps() -> None:
    agent = OpenHands(model="m-1", python=sys.executable)
    with pytest.raises(MetaBackendError, match=r"no package 'openhands\.sdk'.*scripts/openhands"):
        agent.runtime()
