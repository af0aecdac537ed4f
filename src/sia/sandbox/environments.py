"""The interpreter and packages of a harness: built once per requirements, shared by all runs."""

import contextlib
import fcntl
import hashlib
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sia.sandbox.protocol import Runtime

REQUIREMENTS = "requirements.txt"
COMPLETE = "complete"
# Parts of an installation prefix that an interpreter reads. The prefix as a whole may be a checkout
# (`python -m venv .`) that holds labels and run directories.
PREFIX_PARTS = ("bin", "lib", "lib64", "pyvenv.cfg")
POLL_S = 0.1

# A package by name. Paths, URLs and pip's own options would run code outside the sandbox.
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*"
    r"\s*(\[[A-Za-z0-9._,\s-]*\])?"  # extras
    r"\s*([<>=!~][\w\s.*+!<>=~,]*)?"  # versions
    r"(;[\w\s.'\"<>=!~(),]*)?"  # environment marker
    r"(\s*--hash=sha256:[0-9a-f]{64})*"
)


class BuildFailed(Exception):
    """The environment of one harness cannot be built; `log` is the installer's output."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class Environments:
    """Runtimes by harness. Safe to use from several threads and processes at once.

    Args:
        cache: Folder of all environments; None means `~/.cache/sia/environments`.
        build_s: Deadline of one build.
    """

    def __init__(self, cache: Path | None = None, *, build_s: float = 600.0) -> None:
        self._cache = cache or Path("~/.cache/sia/environments")
        self._build_s = build_s

    def runtime(self, harness: Path, *, cancelled: Callable[[], bool] = lambda: False) -> Runtime:
        """The interpreter for `harness`.

        Without a `requirements.txt` it is the one that runs SIA. With it, a virtual environment of
        wheels, made once per requirements, Python version and platform.

        Raises:
            BuildFailed: The requirements cannot be read or installed.
            KeyboardInterrupt: `cancelled` returned true while it was built or waited for.
        """
        path = harness / REQUIREMENTS
        if not path.is_file():
            return current_runtime()
        requirements = _read_requirements(path)
        key = hashlib.sha256(
            "\n".join([*requirements, sys.version, sys.base_prefix, platform.platform()]).encode()
        ).hexdigest()[:24]
        cache = self._cache.expanduser().resolve()
        folder = cache / key
        if not (folder / COMPLETE).is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / f"{key}.lock", cancelled):
                if not (folder / COMPLETE).is_file():
                    self._build(folder, requirements, cancelled)
        return Runtime(
            python=folder / "bin" / "python", roots=_roots(folder, Path(sys.base_prefix))
        )

    def _build(
        self, folder: Path, requirements: Sequence[str], cancelled: Callable[[], bool]
    ) -> None:
        until = time.monotonic() + self._build_s
        shutil.rmtree(folder, ignore_errors=True)
        # Our own pip can install into the new environment; without one, it needs a pip of its own.
        borrowed = importlib.util.find_spec("pip") is not None
        venv = [sys.executable, "-m", "venv", *(["--without-pip"] if borrowed else []), str(folder)]
        _build_step(venv, until, cancelled)
        if requirements:
            lines = folder / REQUIREMENTS
            lines.write_text("\n".join(requirements) + "\n", encoding="utf-8")
            python = str(folder / "bin" / "python")
            pip = (
                [sys.executable, "-m", "pip", "--python", python]
                if borrowed
                else [python, "-m", "pip"]
            )
            options = ["--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
            _build_step([*pip, "install", *options, "-r", str(lines)], until, cancelled)
        (folder / COMPLETE).touch()


def current_runtime() -> Runtime:
    """The interpreter that runs SIA, with its packages."""
    prefixes = (Path(sys.prefix), Path(sys.exec_prefix), Path(sys.base_prefix))
    return runtime_of(Path(sys.executable), *prefixes)


def runtime_of(python: Path, *prefixes: Path) -> Runtime:
    """An interpreter with the installation prefixes that it reads."""
    return Runtime(python=python.absolute(), roots=_roots(*prefixes))


def holds(runtime: Runtime, packages: Iterable[str]) -> str:
    """The first of `packages` that is installed where `runtime` can read it; empty if none is."""
    wanted = {_normal(name): name for name in packages}
    for root in runtime.roots:
        for pattern in ("site-packages/*.dist-info", "python*/site-packages/*.dist-info"):
            for folder in root.glob(pattern):
                if name := wanted.get(_normal(folder.name.split("-")[0])):
                    return name
    return ""


def _normal(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _roots(*prefixes: Path) -> tuple[Path, ...]:
    """What an interpreter with these prefixes reads, as named and as resolved, without repeats."""
    paths: list[Path] = []
    for prefix in prefixes:
        for folder in (prefix, prefix.resolve()):
            paths += [folder / part for part in PREFIX_PARTS if (folder / part).exists()]
        # A virtual environment's `python` is a chain of links, possibly out of its base prefix.
        link = prefix / "bin" / "python"
        while link.is_symlink():
            link = Path(os.path.normpath(link.parent / os.readlink(link)))
            paths.append(link)
    return tuple(
        path
        for index, path in enumerate(paths)
        if path.exists()
        and path not in paths[:index]
        and not any(parent in paths for parent in path.parents)
    )


def _read_requirements(path: Path) -> list[str]:
    """The lines of a requirements file without comments.

    Raises:
        BuildFailed: A line is not the name of a package with an optional version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildFailed(f"{REQUIREMENTS} cannot be read: {error}") from error
    text = re.sub(r"\\\r?\n", " ", text)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    for line in filter(None, lines):
        if not _REQUIREMENT.fullmatch(line):
            raise BuildFailed(
                f"{REQUIREMENTS} has {line[:100]!r}; only packages by name, such as 'numpy==2.1', "
                "are installed"
            )
    return [line for line in lines if line]


@contextlib.contextmanager
def locked(
    path: Path, cancelled: Callable[[], bool], *, within_s: float = math.inf
) -> Iterator[None]:
    """Holds a file lock; waits for it in short steps, so that a cancelled run can leave.

    A holder that is killed gives it up. After `within_s` nobody is waited for any more.
    """
    until = time.monotonic() + within_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if cancelled():
                    raise KeyboardInterrupt from None
                if time.monotonic() >= until:
                    break
                time.sleep(POLL_S)
        yield


def _build_step(argv: Sequence[str], until: float, cancelled: Callable[[], bool]) -> None:
    """Runs one command of a build; it dies with us, so that a lock never outlives its holder."""
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        umask=0o022,  # targets have another user id
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if cancelled():
                        raise KeyboardInterrupt from None
                    if time.monotonic() > until:
                        raise BuildFailed(
                            "the environment was not built before its deadline"
                        ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    if process.returncode != 0:
        log = output.decode("utf-8", "replace")
        tail = "; ".join(log.strip().splitlines()[-2:])[-300:]
        raise BuildFailed(f"{REQUIREMENTS} could not be installed: {tail}", log)
