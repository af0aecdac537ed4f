"""Score one submission of `longcot-chess` against one split's labels."""

import re
from pathlib import Path
from typing import Any

from sia.tasks.scoring import mean, sort_rows
from sia.tasks.tables import read_submission, read_table

HEADER = ["id", "answer"]
N_MOVES = 3
_NUMBER = re.compile(r"[0-9]{1,6}")


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Accuracy over every item of the split, with what the search may learn from it.

    The denominator is fixed: a missing, empty, unreadable or duplicated answer is wrong. Rows for
    ids outside the split are ignored, because a submission covers dev and test together. Numbers
    are compared as numbers, moves one by one in their order.

    Args:
        submission_dir: Folder with submission.csv (`id,answer`); nothing else is read.
        labels_dir: Folder with labels.csv (`id,label,kind`).

    Returns:
        score, n_items, n_answered, metrics, symptoms, items (id to 0.0 or 1.0), answers (id to what
        was answered) and breakdown
        (recall by kind).

    Raises:
        ValueError: submission.csv is missing, is not UTF-8 or has another header.
    """
    truth = {row["id"]: row for row in read_table(labels_dir / "labels.csv")}
    found = sort_rows(
        read_submission(submission_dir, HEADER),
        truth,
        id="id",
        answer="answer",
        readable=lambda row: parse(row["answer"], truth[row["id"]]["kind"]) is not None,
    )
    answers = {
        item: parse(row["answer"], truth[item]["kind"]) for item, row in found.answered.items()
    }
    expected = {item: parse(row["label"], row["kind"]) for item, row in truth.items()}
    items = {item: float(answers.get(item) == expected[item]) for item in truth}
    by_kind = {
        kind: [item for item, row in truth.items() if row["kind"] == kind]
        for kind in ("knight", "moves")
    }
    # How many moves a tour is longer than it need be, over the knight items with a number.
    excess = [
        answers[item] - expected[item]  # type: ignore[operator]  # both are numbers
        for item in by_kind["knight"]
        if item in answers
    ]
    recall = {
        kind: {"n": len(own), "recall": mean(items[item] for item in own)}
        for kind, own in by_kind.items()
    }
    score = mean(items.values())
    return {
        "score": score,
        "n_items": len(items),
        "n_answered": len(answers),
        "metrics": {
            "accuracy": score,
            "accuracy_knight": recall["knight"]["recall"],
            "accuracy_moves": recall["moves"]["recall"],
            "n_duplicated": float(found.duplicated),
            "n_unreadable": float(found.unreadable),
            "n_missing": float(found.missing),
        },
        "symptoms": {
            "abstained_share": 1 - len(answers) / len(items),
            "too_long_share": mean(float(e > 0) for e in excess),
            "too_short_share": mean(float(e < 0) for e in excess),
            "mean_excess": mean(float(e) for e in excess),
            "moves_missed_share": 1 - recall["moves"]["recall"] if by_kind["moves"] else 0.0,
        },
        "items": items,
        "answers": {item: row["answer"] for item, row in found.answered.items()},
        "breakdown": {"recall": recall},
    }


def parse(text: str, kind: str) -> int | list[str] | None:
    """A number, or three moves; None when the text is neither."""
    if kind == "knight":
        return int(text) if _NUMBER.fullmatch(text) else None
    moves = text.split()
    return moves if len(moves) == N_MOVES else None
