"""Takes results out of a working folder that its target may have booby-trapped.

Every name is opened relative to a descriptor of its folder, without following links, and only
regular files are read: a link to a host file or a pipe without a writer is refused.
"""

import fnmatch
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MAX_ENTRIES = 100_000
MAX_DEPTH = 100
MAX_TRAJECTORIES = 5_000
MAX_TRAJECTORIES_MIB = 64
TRAJECTORY = "agent_execution.json"
TRAJECTORIES = "agent_execution"

_ITEM = re.compile(r"execution_q[A-Za-z0-9._-]{1,100}\.json")
_CHUNK = 2**20


class Refused(Exception):
    """A file cannot be taken; the message says which and why."""


def collect_submission(work_fd: int, files: Sequence[str], *, max_mib: float, out: Path) -> None:
    """Copies the submission's files below `out`.

    Args:
        work_fd: The working folder, opened before the target could replace it.
        files: Relative paths, all of them required.
        max_mib: Size of all files together.
        out: A new folder.

    Raises:
        Refused: A file is missing, is not a regular file, or is too large. `out` may be incomplete.
    """
    out.mkdir()
    left = int(max_mib * 2**20)
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        left -= _take(work_fd, name, out / name, left)


def collect_any(work_fd: int, patterns: Sequence[str], *, max_mib: float, out: Path) -> None:
    """Copies one file below `out`: of the first pattern that matches, the last one by name.

    Args:
        work_fd: The working folder, opened before the target could replace it.
        patterns: Such as `submission*.csv` or `results/*.json`; a folder is named in full.
        max_mib: Its size.
        out: A new folder.

    Raises:
        Refused: None matches, or the file is not a regular one, or is too large.
    """
    for pattern in patterns:
        folder = str(Path(pattern).parent)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=work_fd)
        except OSError:
            continue
        try:
            with os.scandir(fd) as entries:
                found = [entry.name for entry in itertools.islice(entries, MAX_ENTRIES)]
        finally:
            os.close(fd)
        if names := fnmatch.filter(found, Path(pattern).name):
            name = max(names) if folder == "." else f"{folder}/{max(names)}"
            collect_submission(work_fd, [name], max_mib=max_mib, out=out)
            return
    raise Refused(f"none of {', '.join(patterns)} in the working folder")


def collect_trajectories(work_fd: int, out: Path) -> int:
    """Copies `agent_execution.json` and `agent_execution/execution_q*.json` into `out`.

    What is not a regular file or goes beyond the bounds on count and size is left behind. Returns
    how many files were taken; `out` is made only for some.
    """
    names = [TRAJECTORY]
    try:
        folder = os.open(TRAJECTORIES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=work_fd)
    except OSError:
        pass
    else:
        try:
            with os.scandir(folder) as entries:
                found = [entry.name for entry in itertools.islice(entries, MAX_ENTRIES)]
        finally:
            os.close(folder)
        names += [f"{TRAJECTORIES}/{name}" for name in sorted(found) if _ITEM.fullmatch(name)]
    left = MAX_TRAJECTORIES_MIB * 2**20
    taken = 0
    for name in names[:MAX_TRAJECTORIES]:
        out.mkdir(exist_ok=True)
        try:
            left -= _take(work_fd, name, out / Path(name).name, left)
        except Refused:
            continue
        taken += 1
    if not taken and out.is_dir():
        out.rmdir()
    return taken


def collect_tree(
    work_fd: int,
    out: Path,
    *,
    skip: Callable[[str], bool],
    max_files: int,
    max_mib: float,
    max_depth: int = 20,
) -> dict[str, str]:
    """Copies all regular files below `out`, in the order of their names.

    Args:
        work_fd: The working folder, opened before the program could replace it.
        out: A folder; folders without files are not made in it.
        skip: Told a path relative to the working folder; what it accepts is not even looked at.
        max_files: Files at most.
        max_mib: Size of all files together.
        max_depth: Folders within one another.

    Returns:
        Everything else that was left behind: its path, and a line that says why.
    """
    out.mkdir(exist_ok=True)
    left = int(max_mib * 2**20)
    taken = 0
    refused: dict[str, str] = {}
    for name, problem in _walk(work_fd, "", skip, max_depth):
        if taken >= max_files or len(refused) >= max_files:
            refused[name] = f"{name!r} and what comes after it: more than {max_files} files"
            break
        try:
            if problem:
                raise Refused(f"{name!r} {problem}")
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            left -= _take(work_fd, name, out / name, left)
        except Refused as reason:
            refused[name] = str(reason)
        else:
            taken += 1
    return refused


