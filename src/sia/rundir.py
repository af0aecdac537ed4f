"""The run directory: made once, locked while in use, safe against a kill at any moment.

run.json       who, what, with which code: written first, exclusively
config.yaml    the resolved configuration
journal.jsonl  every finished step, one line each: the truth from which all else is derived
gen-000/cand-0/  harness/, improvement.md, harness.diff, submission/, agent_execution/, *.log
result.json    how the run ended; absent while it runs and after a kill
exam.json      the sealed test, once opened
"""

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sia.errors import RunDirectoryError, RunDirectoryInUse
from sia.records import Exam, RunResult, from_data, from_json, to_data, to_json

T = TypeVar("T")

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
JOURNAL_FILE = "journal.jsonl"
RESULT_FILE = "result.json"
EXAM_FILE = "exam.json"
LOCK_FILE = ".lock"

LOCK_S = 0.1  # `is_held` has the lock for a moment

# What the disk says of itself: nothing is wrong with the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What identifies a run; fixed when it is created.

    Attributes:
        protocol: Version of the loop's meaning; records of different versions are not compared.
        created_at: UTC, ISO 8601.
        provenance: Code revision, packages and hardware, from `sia.provenance`.
    """

    run_id: str
    task: str
    task_version: int
    meta: str
    target: str
    seed: int
    config_sha256: str
    created_at: str
    protocol: int
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the journal: a finished step.

    Attributes:
        key: Place of the step in the run, for example `0003/0/attempt`; unique.
        kind: Name of the record's class.
        elapsed_s: Time the run had used when the step ended, earlier sessions included, and what it
            was charged with.
        wall_s: What the step itself took.
    """

    key: str
    kind: str
    data: Any
    elapsed_s: float
    wall_s: float


class Journal:
    """Append-only memory of finished steps. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the journal; a line torn by a kill is cut off.

        Raises:
            RunDirectoryError: A line in the middle is damaged.
        """
        self._path = path
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        lines, self._size = _parse(path)
        os.ftruncate(self._fd, self._size)
        self._done = {line.key: line for line in lines}
        self._elapsed_before = max((line.elapsed_s for line in lines), default=0.0)
        self._started = time.monotonic()

    def __contains__(self, key: str) -> bool:
        return key in self._done

    @property
    def elapsed_s(self) -> float:
        """Seconds the run has used, earlier sessions and charges included."""
        return self._elapsed_before + time.monotonic() - self._started

    def charge(self, seconds: float) -> None:
        """Adds time that another run has spent for this one. Called within a step, it is kept."""
        with self._lock:
            self._elapsed_before += seconds

    def step(self, key: str, kind: type[T], make: Callable[[], T]) -> T:
        """The record of step `key`: read back if the step finished before, else made and written.

        Raises:
            RunDirectoryError: The line could not be written; the journal holds what it held.
        """
        if (line := self._done.get(key)) is not None:
            return from_data(line.data, kind)
        started = time.monotonic()
        record = make()
        self._append(
            Line(
                key=key,
                kind=kind.__name__,
                data=to_data(record),
                elapsed_s=round(self.elapsed_s, 6),
                wall_s=round(time.monotonic() - started, 6),
            )
        )
        return record

    def close(self) -> None:
        """Flushes to the disk and closes the file."""
        with suppress(OSError):
            os.fsync(self._fd)
        os.close(self._fd)

    def _append(self, line: Line) -> None:
        data = to_json(line) + b"\n"
        with self._lock:
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._fd, data[written:], self._size + written)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._size)
                raise write_error(self._path, error) from error
            self._size += len(data)
            self._done[line.key] = line


class RunDir:
    """A run directory that this process writes to; holds a lock until `close`."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd
        self.info = read_info(path)
        self.journal = Journal(path / JOURNAL_FILE)

    @classmethod
    def create(cls, path: Path, info: RunInfo, config: str) -> "RunDir":
        """Makes a new run directory; an empty existing folder is accepted.

        Raises:
            RunDirectoryInUse: `path` holds a run already.
            RunDirectoryError: `path` cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock_fd = _lock(path)
            with (path / RUN_FILE).open("xb") as file:
                file.write(to_json(info, pretty=True))
            write_atomic(path / CONFIG_FILE, config.encode())
        except FileExistsError as error:
            raise RunDirectoryInUse(
                f"{path} holds a run already. Continue it: python -m sia resume={path}"
            ) from error
        except OSError as error:
            raise write_error(path, error) from error
        return cls(path, lock_fd)

    @classmethod
    def resume(cls, path: Path) -> "RunDir":
        """Opens an existing run directory to go on with it.

        Raises:
            RunDirectoryError: `path` holds no run, or its sealed test has been opened.
            RunDirectoryInUse: Another process is writing to it.
        """
        read_info(path)
        if (path / EXAM_FILE).exists():
            raise RunDirectoryError(
                f"The sealed test of {path} has been opened: its search is over. "
                "Start a new run: python -m sia"
            )
        try:
            return cls(path, _lock(path))
        except OSError as error:
            raise write_error(path, error) from error

    def finish(self, result: RunResult) -> None:
        """Writes `result.json`."""
        write_atomic(self.path / RESULT_FILE, to_json(result, pretty=True))

    def close(self) -> None:
        """Closes the journal and gives up the lock."""
        self.journal.close()
        os.close(self._lock_fd)


