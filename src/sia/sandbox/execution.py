"""One process in a sandbox, from its start until nothing of it is alive."""

import contextlib
import json
import os
import resource
import select
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sia.errors import TargetError
from sia.records import Outcome
from sia.sandbox.collect import excess
from sia.sandbox.launch import start
from sia.sandbox.protocol import Job, Launch

GRACE_S = 0.5
KILL_WAIT_S = 10.0
DISK_CHECK_S = 0.25
STOP_WAIT_S = 30
MAX_SLOTS = 800
_CHUNK = 2**18


class Cancel:
    """A flag that also wakes a selector."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._set = False

    def set(self) -> None:
        """Raises the flag for good."""
        self._set = True
        os.eventfd_write(self.fd, 1)

    def is_set(self) -> bool:
        """Whether the flag has been raised."""
        return self._set

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self.fd)


class Cancels:
    """The flags of all that is in progress; raised together, and for all that is yet to come."""

    def __init__(self) -> None:
        self._raised = False
        self._lock = threading.Lock()
        self._active: set[Cancel] = set()

    @contextlib.contextmanager
    def flag(self) -> Iterator[Cancel]:
        """The flag of one execution, for as long as it lasts."""
        cancel = Cancel()
        with self._lock:
            if self._raised:  # the one who cancels cannot know who is about to begin
                cancel.set()
            self._active.add(cancel)
        try:
            yield cancel
        finally:
            with self._lock:
                self._active.discard(cancel)
                cancel.close()

    def set(self) -> None:
        """Raises all flags for good."""
        with self._lock:
            self._raised = True
            for cancel in self._active:
                cancel.set()


@dataclass
class Output:
    """The first and the last bytes of a stream; what lies between is counted and dropped."""

    cap: int
    total: int = 0
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)

    def add(self, chunk: bytes) -> None:
        """Takes the next bytes."""
        self.total += len(chunk)
        room = max(0, self.cap // 2 - len(self.head))
        self.head += chunk[:room]
        self.tail += chunk[room:]
        del self.tail[: max(0, len(self.tail) - self.cap // 2)]

    def text(self) -> str:
        """What was kept, with a last line that says how much was not."""
        dropped = self.total - len(self.head) - len(self.tail)
        if not dropped:
            return (self.head + self.tail).decode("utf-8", "replace")
        kept = (self.head + b"\n[...]\n" + self.tail).decode("utf-8", "replace")
        return f"{kept.rstrip()}\n[{dropped} bytes were dropped where [...] stands]\n"

    def last_line(self) -> str:
        """The last line that is not blank, printable and at most 200 characters long."""
        lines = (self.head + self.tail)[-4096:].decode("utf-8", "replace").strip().splitlines()
        return "".join(filter(str.isprintable, lines[-1].strip()))[:200] if lines else ""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How it went. `outcome` knows nothing of the submission yet."""

    outcome: Outcome
    reason: str
    exit_code: int
    stdout: Output
    stderr: Output
    usage: dict[str, float]


def execute(launch: Launch, job: Job, *, deadline_s: float, cancel: Cancel) -> Execution:
    """Starts a process, watches it, and returns when it and all its descendants are dead.

    Raises:
        TargetError: The sandbox could not start the target.
        KeyboardInterrupt: `cancel` was set.
    """
    began = time.monotonic()
    try:
        watched = _Watched(launch, job, cancel)
    except OSError as error:
        raise TargetError(f"The target cannot be started: {error}") from error
    outcome, reason = Outcome.OK, ""
    try:
        disk_check = began + DISK_CHECK_S
        while not watched.wait(min(disk_check, began + deadline_s)) and not cancel.is_set():
            now = time.monotonic()
            if now >= began + deadline_s:
                outcome, reason = Outcome.TIMEOUT, f"ran longer than {deadline_s:g} s"
                break
            if now >= disk_check:
                if reason := excess(job.work, job.limits.disk_mib):
                    outcome = Outcome.DISK_LIMIT
                    break
                # A folder that takes long to look through is looked through less often.
                disk_check = time.monotonic() + max(DISK_CHECK_S, 5 * (time.monotonic() - now))
    finally:
        status, used = watched.finish()
    wall_s = time.monotonic() - began
    if cancel.is_set():
        raise KeyboardInterrupt
    exit_code = os.waitstatus_to_exitcode(status)
    if launch.supervised and exit_code > 128:
        exit_code = 128 - exit_code
    if (
        outcome is Outcome.OK
        and launch.status_fd is not None
        and exit_code > 0
        and not watched.supervisor_reported("exit-code")
    ):
        raise TargetError(f"The sandbox failed to start the target: {watched.stderr.last_line()}")
    if outcome is Outcome.OK and (reason := excess(job.work, job.limits.disk_mib)):
        outcome = Outcome.DISK_LIMIT
    if outcome is Outcome.OK and exit_code != 0:
        outcome, reason = Outcome.CRASHED, _describe(exit_code, watched.stderr.last_line())
    return Execution(
        outcome=outcome,
        reason=reason,
        exit_code=exit_code,
        stdout=watched.stdout,
        stderr=watched.stderr,
        usage={
            "wall_s": round(wall_s, 4),
            "cpu_s": round(used.ru_utime + used.ru_stime, 4),
            "max_rss_mib": round(used.ru_maxrss / 1024, 1),
            "stdout_bytes": watched.stdout.total,
            "stderr_bytes": watched.stderr.total,
        },
    )


