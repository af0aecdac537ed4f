"""`python -m sia.tracking`: make or check the database, mirror runs, follow a run, open the UI."""

import argparse
import gc
import os
import select
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

from sia.errors import SiaError
from sia.rundir import find_runs
from sia.tracking.location import Location, TrackingError, child_environment, first_line, locate
from sia.tracking.view import RunView

POLL_S = 0.05  # how often the journal's size is looked at
RETRY_S = 1.0  # first pause after a failure; doubled each time
MAX_RETRY_S = 600.0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        location = locate(uri=options.uri, artifacts=options.artifacts)
        if options.command == "init":
            return _init(location)
        if options.command == "check":
            return _check(location)
        if options.command == "sync":
            return _sync(options.runs, location)
        if options.command == "follow":
            return _follow(options.run, location)
        return _ui(location, options.host, options.port)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--uri",
        help="MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db in this folder)",
    )
    where.add_argument("--artifacts", help="root of the artifacts (default: beside the database)")
    parser = argparse.ArgumentParser(prog="python -m sia.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", parents=[where], help="create the database; do it once")
    commands.add_parser("check", parents=[where], help="say whether it can be used; makes nothing")
    sync = commands.add_parser("sync", parents=[where], help="write what is missing of runs")
    sync.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a folder of them"
    )
    follow = commands.add_parser(
        "follow", parents=[where], help="mirror a run until standard input ends"
    )
    follow.add_argument("run", type=Path, metavar="RUN", help="run directory")
    ui = commands.add_parser("ui", parents=[where], help="open MLflow's web page")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on")
    ui.add_argument("--port", default=5000, type=int, help="port to listen on")
    return parser


def _init(location: Location) -> int:
    if location.database is None:
        raise TrackingError(
            f"Only a SQLite database is made here. The owner of {location} runs: mlflow db upgrade"
        )
    mlflow = _mlflow()
    with mlflow.reported(location):
        mlflow.create_database(location)
    print(location.database)
    return 0


def _check(location: Location) -> int:
    if location.database is not None and not location.database.exists():
        print(f"{location.database} is made by the first run")
        return 0
    mlflow = _mlflow()
    with mlflow.reported(location), mlflow.connected(location):
        print(f"{location} holds {mlflow.count_experiments(location)} experiments")
    return 0


def _sync(folders: list[Path], location: Location) -> int:
    runs = [run for folder in folders for run in find_runs(folder)]
    for run in runs:
        RunView(run)
    mlflow = _mlflow()
    for run in runs:
        with mlflow.reported(location), mlflow.opened(run, location) as mirror:
            written = mirror.update()
            mirror.close(ended=False)
        print(f"{run}: {written} generations written")
    return 0


def _follow(run: Path, location: Location) -> int:
    """Mirrors until the end of standard input; after a failure it starts afresh.

    The last attempt begins after that end, and decides the exit status.
    """
    pause_s = RETRY_S
    while True:
        ended = _wait_for_end(0)
        try:
            _mirror(run, location)
            return 0
        except Exception as error:  # reported by the run when it ends, from the last line
            traceback.print_exc()
            print(f"{time.strftime('%FT%T%z')} {first_line(error)}", file=sys.stderr, flush=True)
        if ended:
            return 1
        _wait_for_end(pause_s)
        pause_s = min(2 * pause_s, MAX_RETRY_S)


def _mirror(run: Path, location: Location) -> None:
    mlflow = _mlflow()
    view = RunView(run)
    with mlflow.opened(run, location) as mirror:
        mirror.reopen()
        size = -1
        ended = False
        while not ended:
            ended = _wait_for_end(POLL_S)
            if ended or view.size() != size:
                size = view.size()
                mirror.update()
        mirror.close(ended=True)


def _mlflow() -> ModuleType:
    gc.disable()  # a quarter of the import is spent collecting what stays
    try:
        from sia.tracking import mlflow
    except ImportError as error:
        raise TrackingError(
            f"MLflow cannot be imported: {error}. Install it: pip install 'mlflow>=3.17.2,<3.18'"
        ) from error
    finally:
        gc.enable()
    return mlflow


def _wait_for_end(seconds: float) -> bool:
    """Whether standard input ended, or said anything, within that time."""
    return bool(select.select([sys.stdin.fileno()], [], [], seconds)[0])


def _ui(location: Location, host: str, port: int) -> int:
    if location.database is None:
        raise TrackingError(f"{location} is a server: open its address in a browser.")
    if not location.database.exists():
        raise TrackingError(
            f"{location.database} does not exist. Create it: python -m sia.tracking init"
        )
    mlflow = _mlflow()
    with mlflow.reported(location), mlflow.connected(location):
        found = mlflow.pages(location)
    address = f"http://{host}:{port}"
    print(f"{address}  (a little patience: MLflow takes some seconds to start)")
    for name, path in found.items():
        print(f"  {name}: scores by generation, {address}{path}")
    sys.stdout.flush()
    command = [sys.executable, "-m", "mlflow", "ui"]
    command += ["--backend-store-uri", location.uri, "--host", host, "--port", str(port)]
    command += ["--workers", "1"]  # a page for one person; each worker takes seconds to start
    environment = {
        **child_environment(location),
        # The page needs none of the server's job workers: six processes that may outlive it.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",  # MLflow's about its own libraries
    }
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is closed by now; taking MLflow's modules down takes 0.3 s more