def candidate_dir(run: Path, generation: int, index: int) -> Path:
    """`run/gen-003/cand-0`."""
    return run / f"gen-{generation:03}" / f"cand-{index}"


def policy_dir(run: Path, candidate: str) -> Path:
    """Where the policy lies that the candidate's update made: `run/gen-003/cand-0/policy`."""
    generation, _, index = candidate.removeprefix("g").partition("-c")
    return candidate_dir(run, int(generation), int(index)) / "policy"


def find_runs(folder: Path) -> list[Path]:
    """`folder` itself if it is a run, else all runs below it, in the order of their names.

    Raises:
        RunDirectoryError: There is none.
    """
    if (folder / RUN_FILE).is_file():
        return [folder]
    found = []
    for place, folders, files in os.walk(folder):
        if RUN_FILE in files:
            found.append(Path(place))
            folders.clear()  # a run holds thousands of files and no run
    if not found:
        raise RunDirectoryError(f"{folder} holds no run (no {RUN_FILE} in it or below it).")
    return sorted(found)


def read_info(run: Path) -> RunInfo:
    """The `run.json` of a run directory.

    Raises:
        RunDirectoryError: There is none, or it is damaged.
    """
    try:
        return from_json((run / RUN_FILE).read_bytes(), RunInfo)
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{run} holds no run (no {RUN_FILE}). List yours: find runs -name run.json"
        ) from error
    except (OSError, msgspec.MsgspecError) as error:
        raise RunDirectoryError(f"{run / RUN_FILE} cannot be read: {error}") from error


def read_result(run: Path) -> RunResult | None:
    """The `result.json` of a run directory; None while it runs and after a kill."""
    try:
        return from_json((run / RESULT_FILE).read_bytes(), RunResult)
    except FileNotFoundError:
        return None


def is_held(run: Path) -> bool:
    """Whether a process writes to the run directory."""
    try:
        fd = os.open(run / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def status(run: Path) -> str:
    """`running`, `finished`, `failed`, `interrupted`, or `killed`: ended without a word."""
    if (result := read_result(run)) is not None:
        return result.status
    return "running" if is_held(run) else "killed"


def arm(config: str) -> str:
    """The levers that a run could pull: `harness`, `weights`, `both`; empty where it had none.

    Args:
        config: Text of its `config.yaml`, as it was written. Reading it as YAML takes longer than
            all else that is asked of a run in a long list.
    """
    found = re.search(r"^levers:\n((?:- .*\n)+)", config, re.MULTILINE)
    names = set(found[1].replace("- ", "").split()) if found else set()
    if re.search(r"^weights:\n(?: +.*\n)*? +name: none$", config, re.MULTILINE):
        names.discard("weights")
    pulled = [name for name in ("harness", "weights") if name in names]
    return "both" if len(pulled) == 2 else "".join(pulled)


def read_exam(run: Path) -> Exam | None:
    """The `exam.json` of a run directory; None while the sealed test is closed."""
    try:
        return from_json((run / EXAM_FILE).read_bytes(), Exam)
    except FileNotFoundError:
        return None


def read_journal(run: Path) -> list[Line]:
    """All finished steps in the order in which they finished; a torn last line is left out."""
    try:
        return _parse(run / JOURNAL_FILE)[0]
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{run} has no {JOURNAL_FILE}.") from error


def records(run: Path) -> dict[str, Any]:
    """All records of a run by key, times left out: equal for two runs of one seed."""
    return {line.key: line.data for line in sorted(read_journal(run), key=lambda line: line.key)}


def copy_records(run: Path, folder: Path) -> None:
    """Copies what says how a run went, without what its attempts left: reports need no more.

    Raises:
        RunDirectoryError: The disk is full or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    for name in (RUN_FILE, CONFIG_FILE, JOURNAL_FILE, RESULT_FILE, EXAM_FILE):
        if (run / name).is_file():
            write_atomic(folder / name, (run / name).read_bytes())


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Raises:
        RunDirectoryError: The disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise write_error(path, error) from error


def remove_tree(path: Path) -> None:
    """Removes a folder if it is there; never follows a symbolic link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_error(path: Path, error: OSError) -> RunDirectoryError:
    """The message for a failed write below `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = (
            "The disk is full. Free some space, then go on with the same command and resume=<run>."
        )
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "Choose a folder that can be written: python -m sia hydra.run.dir=/tmp/my-run"
    else:
        advice = "Nothing that was finished is lost: go on with resume=<run>."
    return RunDirectoryError(f"Cannot write {path}: {error.strerror}. {advice}")


def _lock(path: Path) -> int:
    fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(fd)
                raise RunDirectoryInUse(
                    f"Another process is writing to {path}. Wait for it, or stop it and resume."
                ) from error
            time.sleep(0.01)


def _parse(path: Path) -> tuple[list[Line], int]:
    """The lines of a journal, and the size in bytes of its undamaged part."""
    lines: list[Line] = []
    size = 0
    for raw in _whole_lines(path):
        try:
            lines.append(from_json(raw, Line))
        except msgspec.MsgspecError as error:
            raise RunDirectoryError(
                f"{path}, line {len(lines) + 1} is damaged ({error}). Restore it from a copy."
            ) from error
        size += len(raw)
    return lines, size


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                yield raw