def _walk(
    folder_fd: int, above: str, skip: Callable[[str], bool], depth: int
) -> Iterator[tuple[str, str]]:
    """Relative paths of all that is not a folder, each with why it cannot be taken, or nothing."""
    try:
        with os.scandir(folder_fd) as entries:
            found = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in itertools.islice(entries, MAX_ENTRIES)
            )
    except OSError as error:
        yield above or ".", f"cannot be read ({error.strerror})"
        return
    for name, is_folder in found:
        path = f"{above}/{name}" if above else name
        if skip(path):
            continue
        if not name.isprintable():  # control characters, and bytes that are not UTF-8
            yield path, "has a name that is not plain text"
        elif not is_folder:
            yield path, ""
        elif depth <= 1:
            yield path, "lies in too many folders within one another"
        else:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder_fd)
            except OSError as error:
                yield path, f"cannot be opened ({error.strerror})"
                continue
            try:
                yield from _walk(fd, path, skip, depth - 1)
            finally:
                os.close(fd)


def excess(folder: Path, max_mib: int) -> str:
    """What a working folder has too much of; empty while it is within bounds.

    Counts blocks on disk, at most `MAX_ENTRIES` files and `MAX_DEPTH` levels.
    """
    left = max_mib * 2**20
    entries = 0
    queue = [(str(folder), 0)]
    while queue:
        path, depth = queue.pop()
        if depth > MAX_DEPTH:
            return f"nested folders deeper than {MAX_DEPTH} levels"
        try:
            with os.scandir(path) as listing:
                for entry in listing:
                    entries += 1
                    if entries > MAX_ENTRIES:
                        return f"made more than {MAX_ENTRIES} files"
                    try:
                        left -= entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            queue.append((entry.path, depth + 1))
                    except OSError:  # removed meanwhile
                        continue
                    if left < 0:
                        return f"wrote more than {max_mib} MiB"
        except OSError:  # removed meanwhile, or closed to us
            continue
    return ""


def _take(work_fd: int, name: str, out: Path, max_bytes: int) -> int:
    """Copies one regular file; returns its size.

    Raises:
        Refused: It is missing, not a regular file, or larger than `max_bytes`.
    """
    source = _open(work_fd, name)
    try:
        size = os.fstat(source).st_size
        if size <= max_bytes:
            with out.open("xb") as copy:
                size = 0
                while size <= max_bytes and (chunk := os.read(source, _CHUNK)):
                    copy.write(chunk)
                    size += len(chunk)
    except OSError as error:
        raise Refused(f"{name} cannot be copied ({error.strerror})") from error
    finally:
        os.close(source)
    if size > max_bytes:
        out.unlink(missing_ok=True)
        raise Refused(f"{name} is too large: {max_bytes} bytes are allowed, it has {size}")
    return size


def _open(work_fd: int, name: str) -> int:
    """A descriptor of one regular file below the working folder, no link on the way followed."""
    *folders, last = Path(name).parts
    fd = os.dup(work_fd)
    try:
        for folder in folders:
            above, fd = fd, os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(above)
        mode = os.stat(last, dir_fd=fd, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            raise Refused(f"{name} is a symbolic link; only regular files are taken")
        if not stat.S_ISREG(mode):
            raise Refused(f"{name} is not a regular file")
        # A pipe that took its place meanwhile would make a blocking open wait for ever.
        above, fd = fd, os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
        os.close(above)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Refused(f"{name} is not a regular file")
    except FileNotFoundError:
        os.close(fd)
        raise Refused(f"no {name} in the working folder") from None
    except OSError as error:
        os.close(fd)
        raise Refused(f"{name} cannot be opened ({error.strerror})") from error
    except Refused:
        os.close(fd)
        raise
    return fd
