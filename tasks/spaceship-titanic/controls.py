"""The two controls of `spaceship-titanic`: submissions whose score is known beforehand."""

import csv
from collections import Counter
from pathlib import Path


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Answer every item of the split with its true label: score 1."""
    answers = [(row["id"], row["label"]) for row in _read(labels_dir / "labels.csv")]
    _write(submission_dir, answers)


def null(public_dir: Path, submission_dir: Path) -> None:
    """Answer every item with train's more frequent answer."""
    counts = Counter(row["Transported"] for row in _read(public_dir / "train.csv"))
    answer = min(counts, key=lambda name: (-counts[name], name))
    _write(
        submission_dir, [(row["PassengerId"], answer) for row in _read(public_dir / "items.csv")]
    )


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(submission_dir: Path, answers: list[tuple[str, str]]) -> None:
    submission_dir.mkdir(parents=True, exist_ok=True)
    path = submission_dir / "submission.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["PassengerId", "Transported"])
        writer.writerows(answers)
