"""The two controls of `spaceship-titanic`: submissions whose score is known beforehand."""

from collections import Counter
from pathlib import Path

from sia.tasks.tables import read_table, write_table


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Answer every item of the split with its true label: score 1."""
    answers = [(row["id"], row["label"]) for row in read_table(labels_dir / "labels.csv")]
    _write(submission_dir, answers)


def null(public_dir: Path, submission_dir: Path) -> None:
    """Answer every item with train's more frequent answer."""
    counts = Counter(row["Transported"] for row in read_table(public_dir / "train.csv"))
    answer = min(counts, key=lambda name: (-counts[name], name))
    items = read_table(public_dir / "items.csv")
    _write(submission_dir, [(row["PassengerId"], answer) for row in items])


def _write(submission_dir: Path, answers: list[tuple[str, str]]) -> None:
    columns = ("PassengerId", "Transported")
    rows = [dict(zip(columns, answer, strict=True)) for answer in answers]
    write_table(submission_dir / "submission.csv", columns, rows)
