"""Files of a run that the run did not write itself: read below one folder, in bounds, past no link.

A target, an agent, or whoever handed over a run directory may have put anything into it: links to
files of this machine, pipes, files of many gigabytes. Every name is opened relative to a descriptor
of its folder, and only regular files are read.
"""

import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MAX_ENTRIES = 20_000  # of one folder
MAX_DEPTH = 20  # folders within one another


class NotThere(Exception):
    """No file or folder of that name may be read: it is missing, a link, or outside."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a file.

    Attributes:
        start: Offset of the first byte.
        size: Of the whole file, in bytes.
    """

    data: bytes
    start: int
    size: int

    @property
    def end(self) -> int:
        """Offset after the last byte."""
        return self.start + len(self.data)

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return len(self.data) >= self.size

    @property
    def text(self) -> str:
        """The data as UTF-8, what is none replaced."""
        return self.data.decode("utf-8", "replace")


class Folder:
    """A folder, and all that lies below it. Holds no descriptor between calls."""

    def __init__(self, root: Path) -> None:
        """Takes the folder; it is the only place where links are followed."""
        self.root = root.resolve()

    def read(self, name: str, *, limit: int, start: int = 0) -> Piece:
        """At most `limit` bytes of a regular file, from offset `start` on.

        A negative `start` counts from the end: the last `-start` bytes.

        Raises:
            NotThere: There is no such regular file below the folder.
        """
        with self._opened(name, os.O_RDONLY | os.O_NONBLOCK) as fd:
            state = os.fstat(fd)
            if not stat.S_ISREG(state.st_mode):
                raise NotThere(name)
            size = state.st_size
            begin = max(0, size + start) if start < 0 else min(start, size)
            data = b""
            while len(data) < limit and (
                chunk := os.pread(fd, limit - len(data), begin + len(data))
            ):
                data += chunk
            return Piece(data=data, start=begin, size=size)

    def lines(self, name: str, start: int) -> Iterator[bytes]:
        """The whole lines of a file from offset `start` on; none where there is no such file."""
        with suppress(NotThere), self._opened(name, os.O_RDONLY | os.O_NONBLOCK) as fd:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                with open(fd, "rb", closefd=False) as file:
                    file.seek(start)
                    for line in file:
                        if line.endswith(b"\n"):
                            yield line

    def text(self, name: str, *, limit: int) -> str:
        """The first `limit` bytes of a file as text; empty where there is none."""
        with suppress(NotThere):
            return self.read(name, limit=limit).text
        return ""

    def state(self, name: str) -> os.stat_result | None:
        """Of a regular file; None where there is none."""
        try:
            with self._opened(name, os.O_RDONLY | os.O_NONBLOCK) as fd:
                state = os.fstat(fd)
        except NotThere:
            return None
        return state if stat.S_ISREG(state.st_mode) else None

    def has_folder(self, name: str) -> bool:
        """Whether it is a folder, and reached without following a link."""
        try:
            with self._opened(name, os.O_RDONLY | os.O_DIRECTORY):
                return True
        except NotThere:
            return False

    def names(self, name: str) -> list[str]:
        """Names of the regular files of a folder, sorted; none where there is no folder."""
        return sorted(entry for entry, is_folder in self._entries(name) if not is_folder)

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        return sorted(entry for entry, is_folder in self._entries(name) if is_folder)

    def tree(self, name: str, *, limit: int) -> list[str]:
        """Paths of the regular files below a folder, relative to it, sorted; at most `limit`."""
        return sorted(itertools.islice(self._walk(name, "", MAX_DEPTH), limit))

    def _walk(self, folder: str, above: str, depth: int) -> Iterator[str]:
        for entry, is_folder in sorted(self._entries(f"{folder}/{above}".rstrip("/"))):
            path = f"{above}/{entry}" if above else entry
            if not is_folder:
                yield path
            elif depth > 1 and entry != "__pycache__":
                yield from self._walk(folder, path, depth - 1)

    def _entries(self, name: str) -> list[tuple[str, bool]]:
        """Regular files and folders in a folder; each with whether it is a folder."""
        try:
            with self._opened(name, os.O_RDONLY | os.O_DIRECTORY) as fd, os.scandir(fd) as found:
                return [
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in itertools.islice(found, MAX_ENTRIES)
                    if entry.name.isprintable()  # no control characters, nothing but UTF-8
                    and (
                        entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
                    )
                ]
        except NotThere:
            return []

    @contextmanager
    def _opened(self, name: str, flags: int) -> Iterator[int]:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in name:
            raise NotThere(name)
        try:
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotThere(name) from error
        try:
            for number, part in enumerate(parts, start=1):
                way = flags if number == len(parts) else os.O_RDONLY | os.O_DIRECTORY
                above = fd
                fd = os.open(part, way | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
                os.close(above)
            yield fd
        except (OSError, UnicodeError) as error:
            raise NotThere(name) from error
        finally:
            os.close(fd)
