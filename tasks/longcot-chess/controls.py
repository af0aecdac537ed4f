"""The two controls of `longcot-chess`: submissions whose score is known beforehand."""

import csv
import re
from pathlib import Path


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Answer every item of the split with its true label: score 1."""
    answers = [(row["id"], row["label"]) for row in _read(labels_dir / "labels.csv")]
    _write(submission_dir, answers)


def null(public_dir: Path, submission_dir: Path) -> None:
    """One move for each target, as if all lay in one chain; nothing for the other kind."""
    answers = []
    for row in _read(public_dir / "items.csv"):
        n_targets = len(re.findall(r"\(\d+, \d+\)", row["prompt"])) - 1
        answers.append((row["id"], str(n_targets) if n_targets > 0 else ""))
    _write(submission_dir, answers)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(submission_dir: Path, answers: list[tuple[str, str]]) -> None:
    submission_dir.mkdir(parents=True, exist_ok=True)
    path = submission_dir / "submission.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "answer"])
        writer.writerows(answers)
