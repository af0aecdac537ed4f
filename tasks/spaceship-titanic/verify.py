"""Score one submission of `spaceship-titanic` against one split's labels."""

from collections import Counter
from pathlib import Path
from typing import Any

from sia.tasks.scoring import mean, recall_by, sort_rows
from sia.tasks.tables import read_submission, read_table

HEADER = ["PassengerId", "Transported"]
ANSWERS = ("yes", "no")


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Accuracy over every item of the split, with what the search may learn from it.

    The denominator is fixed: a missing, empty, unknown or duplicated answer is wrong. Rows for
    passengers outside the split are ignored, because a submission covers dev and test together.

    Args:
        submission_dir: Folder with submission.csv (`PassengerId,Transported`).
        labels_dir: Folder with labels.csv, as `prepare` writes it.

    Returns:
        score, n_items, n_answered, metrics, symptoms, items (id to 0.0 or 1.0), answers (id to what
        was answered) and breakdown
        (recall by answer, sleep and planet; the two confusions).

    Raises:
        ValueError: submission.csv is missing, is not UTF-8 or has another header.
    """
    truth = {row["id"]: row for row in read_table(labels_dir / "labels.csv")}
    found = sort_rows(
        read_submission(submission_dir, HEADER),
        truth,
        id="PassengerId",
        answer="Transported",
        readable=lambda row: row["Transported"] in ANSWERS,
    )
    answers = {item: row["Transported"] for item, row in found.answered.items()}

    items = {item: float(answers.get(item) == row["label"]) for item, row in truth.items()}
    score = mean(items.values())
    recall = recall_by(items, truth, "label")
    asleep = recall_by(items, truth, "asleep")
    errors = Counter((truth[i]["label"], answers[i]) for i in sorted(answers) if not items[i])
    alone = mean(hit for item, hit in items.items() if truth[item]["group_size"] == "1")
    together = mean(hit for item, hit in items.items() if truth[item]["group_size"] != "1")
    return {
        "score": score,
        "n_items": len(items),
        "n_answered": len(answers),
        "metrics": {
            "accuracy": score,
            "accuracy_new_group": mean(
                hit for item, hit in items.items() if truth[item]["group_in_train"] == "0"
            ),
            "n_duplicated": float(found.duplicated),
            "n_unknown_answer": float(found.unreadable),
            "n_missing": float(found.missing),
        },
        "symptoms": {
            "abstained_share": 1 - len(answers) / len(items),
            "error_share": 1 - score,
            "error_share_awake": 1 - asleep.get("False", {"recall": 1.0})["recall"],
            "recall_gap": recall.get("yes", {"recall": 0.0})["recall"]
            - recall.get("no", {"recall": 0.0})["recall"],
            "group_gap": alone - together,
        },
        "items": items,
        "answers": answers,
        "breakdown": {
            "recall": recall,
            "asleep": asleep,
            "planet": recall_by(items, truth, "planet"),
            "confusions": [[true, answer, count] for (true, answer), count in errors.most_common()],
        },
    }
