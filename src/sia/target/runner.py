"""Runs one candidate in a sandbox and takes what it has made out of its working folder."""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from sia.errors import BudgetExceeded, TargetError
from sia.gateway.protocol import Gateway, Lease, Role
from sia.records import Attempt, Outcome
from sia.rundir import write_error
from sia.sandbox.collect import (
    TRAJECTORIES,
    TRAJECTORY,
    Refused,
    collect_any,
    collect_submission,
    collect_trajectories,
    collect_tree,
)
from sia.sandbox.environments import BuildFailed, Environments, current_runtime, holds
from sia.sandbox.execution import Cancel, Cancels, Execution, execute, free_slot
from sia.sandbox.protocol import Job, Limits, Sandbox
from sia.sandbox.staging import copy_read_only, remove, write_logs
from sia.tasks.task import Task

MAX_TREE_FILES = 5_000  # of a submission that is the whole folder
MIN_FREE_BYTES = 2**18  # an attempt leaves more than that
# All that a run leaves in `out`, and what an earlier one that was killed may have left there.
LEAVINGS = (
    "work", "inputs", "submission", "agent_execution", "stdout.log", "stderr.log", "usage.json",
)  # fmt: skip


class HarnessRunner:
    """The Target that executes harnesses as processes of this machine.

    Args:
        sandbox: Confines every attempt.
        environments: Gives each harness its interpreter.
        task: Says what a submission is made of.
        limits: Of every attempt.
        data: What targets see; None means the public side of the task.
        gateway: Where targets find a model; None: they have none.
    """

    def __init__(
        self,
        *,
        sandbox: Sandbox,
        environments: Environments,
        task: Task,
        limits: Limits,
        data: Path | None = None,
        gateway: Gateway | None = None,
    ) -> None:
        self._sandbox = sandbox
        self._environments = environments
        self._submission = task.facts.submission
        self._sources = task.source_packages
        self._limits = limits
        self._data = (data or task.public_dir).resolve()
        self._gateway = gateway
        self._data_checked = False
        self._cancels = Cancels()

    def check(self) -> None:
        """Whether attempts can be started at all. `run` asks too; cheap after the first success.

        Raises:
            TargetError: The sandbox does not work here, or would hide part of the data.
        """
        self._sandbox.check()
        if self._data_checked:
            return
        if self._sandbox.shields_data:
            _refuse_outward_links(self._data)
        if self._sandbox.host_runtime and (name := holds(current_runtime(), self._sources)):
            raise TargetError(
                f"The package {name!r} is installed here, where every target can read it, and it "
                f"holds the answers of the task. Remove it: pip uninstall {name}"
            )
        self._data_checked = True

    def run(
        self,
        candidate: str,
        *,
        harness: Path,
        out: Path,
        deadline_s: float,
        policy: Path | None = None,
    ) -> Attempt:
        """Executes one candidate; the contract is that of `sia.target.protocol.Target`."""
        with self._cancels.flag() as cancel:
            self.check()
            attempt = self._run(
                candidate, harness.resolve(), out.resolve(), deadline_s, cancel, policy
            )
            if attempt.outcome is not Outcome.OK:
                _refuse_full_disk(out)
            return attempt

    def cancel(self) -> None:
        """Makes every `run`, in progress or to come, raise KeyboardInterrupt."""
        self._cancels.set()

    def _run(
        self,
        candidate: str,
        harness: Path,
        out: Path,
        deadline_s: float,
        cancel: Cancel,
        policy: Path | None,
    ) -> Attempt:
        out.mkdir(parents=True, exist_ok=True)
        for name in LEAVINGS:
            remove(out / name)
        runtime = current_runtime()
        if self._sandbox.host_runtime:
            try:
                runtime = self._environments.runtime(harness, cancelled=cancel.is_set)
                if name := holds(runtime, self._sources):
                    raise BuildFailed(f"requirements.txt brings {name!r}, which holds the answers")
            except BuildFailed as failure:
                write_logs(out, stdout="", stderr=failure.log, usage={})
                return Attempt(candidate=candidate, outcome=Outcome.CRASHED, reason=str(failure))
        work = out / "work"
        work.mkdir(mode=0o700)
        # Opened now: later its name may lead somewhere else.
        work_fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            data = self._data
            if not self._sandbox.shields_data:
                data = copy_read_only(data, out / "inputs" / "data", follow_links=True)
                harness = copy_read_only(harness, out / "inputs" / "harness", follow_links=False)
            with free_slot() as slot, self._lease(candidate, policy) as lease:
                job = Job(
                    data=data,
                    code=harness,
                    work=work,
                    runtime=runtime,
                    limits=self._limits,
                    slot=slot,
                    marker=secrets.token_hex(8),
                    endpoint=lease.endpoint if lease else None,
                    policy=policy.resolve() if policy else None,
                )
                launch = self._sandbox.launch(job)
                execution = execute(launch, job, deadline_s=deadline_s, cancel=cancel)
                refused = lease.refused if lease else ""
            write_logs(
                out,
                stdout=execution.stdout.text(),
                stderr=execution.stderr.text(),
                usage={**execution.usage, "sandbox": self._sandbox.name},
            )
            if refused:
                raise BudgetExceeded(refused)
            return self._collect(candidate, execution, work_fd, out)
        finally:
            os.close(work_fd)
            remove(work)
            remove(out / "inputs")

    def _lease(
        self, candidate: str, policy: Path | None
    ) -> contextlib.AbstractContextManager[Lease | None]:
        if self._gateway is None:
            return contextlib.nullcontext()
        return self._gateway.lease(Role.TARGET, f"{candidate}/target", policy=policy)

    def _collect(self, candidate: str, execution: Execution, work_fd: int, out: Path) -> Attempt:
        """Takes trajectories always, and the submission of a target that ended well."""
        trajectories = collect_trajectories(work_fd, out / "agent_execution")
        outcome, reason = execution.outcome, execution.reason
        if outcome is Outcome.OK:
            wanted, place = self._submission, out / "submission"
            try:
                if wanted.tree:
                    collect_tree(
                        work_fd, place, skip=_is_trajectory, max_files=MAX_TREE_FILES,
                        max_mib=wanted.max_mib,
                    )  # fmt: skip
                elif wanted.any_of:
                    collect_any(work_fd, wanted.any_of, max_mib=wanted.max_mib, out=place)
                else:
                    collect_submission(work_fd, wanted.files, max_mib=wanted.max_mib, out=place)
            except Refused as refused:
                outcome, reason = Outcome.NO_SUBMISSION, str(refused)
                remove(out / "submission")
        return Attempt(
            candidate=candidate,
            outcome=outcome,
            reason=reason,
            exit_code=execution.exit_code,
            trajectories=trajectories,
        )


def _is_trajectory(path: str) -> bool:
    return path.partition("/")[0] in (TRAJECTORY, TRAJECTORIES, "__pycache__")


def _refuse_full_disk(out: Path) -> None:
    """A failure on a disk without room says nothing about the candidate, and is not recorded.

    What the target itself wrote has been removed by now.
    """
    if shutil.disk_usage(out).free < MIN_FREE_BYTES:
        raise write_error(out, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _refuse_outward_links(data: Path) -> None:
    """Finds links that would lead nowhere in a sandbox.

    Raises:
        TargetError: There is one.
    """
    for folder, folders, files in os.walk(data):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(data):
                raise TargetError(
                    f"{path} is a link to {os.readlink(path)!r}, which targets cannot see. Make it "
                    "a file: dvc config cache.type reflink,copy && dvc checkout --relink"
                )