def _describe(exit_code: int, last_line: str) -> str:
    """One line on an exit code other than zero."""
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"
        return f"killed by {name}" + (" (memory?)" if name == "SIGKILL" else "")
    return f"exit code {exit_code}" + (f": {last_line}" if last_line else "")


class _Watched:
    """A running process with its outputs."""

    def __init__(self, launch: Launch, job: Job, cancel: Cancel) -> None:
        self._launch = launch
        self._marker = job.marker
        self._cancel = cancel
        self.stdout = Output(job.limits.output_kib * 1024)
        self.stderr = Output(job.limits.output_kib * 1024)
        self._status = Output(4096)
        self._init: int | None = None  # pidfd of the supervisor's child
        self._exited = False
        self._selector = selectors.DefaultSelector()
        self._streams: dict[int, Callable[[bytes], None]] = {}
        ends: list[int] = []
        try:
            for stream in (self.stdout, self.stderr):
                reader, writer = os.pipe()
                self._streams[reader] = stream.add
                ends.append(writer)
            if launch.status_fd is not None:
                self._streams[launch.status_fd] = self._hear_supervisor
            self._process = start(launch, job.work, stdout=ends[0], stderr=ends[1])
        except BaseException:
            for fd in self._streams:
                os.close(fd)
            self._selector.close()
            raise
        finally:
            for fd in ends:
                os.close(fd)
        self._pidfd = os.pidfd_open(self._process.pid)
        for fd in self._streams:
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)
        self._selector.register(self._pidfd, selectors.EVENT_READ)
        self._selector.register(cancel.fd, selectors.EVENT_READ)

    def wait(self, until: float) -> bool:
        """Reads outputs until the process has exited, `until` is reached, or cancel is set.

        Returns whether the process has exited.
        """
        while not self._exited:
            left = until - time.monotonic()
            if left <= 0:
                break
            for key, _ in self._selector.select(left):
                if key.fd == self._pidfd:
                    self._exited = True
                elif key.fd == self._cancel.fd:
                    return self._exited
                else:
                    self._read(key.fd)
        return self._exited

    def finish(self) -> tuple[int, resource.struct_rusage]:
        """Kills all that is left, reads what is left. Wait status and resource usage."""
        self._selector.unregister(self._cancel.fd)
        if self._launch.supervised:
            if not self._exited:
                self._kill_supervised()
        else:
            if not self._exited:
                self._signal_group(signal.SIGTERM)
                self.wait(time.monotonic() + GRACE_S)
            # The group may outlive its leader; until the leader is reaped its id is not reused.
            self._signal_group(signal.SIGKILL)
        self.wait(time.monotonic() + KILL_WAIT_S)
        _, status, used = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._init is not None:  # ends after every process of its namespace
            select.select([self._init], [], [], KILL_WAIT_S)
            os.close(self._init)
        if not self._launch.supervised:
            kill_strays(self._marker)
        if self._launch.stop:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    self._launch.stop,
                    env=self._launch.env,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=STOP_WAIT_S,
                    check=False,
                )
        self._drain()
        os.close(self._pidfd)
        self._selector.close()
        return status, used

    def supervisor_reported(self, key: str) -> bool:
        """Whether a line of the supervisor's JSON has `key`."""
        return any(key in json.loads(line) for line in self._status.text().splitlines())

    def _kill_supervised(self) -> None:
        """Kills the init of the sandbox, after which its supervisor ends by itself."""
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            if self.wait(time.monotonic() + KILL_WAIT_S):
                return
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _hear_supervisor(self, chunk: bytes) -> None:
        self._status.add(chunk)
        if self._init is None and b"\n" in chunk:
            first = json.loads(self._status.text().splitlines()[0])
            with contextlib.suppress(ProcessLookupError):
                self._init = os.pidfd_open(first["child-pid"])

    def _read(self, fd: int) -> bool:
        """Reads once; whether there may be more."""
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        if chunk:
            self._streams[fd](chunk)
            return True
        self._selector.unregister(fd)
        del self._streams[fd]
        os.close(fd)
        return False

    def _drain(self) -> None:
        """Reads what the dead have left in the pipes; a stranger may still hold an end of them."""
        until = time.monotonic() + 1
        for fd in list(self._streams):
            while self._read(fd) and time.monotonic() < until:
                pass
        for fd in self._streams:
            os.close(fd)


@contextlib.contextmanager
def free_slot() -> Iterator[int]:
    """The lowest number that no other sandbox on this machine holds, in any process.

    Abstract socket names are given back by the kernel however their holder ends.
    """
    for number in range(MAX_SLOTS):
        with socket.socket(socket.AF_UNIX) as holder:
            try:
                holder.bind(f"\0sia-target-slot-{number}")
            except OSError:
                continue
            yield number
            return
    raise TargetError(f"{MAX_SLOTS} attempts run on this machine already. Try again later.")


def kill_strays(marker: str) -> None:
    """Kills every process whose environment holds the marker, until there is none."""
    until = time.monotonic() + KILL_WAIT_S
    while (pids := marked(marker)) and time.monotonic() < until:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def marked(marker: str) -> list[int]:
    """Processes that were started with the marker in their environment, zombies excluded."""
    wanted = f"SIA_ATTEMPT={marker}".encode()
    pids = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"/proc/{name}/environ", os.O_RDONLY)
        except OSError:  # gone, or somebody else's
            continue
        try:
            if wanted in os.read(fd, 2**17):
                pids.append(int(name))
        except OSError:
            continue
        finally:
            os.close(fd)
    return pids
