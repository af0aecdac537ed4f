"""Error over all items of a split; no answer costs as much as the whole range of the labels."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from sia.tasks.tables import read_submission, read_table

LABEL = "label"
METRIC = "rmse"  # or mae


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Scores `submission.csv` against `labels.csv`.

    An answer that is missing, repeated, or no finite number has the largest distance that two
    labels of the split have.

    Raises:
        ValueError: The submission is not a UTF-8 CSV file with the two columns.
    """
    truth = {row["id"]: float(row["label"]) for row in read_table(labels_dir / "labels.csv")}
    rows = read_submission(submission_dir, ("id", LABEL))
    counts = Counter(row["id"] for row in rows)
    answers = {
        row["id"]: number
        for row in rows
        if counts[row["id"]] == 1
        and row["id"] in truth
        and (number := _number(row[LABEL])) is not None
    }
    span = max(truth.values()) - min(truth.values())
    errors = {
        item: abs(answers[item] - label) if item in answers else span
        for item, label in truth.items()
    }
    mae = sum(errors.values()) / len(errors)
    rmse = math.sqrt(sum(error**2 for error in errors.values()) / len(errors))
    mean = sum(truth.values()) / len(truth)
    spread = math.sqrt(sum((label - mean) ** 2 for label in truth.values()) / len(truth))
    bias = sum(answers[item] - truth[item] for item in answers) / max(1, len(answers))
    return {
        "score": {"rmse": rmse, "mae": mae}[METRIC],
        "n_items": len(truth),
        "n_answered": len(answers),
        "metrics": {
            "rmse": rmse,
            "mae": mae,
            "r2": 1 - (rmse / spread) ** 2 if spread else 0.0,
            "n_repeated": float(sum(counts[item] > 1 for item in truth)),
        },
        "symptoms": {
            "error_share": rmse / spread if spread else 0.0,  # of the labels' deviation
            "bias": bias / spread if spread else 0.0,
            "abstained_share": 1 - len(answers) / len(truth),
        },
        # Statistics over items need a score that is their mean; a root mean square is not.
        "items": errors if METRIC == "mae" else {},
        "answers": {item: repr(answer) for item, answer in answers.items()},
    }


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < 1e150 else None
