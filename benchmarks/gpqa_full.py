"""All 198 questions of GPQA Diamond for one examined run.

    python -m sia task=gpqa target=smollm2 meta=scripted generations=1 hydra.run.dir=runs/gpqa
    python -m sia.exam runs/gpqa --no-final-refit
    python benchmarks/gpqa_full.py runs/gpqa --row "reference harness"

Published figures are over all 198, without labelled examples. The run answers the 75 dev and the 75
test questions; here its harness answers the 48 train questions too, shown as items without
labels, with an empty train.csv. The test labels are not opened: their score is that of `exam.json`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from sia import build, rundir
from sia.config import Config, register
from sia.gateway.protocol import Role
from sia.records import Outcome
from sia.tasks.tables import read_submission, read_table, write_table


def main() -> None:
    """Prints the parts and the whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="an examined run of gpqa")
    parser.add_argument("--row", default="best by dev", help="whose answers (default: %(default)s)")
    args = parser.parse_args()
    exam = rundir.read_exam(args.run)
    if exam is None:
        parser.error(f"{args.run} has not been examined: python -m sia.exam {args.run}")
    row = next((row for row in exam.rows if row.name == args.row and row.candidate), None)
    if row is None or row.dev is None or row.test is None:
        parser.error(f"the exam has no recorded candidate in a row {args.row!r}")
    right, seconds = score_train(args.run, harness_of(args.run, str(row.candidate)))
    parts = {
        "train": (right, 48),
        "dev": (round(row.dev * 75), 75),
        "test": (round(row.test * 75), 75),
    }
    parts["all"] = (sum(n for n, _ in parts.values()), sum(of for _, of in parts.values()))
    print("| split | right | of | accuracy |\n| --- | --- | --- | --- |")
    for name, (n, of) in parts.items():
        print(f"| {name} | {n} | {of} | {n / of:.4f} |")
    print(f"\ndev and test answered in {row.seconds:.0f} s, train in {seconds:.0f} s")


def harness_of(run: Path, candidate: str) -> Path:
    """The harness that a candidate ran."""
    generation, index = candidate.removeprefix("g").split("-c")
    return rundir.candidate_dir(run, int(generation), int(index)) / "harness"


def score_train(run: Path, harness: Path) -> tuple[int, float]:
    """How many of the train questions the harness answers rightly, and in how many seconds."""
    register()
    cfg = cast(Config, OmegaConf.load(run / rundir.CONFIG_FILE))
    checked = build.check(cfg)
    task = checked.task
    train = read_table(task.public_dir / "train.csv")
    columns = list(train[0])
    with tempfile.TemporaryDirectory(prefix="sia-gpqa-") as scratch:
        public, out = Path(scratch) / "public", Path(scratch) / "out"
        public.mkdir()
        write_table(public / "items.csv", [name for name in columns if name != "label"], train)
        write_table(public / "train.csv", columns, [])
        (public / "task.md").write_text((task.public_dir / "task.md").read_text("utf-8"), "utf-8")
        with build.gateway(cfg, Path(scratch), (Role.TARGET,)) as gateway:
            target = build.target(cfg, task, checked.sandbox, data=public, gateway=gateway)
            deadline_s = build.limits(cfg, task).attempt_s
            attempt = target.run("train", harness=harness, out=out, deadline_s=deadline_s)
        if attempt.outcome is not Outcome.OK:
            raise SystemExit(f"the harness failed on the train questions: {attempt.reason}")
        answers = {
            r["id"]: r["answer"] for r in read_submission(out / "submission", ("id", "answer"))
        }
        usage = json.loads((out / "usage.json").read_bytes())
    return sum(answers.get(r["id"]) == r["label"] for r in train), usage["wall_s"]


if __name__ == "__main__":
    main()
