"""What each lever is worth: the best candidates of several runs, by arm, on the same sealed items.

    python -m sia -m experiment=lawbench_levers sweep=levers     # nine runs of 15 minutes
    python -m sia.exam RUN                                       # each of them
    python benchmarks/levers.py RUN... --out reports/lawbench_levers.md

An arm is what a run was allowed to choose (`levers`). Differences to the arm `harness` are taken
item by item between runs of the same seed and averaged over seeds; their interval is a bootstrap
over items, 10,000 draws, in which the runs of all seeds lose and keep the same items. It says
nothing about other seeds: their spread stands beside it.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from sia import rundir
from sia.errors import RunDirectoryError, SiaError
from sia.records import ExamRow

BEST = "best by dev"  # row of the exam
DRAWS = 10_000
ARMS = {
    ("harness", "stop"): "harness",
    ("weights", "stop"): "weights",
    ("harness", "weights", "stop"): "both",
}


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One run, as its exam left it."""

    path: Path
    run_id: str
    arm: str
    seed: int
    row: ExamRow
    generations: int
    updates: int
    wall_s: float


def main() -> int:
    """Prints and writes the table. Exit code 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    try:
        text = table([read(path) for path in arguments.runs])
    except SiaError as error:
        print(f"benchmarks/levers.py: {error}", file=sys.stderr)
        return error.exit_code
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 0


def read(path: Path) -> Examined:
    """An examined run.

    Raises:
        RunDirectoryError: It has no exam yet, or is no run of the levers' experiment.
    """
    exam = rundir.read_exam(path)
    if exam is None:
        raise RunDirectoryError(f"{path} has not been examined. Do it: python -m sia.exam {path}")
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    arm = ARMS.get(tuple(config["levers"]))
    if arm is None:
        raise RunDirectoryError(f"{path} was run with levers={config['levers']}: no arm of these.")
    records = rundir.records(path)
    result = rundir.read_result(path)
    assert result is not None  # an examined run has ended
    return Examined(
        path=path,
        run_id=exam.run_id,
        arm=arm,
        seed=int(config["seed"]),
        row=next(row for row in exam.rows if row.name == BEST),
        generations=result.generations,
        updates=sum(key.endswith("/update") for key in records),
        wall_s=rundir.read_journal(path)[-1].elapsed_s,
    )


def table(runs: list[Examined]) -> str:
    """The report: every run, then each arm against `harness`."""
    lines = [
        "## What each lever is worth",
        "",
        "Made by `python benchmarks/levers.py`; see there for how. Chosen by dev alone.",
        "",
        "| arm | seed | dev | sealed test | generations | updates | seconds | run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in sorted(runs, key=lambda run: (list(ARMS.values()).index(run.arm), run.seed)):
        lines.append(
            f"| {run.arm} | {run.seed} | {run.row.dev:.4f} | {run.row.test:.4f} | "
            f"{run.generations} | {run.updates} | {run.wall_s:.0f} | {run.run_id} |"
        )
    lines += [
        "",
        "| arm | seeds | mean sealed test | of seeds | minus harness, points | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    by_arm: dict[str, dict[int, Examined]] = defaultdict(dict)
    for run in runs:
        by_arm[run.arm][run.seed] = run
    for arm in ARMS.values():
        own = by_arm[arm]
        if not own:
            continue
        scores = [run.row.test for run in own.values() if run.row.test is not None]
        shared = sorted(set(own) & set(by_arm["harness"])) if arm != "harness" else []
        against = "| |"
        if shared:
            pairs = [(own[seed].row, by_arm["harness"][seed].row) for seed in shared]
            difference, low, high = paired(pairs)
            against = f"{difference:+.2f} | {low:+.2f} to {high:+.2f} |"
        lines.append(
            f"| {arm} | {len(scores)} | {np.mean(scores):.4f} | "
            f"{min(scores):.4f} to {max(scores):.4f} | {against}"
        )
    return "\n".join(lines) + "\n"


def paired(pairs: list[tuple[ExamRow, ExamRow]]) -> tuple[float, float, float]:
    """Mean difference in points, and its 95 % interval over items."""
    items = sorted(pairs[0][0].items)
    mean_of_seeds = np.mean(
        [[one.items[item] - other.items[item] for item in items] for one, other in pairs], axis=0
    )
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(items), (DRAWS, len(items)))
    low, high = np.quantile(mean_of_seeds[draws].mean(1), [0.025, 0.975])
    return 100 * float(mean_of_seeds.mean()), 100 * float(low), 100 * float(high)


if __name__ == "__main__":
    sys.exit(main())
