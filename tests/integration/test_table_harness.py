"""The reference harness for tables, as a target: it answers all items, and its knobs pay."""

import csv
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sia import rundir
from sia.records import Evaluation, from_data
from sia.tasks.new import create


def run(tmp_path: Path, task: Path, *args: str) -> list[Evaluation]:
    done = subprocess.run(
        [
            sys.executable, "-m", "sia", "task=folder", f"task.dir={task}", "tracking=none",
            "sandbox=process", "hydra.run.dir=run", *args,
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = rundir.records(tmp_path / "run")
    keys = sorted(key for key in records if key.endswith("/evaluation"))
    return [from_data(records[key], Evaluation) for key in keys]


def test_classes_get_better_with_the_moves(tmp_path: Path) -> None:
    task = create("plants", out=tmp_path / "tasks")
    first, *later = run(tmp_path, task.root, "generations=3")
    assert first.n_answered == first.n_items == 150
    assert first.score is not None
    assert max(found.score or 0 for found in later) > first.score + 0.05
    assert (tmp_path / "run/gen-000/cand-0/agent_execution").is_dir()


@pytest.mark.parametrize("kind", ["linear", "blend"])
def test_numbers_are_answered_by_every_model(tmp_path: Path, kind: str) -> None:
    rng = random.Random(0)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("size", "word", "empty", "y"))
        for k in range(200):
            size = "" if k % 50 == 0 else rng.uniform(1, 1000)
            writer.writerow((size, rng.choice("ab"), "", math.log(size or 1) + rng.gauss(0, 0.01)))
    task = create("logs", out=tmp_path / "tasks", table=tmp_path / "t.csv", label="y")
    harness = task.reference_harness / "harness.yaml"
    text = harness.read_text().replace("kind: linear", f"kind: {kind}")
    harness.write_text(text.replace("logs: false", "logs: true"))
    (found,) = run(tmp_path, task.root, "generations=1")
    assert found.n_answered == found.n_items == 50
    assert found.score is not None
    assert found.score < task.facts.controls["null"]["dev"] * 0.7
