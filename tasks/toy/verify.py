"""Accuracy over all items of a split; a missing, unknown or repeated answer is wrong."""

from collections import Counter
from pathlib import Path
from typing import Any

from sia.tasks.tables import read_submission, read_table


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Scores `submission.csv` against `labels.csv`.

    Raises:
        ValueError: The submission is not a UTF-8 CSV file with the columns id and label.
    """
    truth = {row["id"]: row["label"] for row in read_table(labels_dir / "labels.csv")}
    rows = read_submission(submission_dir, ("id", "label"))
    counts = Counter(row["id"] for row in rows)
    answers = {row["id"]: row["label"] for row in rows if counts[row["id"]] == 1}
    items = {item: float(answers.get(item) == label) for item, label in truth.items()}
    large = [item for item, label in truth.items() if label == "large"]
    small = [item for item, label in truth.items() if label == "small"]
    recall = {
        "large": sum(items[item] for item in large) / len(large),
        "small": sum(items[item] for item in small) / len(small),
    }
    return {
        "score": sum(items.values()) / len(items),
        "n_items": len(items),
        "n_answered": sum(item in answers for item in truth),
        "metrics": {"n_duplicated": float(sum(counts[item] > 1 for item in truth))},
        "symptoms": {"recall_gap": recall["large"] - recall["small"]},
        "breakdown": {"recall": recall},
        "items": items,
        "answers": {item: answers[item] for item in truth if item in answers},
    }
