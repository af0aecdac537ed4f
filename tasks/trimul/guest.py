"""A sandboxed process that calls one `custom_kernel`, seen from outside: asked, timed, frozen.

Everything that decides lies on this side. What a guest says is read with care and never believed
for a time or a result.
"""

import json
import mmap
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sia.sandbox.environments import current_runtime
from sia.sandbox.execution import free_slot, kill_strays, marked
from sia.sandbox.launch import start, with_gpu
from sia.sandbox.protocol import Job, Limits, Sandbox

HERE = Path(__file__).resolve().parent
RUNNER = ("runner.py", "inputs.py")
START_S = 90.0  # PyTorch on a cold and busy machine
STOP_S = 5.0
MAX_MESSAGE = 2**16
MEMORY_MIB = 8192
FILE_MIB = 64
THREADS = 1
TICKS = os.sysconf("SC_CLK_TCK")

Array = NDArray[np.float32]


class GuestFailed(Exception):
    """The guest said that it failed, gave no answer in time, or is gone. One line."""


class Guest:
    """One submission in a sandbox of its own. Use it as a context manager.

    Args:
        sandbox: Confines it.
        submission: The file that becomes `submission.py` inside.
        also: Further files of ours that lie beside it.
        device: `cpu` or `cuda`.
        interpret: Runs Triton kernels in Triton's interpreter.

    Raises:
        GuestFailed: On entering: the submission cannot be loaded.
    """

    def __init__(
        self,
        *,
        sandbox: Sandbox,
        submission: Path,
        also: tuple[Path, ...] = (),
        device: str = "cpu",
        interpret: bool = False,
    ) -> None:
        self._sandbox = sandbox
        self._files = [(HERE / name, name) for name in RUNNER]
        self._files += [(submission, "submission.py"), *((path, path.name) for path in also)]
        self._device = device
        self._interpret = interpret
        self._stack = ExitStack()
        self._marker = secrets.token_hex(8)
        self._namespace = ""
        self._members: list[int] = []
        self._lost = ""  # why no further answer is to be had
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> "Guest":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ready(self) -> None:
        """Waits until the submission is loaded; only then may anything else be called.

        Raises:
            GuestFailed: It cannot be loaded.
        """
        self.facts = self._receive(time.perf_counter() + START_S)
        self.freeze()

    def ask(
        self, message: dict[str, Any], memory: "Memory | None" = None, *, limit_s: float
    ) -> Any:
        """The answer to one message.

        Raises:
            GuestFailed: It is an error, or does not come within `limit_s`. After the latter, and
                after an answer that is none, every further call fails in the same way.
        """
        if self._lost:
            raise GuestFailed(self._lost)
        data, fds = json.dumps(message).encode(), [memory.fd] if memory else []
        try:
            socket.send_fds(self._socket, [data], fds)
        except OSError:
            raise self._fail(self._ended()) from None
        return self._receive(time.perf_counter() + limit_s)

    def freeze(self) -> None:
        """Stops every process of the guest; returns when none of them can run.

        Raises:
            GuestFailed: New processes appear faster than they can be stopped.
        """
        until = time.monotonic() + STOP_S
        while True:
            members = self._find_members()
            running = [pid for pid in members if _state(pid) not in "TtZX"]
            if not running:
                self._members = members
                return
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            if time.monotonic() > until:
                raise GuestFailed("processes of the submission cannot be stopped")

    def thaw(self) -> None:
        """Lets the guest run on."""
        for pid in self._members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """Processor time that the processes known at the last freeze have used so far."""
        return sum(_cpu_s(pid) for pid in self._members)

    def _start(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sia-trimul-")))
        for name in ("data", "code", "work"):
            (folder / name).mkdir()
            (folder / name).chmod(0o755)
        folder.chmod(0o755)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self._stack.callback(ours.close)
        for source, name in self._files:
            shutil.copyfile(source, folder / "code" / name)
        job_file = {"fd": theirs.fileno(), "interpret": self._interpret, "device": self._device}
        (folder / "code" / "job.json").write_text(json.dumps(job_file), encoding="utf-8")
        job = Job(
            data=folder / "data",
            code=folder / "code",
            work=folder / "work",
            runtime=current_runtime(),
            limits=Limits(memory_mib=MEMORY_MIB, file_mib=FILE_MIB, threads=THREADS),
            slot=self._stack.enter_context(free_slot()),
            marker=self._marker,
            entry="runner.py",
        )
        if self._device == "cuda":
            job = with_gpu(job)
        launch = self._sandbox.launch(job)
        errors = self._stack.enter_context((folder / "stderr").open("w+b"))
        self._errors = errors
        if launch.status_fd is not None:
            self._stack.callback(os.close, launch.status_fd)
        os.set_inheritable(theirs.fileno(), True)
        launch = replace(launch, pass_fds=(*launch.pass_fds, theirs.detach()))
        process = start(launch, job.work, stdout=subprocess.DEVNULL, stderr=errors)
        self._process = process
        self._stack.callback(self._kill)
        if launch.status_fd is not None:
            self._namespace = _namespace_of_child(launch.status_fd)

    def _kill(self) -> None:
        """Ends every process of the guest and waits until none is left."""
        until = time.monotonic() + STOP_S
        while (members := self._find_members()) and time.monotonic() < until:
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()  # a leader that nobody buries stays a member
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)
        kill_strays(self._marker)

    def _receive(self, until: float) -> dict[str, Any]:
        left = until - time.perf_counter()
        if left <= 0 or not select.select([self._socket], [], [], left)[0]:
            raise self._fail("no answer in time")
        try:
            data = self._socket.recv(MAX_MESSAGE)
        except OSError:
            data = b""
        if not data:
            raise self._fail(self._ended())
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            raise self._fail("an answer that is not JSON") from None
        if not isinstance(answer, dict):
            raise self._fail("an answer that is no object")
        if "error" in answer:
            raise GuestFailed(_printable(answer["error"]))
        return answer

    def _fail(self, reason: str) -> GuestFailed:
        self._lost = reason
        return GuestFailed(reason)

    def _ended(self) -> str:
        """Why the process may be gone."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 400))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return "its process ended" + (f": {_printable(lines[-1])}" if lines else "")

    def _find_members(self) -> list[int]:
        """All processes of the guest: those of its namespace, or those that carry its marker."""
        if not self._namespace:
            return marked(self._marker)
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with suppress(OSError):
                    if os.readlink(f"/proc/{name}/ns/pid") == self._namespace:
                        found.append(int(name))
        return found


class Memory:
    """Memory that can be handed to a guest; nobody knows what is in it before."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("trimul", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.block = mmap.mmap(self.fd, size)

    def close(self) -> None:
        """Gives our descriptor back; what others have mapped stays theirs."""
        os.close(self.fd)


def _namespace_of_child(status_fd: int) -> str:
    """The PID namespace of the sandbox, once its supervisor has named its child."""
    line = b""
    while b"\n" not in line:
        chunk = b""
        if select.select([status_fd], [], [], START_S)[0]:
            chunk = os.read(status_fd, 4096)
        if not chunk:
            raise GuestFailed("the sandbox did not start")
        line += chunk
    child = json.loads(line.split(b"\n")[0])["child-pid"]
    return os.readlink(f"/proc/{child}/ns/pid")


def _stat(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the state on; none if the process is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    return stat.rpartition(b")")[2].split()


def _state(pid: int) -> str:
    """The letter of the process's state; X if it is gone."""
    fields = _stat(pid)
    return fields[0].decode() if fields else "X"


def _cpu_s(pid: int) -> float:
    """Processor time of all threads of a process and of the children that it has buried."""
    fields = _stat(pid)
    if not fields:
        return 0.0
    buried = (int(fields[13]) + int(fields[14])) / TICKS
    try:
        return buried + time.clock_gettime((~pid << 3) | 2)  # CPUCLOCK_SCHED of another process
    except OSError:
        return buried


def _printable(text: Any) -> str:
    return "".join(filter(str.isprintable, str(text)))[:400]
