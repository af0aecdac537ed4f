"""One session of an agent: its driver in the sandbox, its workspace, and how it ended.

    out/code       driver.py, job.json, enter.py       read-only inside
    out/work       a copy of the workspace             the agent's working folder
    out/*.log, usage.json                              what is left of it

What the agent leaves may be booby-trapped: it is taken back by `sia.sandbox.collect`.
"""

import json
import math
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from sia.errors import BudgetExceeded
from sia.gateway.protocol import Gateway, Role
from sia.meta.agents import Agent
from sia.records import Outcome
from sia.sandbox.collect import collect_tree
from sia.sandbox.environments import current_runtime
from sia.sandbox.execution import Cancel, Cancels, Execution, execute, free_slot
from sia.sandbox.protocol import Job, Launch, Limits, Runtime, Sandbox
from sia.sandbox.staging import copy_read_only, hand_over, remove, write_logs

ENTER = Path(__file__).with_name("enter.py")
DATA_LINK = "data"  # in the workspace; made by enter.py
PYTHON = "python"  # in the workspace: the interpreter that runs targets
MAX_DETAIL = 500  # characters
MAX_FILES, MAX_MIB = 2_000, 64
MAX_OTHER_FILES, MAX_OTHER_MIB = 500, 8
# Left by interpreters and tools; nobody wrote them.
CACHES = ("__pycache__", "node_modules")


@dataclass(frozen=True, kw_only=True)
class SessionEnd:
    """How a session ended.

    Attributes:
        end: `done`, `turns`, `tokens` or `error`, as the driver says; `timeout` or `disk` where a
            limit of the sandbox ended it.
        turns: Answers of the model; 0 where the driver could not say.
        answered: Calls that the gateway has answered, whatever the driver says.
        refused: What was not taken back of the workspace: path -> why.
    """

    end: str
    detail: str
    turns: int
    answered: int = 0
    refused: dict[str, str] = field(default_factory=dict)


