"""Score one submission of `lawbench` against one split's labels."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sia.tasks.scoring import mean, recall_by, sort_rows
from sia.tasks.tables import read_submission, read_table

HEADERS = (["id", "label"], ["id", "label", "alternatives"])
TOP_K = 5
LONG_TEXT = 600  # characters; about every seventh text is longer
RARE_LABEL = 15  # training rows
N_CONFUSED_PAIRS = 20


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Accuracy over every item of the split, with what the search may learn from it.

    The denominator is fixed: a missing, empty, unknown or duplicated answer is wrong. Rows for
    ids outside the split are ignored, because a submission covers dev and test together. Only
    `submission.csv` is opened.

    Args:
        submission_dir: Folder with submission.csv (`id,label[,alternatives]`).
        labels_dir: Folder with labels.csv and labels.json, as `prepare` writes them.

    Returns:
        score, n_items, n_answered, metrics, symptoms, items (id to 0.0 or 1.0), answers (id to what
        was answered) and breakdown
        (recall by label, most frequent confusions).

    Raises:
        ValueError: submission.csv is missing, is not UTF-8 or has another header.
    """
    truth = {row["id"]: row for row in read_table(labels_dir / "labels.csv")}
    labels = set(json.loads((labels_dir / "labels.json").read_text(encoding="utf-8")))
    found = sort_rows(
        read_submission(submission_dir, *HEADERS),
        truth,
        id="id",
        answer="label",
        readable=lambda row: row["label"] in labels,
    )
    answers = {item: row["label"] for item, row in found.answered.items()}
    in_top: dict[str, bool] = {}
    for item, row in found.answered.items():
        others = [a for a in row["alternatives"].split("|") if a and a != row["label"]]
        in_top[item] = truth[item]["label"] in [row["label"], *others][:TOP_K]

    items = {item: float(answers.get(item) == true["label"]) for item, true in truth.items()}
    score = mean(items.values())
    recall = recall_by(items, truth, "label")
    errors = [(truth[i]["label"], answers[i]) for i in answers if not items[i]]
    return {
        "score": score,
        "n_items": len(items),
        "n_answered": len(answers),
        "metrics": {
            "accuracy": score,
            "macro_recall": mean(r["recall"] for r in recall.values()),
            "top5": mean(float(in_top.get(item, False)) for item in items),
            "accuracy_unseen_text": mean(
                hit for item, hit in items.items() if truth[item]["in_train"] == "0"
            ),
            "n_duplicated": float(found.duplicated),
            "n_unknown_label": float(found.unreadable),
            "n_missing": float(found.missing),
        },
        "symptoms": {
            "abstained_share": 1 - len(answers) / len(items),
            "in_top5_share": mean(
                float(in_top.get(item, False) and not hit) for item, hit in items.items()
            ),
            "confused_pair_share": _confused_pair_share(errors),
            "long_text_gap": _gap(items, truth, "n_chars", LONG_TEXT, more_is_harder=True),
            "rare_label_gap": _gap(items, truth, "n_train", RARE_LABEL, more_is_harder=False),
        },
        "items": items,
        "answers": answers,
        "breakdown": {
            "recall": recall,
            "confusions": [
                [true, answer, count] for (true, answer), count in _most_common(Counter(errors))
            ],
        },
    }


def _confused_pair_share(errors: list[tuple[str, str]]) -> float:
    """Share of the errors that fall in the most frequent unordered label pairs."""
    pairs = Counter((min(pair), max(pair)) for pair in errors)
    return sum(count for _, count in _most_common(pairs)) / len(errors) if errors else 0.0


def _gap(
    items: dict[str, float],
    truth: dict[str, dict[str, str]],
    column: str,
    limit: int,
    *,
    more_is_harder: bool,
) -> float:
    """Accuracy of the easy side minus that of the hard side; 0 when one side is empty."""
    above = [hit for item, hit in items.items() if int(truth[item][column]) > limit]
    rest = [hit for item, hit in items.items() if int(truth[item][column]) <= limit]
    if not above or not rest:
        return 0.0
    easy, hard = (rest, above) if more_is_harder else (above, rest)
    return mean(easy) - mean(hard)


def _most_common(counts: Counter[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ordered[:N_CONFUSED_PAIRS]
