"""Accuracy over all items of a split; a missing, unknown or repeated answer is wrong."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from sia.tasks.tables import read_submission, read_table

LABEL = "label"
METRIC = "accuracy"


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Scores `submission.csv` against `labels.csv`.

    Raises:
        ValueError: The submission is not a UTF-8 CSV file with the two columns.
    """
    truth = {row["id"]: row["label"] for row in read_table(labels_dir / "labels.csv")}
    rows = read_submission(submission_dir, ("id", LABEL))
    counts = Counter(row["id"] for row in rows)
    answers = {
        row["id"]: row[LABEL]
        for row in rows
        if counts[row["id"]] == 1 and row["id"] in truth and row[LABEL]
    }
    items = {item: float(answers.get(item) == label) for item, label in truth.items()}
    score = sum(items.values()) / len(items)
    recall: dict[str, list[float]] = defaultdict(list)
    for item, label in truth.items():
        recall[label].append(items[item])
    errors = Counter((truth[item], answers[item]) for item in answers if not items[item])
    return {
        "score": score,
        "n_items": len(items),
        "n_answered": len(answers),
        "metrics": {
            METRIC: score,
            "n_repeated": float(sum(counts[item] > 1 for item in truth)),
        },
        "symptoms": {
            "error_share": 1 - score,
            "abstained_share": 1 - len(answers) / len(items),
        },
        "items": items,
        "answers": answers,
        "breakdown": {
            "recall": {
                label: {"n": len(hits), "recall": sum(hits) / len(hits)}
                for label, hits in sorted(recall.items())[:100]
            },
            "confusions": [
                [true, answer, count]
                for (true, answer), count in sorted(
                    errors.items(), key=lambda pair: (-pair[1], pair[0])
                )[:20]
            ],
        },
    }
