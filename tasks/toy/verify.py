"""Accuracy over all items of a split; a missing, unknown or repeated answer is wrong."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Scores `submission.csv` against `labels.csv`.

    Raises:
        ValueError: The submission is not a UTF-8 CSV file with the columns id and label.
    """
    truth = {row["id"]: row["label"] for row in _read(labels_dir / "labels.csv")}
    rows = _read(submission_dir / "submission.csv")
    if rows and not {"id", "label"} <= rows[0].keys():
        raise ValueError("submission.csv has no columns id and label")
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
    }


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name} is not a UTF-8 CSV file: {error}") from error
