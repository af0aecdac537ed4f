"""The two ends of the metric: all right, and one constant answer."""

from pathlib import Path

from sia.tasks.tables import Row, read_table, write_table


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Submits the private labels themselves."""
    _submit(submission_dir, read_table(labels_dir / "labels.csv"))


def null(public_dir: Path, submission_dir: Path) -> None:
    """Answers `small` to everything."""
    items = read_table(public_dir / "items.csv")
    _submit(submission_dir, [{"id": row["id"], "label": "small"} for row in items])


def _submit(submission_dir: Path, answers: list[Row]) -> None:
    write_table(submission_dir / "submission.csv", ("id", "label"), answers)
