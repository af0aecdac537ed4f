"""Throughput of a grid on one machine, and whether its tracking database stays sound.

    python benchmarks/scaling.py --runs 200 --workers 2 4 8

Each row is one grid of toy runs with MLflow on a fresh SQLite database, started as a user would:
`python -m sia -m hydra/launcher=submitit_local`. Nothing is left out of the time: starting each
process, importing, the run, and its mirror.
"""

import argparse
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from sia import rundir


def main() -> None:
    """Prints one row of a Markdown table per number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--generations", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args()
    print(
        "| workers | finished | s | runs a minute | CPU s a run | parents | children "
        "| nested right | incomplete | integrity | load before |"
    )
    print("|" + " --- |" * 11)
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as folder:
            print(_row(Path(folder), args.runs, args.generations, workers), flush=True)


def _row(folder: Path, count: int, generations: int, workers: int) -> str:
    load = os.getloadavg()[0]
    before = _cpu_s()
    started = time.monotonic()
    subprocess.run(
        [
            sys.executable, "-m", "sia", "-m", "task=toy", "meta=scripted", "sandbox=process",
            "tracking=mlflow", f"generations={generations}", f"seed=range({count})",
            "hydra/launcher=submitit_local", f"hydra.launcher.array_parallelism={workers}",
            "hydra.sweep.dir=grid",
        ],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False,
        env={name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
    )  # fmt: skip
    wall_s = time.monotonic() - started
    cpu_s = _cpu_s() - before
    runs = rundir.find_runs(folder / "grid")
    results = [rundir.read_result(run) for run in runs]
    finished = sum(one is not None and one.status == "finished" for one in results)
    incomplete = sum(one is not None and one.tracking != "" for one in results)
    parents, children, nested, integrity = _health(folder / "mlflow.db", runs)
    cells = (
        workers, finished, f"{wall_s:.0f}", f"{60 * count / wall_s:.1f}", f"{cpu_s / count:.1f}",
        parents, children, nested, incomplete, integrity, f"{load:.1f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _health(database: Path, runs: list[Path]) -> tuple[int, int, int, str]:
    """Parents, children, runs whose children are theirs and all there, and SQLite's verdict."""
    with closing(sqlite3.connect(database)) as db:
        (integrity,) = db.execute("PRAGMA integrity_check").fetchone()
        own = dict(db.execute("SELECT run_uuid, value FROM tags WHERE key = 'sia.run_id'"))
        above = dict(
            db.execute("SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'")
        )
    children = Counter(own[parent] for run, parent in above.items() if own[run] == own[parent])
    nested = 0
    for run in runs:
        result = rundir.read_result(run)
        nested += result is not None and children[rundir.read_info(run).run_id] == (
            result.generations
        )
    return len(own) - len(above), len(above), nested, integrity


def _cpu_s() -> float:
    """Of all child processes that have ended, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
