"""The two controls of `gpqa`: submissions whose score is known beforehand."""

from pathlib import Path

from sia.tasks.tables import read_table, write_table


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Answer every item of the split with its true letter: score 1."""
    answers = [(row["id"], row["label"]) for row in read_table(labels_dir / "labels.csv")]
    _write(submission_dir, answers)


def null(public_dir: Path, submission_dir: Path) -> None:
    """Answer every item with A: what chance scores."""
    _write(submission_dir, [(row["id"], "A") for row in read_table(public_dir / "items.csv")])


def _write(submission_dir: Path, answers: list[tuple[str, str]]) -> None:
    columns = ("id", "answer")
    rows = [dict(zip(columns, answer, strict=True)) for answer in answers]
    write_table(submission_dir / "submission.csv", columns, rows)
