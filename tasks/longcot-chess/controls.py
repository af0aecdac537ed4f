"""The two controls of `longcot-chess`: submissions whose score is known beforehand."""

import re
from pathlib import Path

from sia.tasks.tables import read_table, write_table


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Answer every item of the split with its true label: score 1."""
    answers = [(row["id"], row["label"]) for row in read_table(labels_dir / "labels.csv")]
    _write(submission_dir, answers)


def null(public_dir: Path, submission_dir: Path) -> None:
    """One move for each target, as if all lay in one chain; nothing for the other kind."""
    answers = []
    for row in read_table(public_dir / "items.csv"):
        n_targets = len(re.findall(r"\(\d+, \d+\)", row["prompt"])) - 1
        answers.append((row["id"], str(n_targets) if n_targets > 0 else ""))
    _write(submission_dir, answers)


def _write(submission_dir: Path, answers: list[tuple[str, str]]) -> None:
    columns = ("id", "answer")
    rows = [dict(zip(columns, answer, strict=True)) for answer in answers]
    write_table(submission_dir / "submission.csv", columns, rows)