class Sessions:
    """Sessions of one agent. Safe to use from several threads.

    Args:
        agent: Names the driver, its interpreter and the limits.
        sandbox: The same that confines targets.
        gateway: The way to the agent's model.
        data: The public side of the task.
        limits: Of a session; None: the agent's own. Those of targets are too small for an agent.
        left_s: Seconds that the run has left; a session that they cut short counts for nothing.
    """

    def __init__(
        self,
        *,
        agent: Agent,
        sandbox: Sandbox,
        gateway: Gateway,
        data: Path,
        limits: Limits | None = None,
        left_s: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.agent = agent
        self._sandbox = sandbox
        self._gateway = gateway
        self._data = data.resolve()
        self._limits = limits or agent.limits
        self._left_s = left_s
        self._cancels = Cancels()

    def run(
        self,
        role: Role,
        scope: str,
        *,
        prompt: str,
        system: str,
        workspace: Path,
        out: Path,
        wanted: Sequence[str],
        max_turns: int | None = None,
    ) -> SessionEnd:
        """One session, from a fresh process until nothing of it is alive.

        Args:
            role: Who asks.
            scope: Names the step to the gateway.
            prompt: What is wanted. Says `data` and names below the workspace; no other path.
            system: Who the agent is.
            workspace: What the agent finds; replaced by what it leaves. Names that begin with a
                dot and caches are dropped.
            out: A new folder for the logs of the session.
            wanted: Files and folders of the workspace that are taken back first, and up to
                `MAX_FILES` and `MAX_MIB`; the rest up to `MAX_OTHER_FILES` and `MAX_OTHER_MIB`.
            max_turns: Fewer than the agent's own; None for those.

        Raises:
            BudgetExceeded: A call was refused for lack of budget, or the run's time is over.
            MetaBackendError: The agent's interpreter lacks its SDK.
            TargetError: The sandbox does not work here.
            KeyboardInterrupt: `cancel` was called.
        """
        turns = max_turns or self.agent.max_turns
        with self._cancels.flag() as cancel:
            return self._run(role, scope, prompt, system, workspace, out, wanted, turns, cancel)

    def cancel(self) -> None:
        """Makes every `run`, in progress or to come, kill its processes and raise."""
        self._cancels.set()

    def _run(
        self,
        role: Role,
        scope: str,
        prompt: str,
        system: str,
        workspace: Path,
        out: Path,
        wanted: Sequence[str],
        max_turns: int,
        cancel: Cancel,
    ) -> SessionEnd:
        self._sandbox.check()
        runtime = _with_ours(self.agent.runtime())
        out = out.resolve()
        remove(out)
        out.mkdir(parents=True)
        code = self._stage_code(out / "code", prompt, system, max_turns)
        work = out / "work"
        shutil.copytree(workspace, work, copy_function=shutil.copyfile)
        python = sys.executable if self._sandbox.host_runtime else "python"
        (work / PYTHON).write_text(
            f'#!/bin/sh\nexec {shlex.quote(python)} "$@"\n', encoding="utf-8"
        )
        data = self._data
        if not self._sandbox.shields_data:
            data = copy_read_only(data, out / "data", follow_links=True)
        # Opened now: later its name may lead somewhere else.
        work_fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with free_slot() as slot, self._gateway.lease(role, scope) as lease:
                job = Job(
                    data=data,
                    code=code,
                    work=work,
                    runtime=runtime,
                    limits=self._limits,
                    slot=slot,
                    marker=secrets.token_hex(8),
                    entry=ENTER.name,
                    endpoint=lease.endpoint,
                )
                launch = self._sandbox.launch(job)
                hand_over(work, launch.owner, executable=work / PYTHON)
                deadline_s = max(0.1, min(self.agent.session_s, self._left_s()))
                execution = _execute(launch, job, deadline_s, cancel)
                refused, answered = lease.refused, lease.answered
            end = _end(execution)
            write_logs(
                out,
                stdout=execution.stdout.text(),
                stderr=execution.stderr.text(),
                usage={
                    **execution.usage,
                    "sandbox": self._sandbox.name,
                    "end": end.end,
                    "turns": end.turns,
                },
            )
            if refused:
                raise BudgetExceeded(refused)
            if execution.outcome is Outcome.TIMEOUT and deadline_s < self.agent.session_s:
                raise BudgetExceeded("budget.wall_s is used up")
            remove(workspace)
            return replace(end, answered=answered, refused=_take_back(work_fd, workspace, wanted))
        finally:
            os.close(work_fd)
            for folder in (work, out / "code", out / "data"):
                remove(folder)

    def _stage_code(self, folder: Path, prompt: str, system: str, max_turns: int) -> Path:
        folder.mkdir()
        job = {
            "prompt": prompt,
            "system": system,
            "model": self.agent.model,
            "max_turns": max_turns,
            "max_tokens": self.agent.max_tokens,
        }
        (folder / "job.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
        # Not under its own name: a program must not hide the package that it imports.
        shutil.copyfile(self.agent.program, folder / "driver.py")
        shutil.copyfile(ENTER, folder / ENTER.name)
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o755)
        return folder


def _with_ours(runtime: Runtime) -> Runtime:
    """The agent's interpreter, beside which ours can be read: it is the one that runs targets."""
    ours = current_runtime().roots
    return Runtime(python=runtime.python, roots=tuple(dict.fromkeys((*runtime.roots, *ours))))


def _execute(launch: Launch, job: Job, deadline_s: float, cancel: Cancel) -> Execution:
    """`execute` in a thread of its own: an interrupt of the main thread cannot tear it apart."""
    with ThreadPoolExecutor(1, thread_name_prefix="session") as pool:
        future = pool.submit(execute, launch, job, deadline_s=deadline_s, cancel=cancel)
        try:
            return future.result()
        except BaseException:  # and leave when everything in the sandbox is dead
            cancel.set()
            raise


def _end(execution: Execution) -> SessionEnd:
    """What the driver said at last, or what became of it."""
    limits = {Outcome.TIMEOUT: "timeout", Outcome.DISK_LIMIT: "disk"}
    if execution.outcome in limits:
        return SessionEnd(end=limits[execution.outcome], detail=execution.reason, turns=0)
    if execution.outcome is not Outcome.OK:
        return SessionEnd(end="error", detail=execution.reason, turns=0)
    stdout = execution.stdout
    lines = (stdout.head + stdout.tail).decode("utf-8", "replace").strip().splitlines()
    try:
        said = msgspec.json.decode(lines[-1] if lines else "", type=_Said)
    except (msgspec.MsgspecError, UnicodeError):
        last = execution.stderr.last_line()
        detail = "the driver did not say how the session ended" + (f": {last}" if last else "")
        return SessionEnd(end="error", detail=detail, turns=0)
    return SessionEnd(
        end=said.end,
        detail="".join(c if c.isprintable() else " " for c in said.detail)[:MAX_DETAIL],
        turns=said.turns,
    )


class _Said(msgspec.Struct):
    end: Literal["done", "turns", "tokens", "error"]
    detail: str = ""
    turns: int = 0


def _take_back(work_fd: int, workspace: Path, wanted: Sequence[str]) -> dict[str, str]:
    """Collects what is wanted, then the rest."""

    def is_wanted(path: str) -> bool:
        return any(path == name or path.startswith(f"{name}/") for name in wanted)

    first = collect_tree(
        work_fd,
        workspace,
        skip=lambda path: skipped(path) or not is_wanted(path),
        max_files=MAX_FILES,
        max_mib=MAX_MIB,
    )
    rest = collect_tree(
        work_fd,
        workspace,
        skip=lambda path: skipped(path) or is_wanted(path),
        max_files=MAX_OTHER_FILES,
        max_mib=MAX_OTHER_MIB,
    )
    return {**first, **rest}


def skipped(path: str) -> bool:
    """What is never taken out of a workspace: given by us, hidden, or a cache."""
    last = path.rpartition("/")[2]
    return path in (DATA_LINK, PYTHON) or last.startswith(".") or last in CACHES
