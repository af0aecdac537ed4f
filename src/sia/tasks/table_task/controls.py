"""The two ends of the metric: the labels themselves, and one constant answer."""

from collections import Counter
from pathlib import Path

from sia.tasks.tables import Row, read_table, write_table

LABEL = "label"
NUMBERS = False  # whether labels are numbers


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Submits the private labels."""
    labels = read_table(labels_dir / "labels.csv")
    _submit(submission_dir, [{"id": row["id"], LABEL: row["label"]} for row in labels])


def null(public_dir: Path, submission_dir: Path) -> None:
    """Answers the mean of train, or its most frequent label, to everything."""
    labels = [row[LABEL] for row in read_table(public_dir / "train.csv")]
    if NUMBERS:
        answer = repr(sum(map(float, labels)) / len(labels))
    else:
        counts = Counter(labels)
        answer = min(counts, key=lambda label: (-counts[label], label))
    items = read_table(public_dir / "items.csv")
    _submit(submission_dir, [{"id": row["id"], LABEL: answer} for row in items])


def _submit(submission_dir: Path, rows: list[Row]) -> None:
    write_table(submission_dir / "submission.csv", ("id", LABEL), rows)
