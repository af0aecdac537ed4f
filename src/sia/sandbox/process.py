"""The weakest sandbox: limits and a clean environment, for machines with nothing better."""

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from sia.errors import TargetError
from sia.sandbox.launch import PROGRAMS, environment, limits_argv, program_argv, trial
from sia.sandbox.protocol import Job, Launch


class Process:
    """Runs targets as ordinary processes of the same user.

    Args:
        instead_of: Why a stronger sandbox was not taken, for `protects`.
        programs: Folders at the end of the PATH, where they exist.
    """

    name = "process"
    shields_data = False
    host_runtime = True

    def __init__(self, *, instead_of: str = "", programs: Sequence[str] = PROGRAMS) -> None:
        self._instead_of = instead_of
        self._programs = tuple(programs)
        self._works = False
        self._lock = threading.Lock()

    @property
    def protects(self) -> str:
        """What it keeps out, and what it does not."""
        line = (
            "process: limits on memory, file size and time, a clean environment, a copy of the "
            "data; NOT protected: your files, the labels among them, your processes, the network"
        )
        if os.geteuid() == 0:
            line += ", the number of processes (you are root)"
        return line + (f". Stronger: {self._instead_of}" if self._instead_of else "")

    def check(self) -> None:
        """Runs a trivial target.

        Raises:
            TargetError: util-linux is missing or too old, or a limit cannot be set.
        """
        with self._lock:
            if self._works:
                return
            for program in ("prlimit", "setpriv"):
                if shutil.which(program) is None:
                    raise TargetError(
                        f"sandbox=process needs {program!r}, which is not installed here: "
                        "apt install util-linux"
                    )
            if reason := trial(self):
                raise TargetError(f"sandbox=process does not work here: {reason}")
            self._works = True

    def launch(self, job: Job) -> Launch:
        """The target's own command behind `setpriv` and `prlimit`, which become it."""
        processes = None
        if os.geteuid() != 0:  # the limit counts everything that the user runs; root has none
            processes = _own_threads() + job.limits.processes
        return Launch(
            argv=[
                "setpriv", "--pdeathsig", "KILL", "--no-new-privs", "--",
                *limits_argv(job.limits, processes=processes),
                *program_argv(
                    job, python=str(job.runtime.python), data=str(job.data),
                    code=str(job.code), work=str(job.work),
                ),
            ],
            env=environment(
                job, home=str(job.work), port=job.endpoint.port if job.endpoint else 0,
                policy=str(job.policy),
                programs=self._programs,
            ),
            cwd=job.work,
        )  # fmt: skip


def _own_threads() -> int:
    """Threads of this user's processes."""
    uid = os.getuid()
    count = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(entry / "task"))
        except OSError:  # it ended meanwhile
            continue
    return count
