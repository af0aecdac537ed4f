"""The page that `web=true` opens: a server of its own beside the run, which outlives it a while."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from urllib.parse import quote

from sia.errors import SiaError
from sia.web.address import HOST, link, listen

LOG_FILE = "web.log"
IDLE_S = 600.0  # without a look at it, once the run is over
NEEDS = ("fastapi", "uvicorn")


def start(run: Path) -> str:
    """Starts a server over the folder of runs that holds `run`.

    The run goes on whatever becomes of it: the server is a process of its own, in its own session,
    and ends when the run is over and nobody has looked for ten minutes.

    Returns:
        For people: where the page is, or why there is none, and how to open it later.
    """
    run = run.resolve()
    folder = runs_folder(run)
    later = f"python -m sia.web {shlex.quote(os.path.relpath(folder))}"
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return f"none: pip install 'sia-framework[web]', then: {later}"
    try:
        with listen(HOST, None) as listener:
            port = listener.getsockname()[1]
            _spawn(run, folder, listener.fileno())
    except (SiaError, OSError) as error:
        return f"none: {error} Open it by hand: {later}"
    key = quote(run.relative_to(folder).as_posix())
    return f"{link(HOST, port, None)}run/{key}  (later: {later})"


def runs_folder(run: Path) -> Path:
    """`runs` of the working directory if the run lies in it, else the folder around the run."""
    usual = Path("runs").resolve()
    return usual if usual in run.parents else run.parent


def _spawn(run: Path, folder: Path, fd: int) -> None:
    key = run.relative_to(folder).as_posix()
    command = [sys.executable, "-m", "sia.web", str(folder), "--fd", "3"]
    command += ["--run", key, "--idle-s", f"{IDLE_S:g}"]
    log = os.open(run / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        # Not subprocess: that wants to be waited for, and this child is to outlive its parent.
        os.posix_spawn(
            sys.executable,
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
                (os.POSIX_SPAWN_DUP2, fd, 3),
            ],
            setsid=True,
        )
    finally:
        os.close(log)
