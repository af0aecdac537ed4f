"""Score one submission of `lawbench` against one split's labels."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read_submission(submission_dir, *HEADERS):
        if row["id"] in truth:
            rows[row["id"]].append(row)

    answers: dict[str, str] = {}
    in_top: dict[str, bool] = {}
    faults: Counter[str] = Counter()
    for item, true in truth.items():
        fault = _fault(rows[item], labels)
        if fault:
            faults[fault] += 1
            continue
        answer = rows[item][0]["label"]
        answers[item] = answer
        others = [a for a in rows[item][0]["alternatives"].split("|") if a and a != answer]
        in_top[item] = true["label"] in [answer, *others][:TOP_K]

    items = {item: float(answers.get(item) == true["label"]) for item, true in truth.items()}
    score = _mean(items.values())
    recall = _recall(items, truth)
    errors = [(truth[i]["label"], answers[i]) for i in answers if not items[i]]
    return {
        "score": score,
        "n_items": len(items),
        "n_answered": len(answers),
        "metrics": {
            "accuracy": score,
            "macro_recall": _mean(r["recall"] for r in recall.values()),
            "top5": _mean(float(in_top.get(item, False)) for item in items),
            "accuracy_unseen_text": _mean(
                hit for item, hit in items.items() if truth[item]["in_train"] == "0"
            ),
            "n_duplicated": float(faults["duplicated"]),
            "n_unknown_label": float(faults["unknown_label"]),
            "n_missing": float(faults["missing"]),
        },
        "symptoms": {
            "abstained_share": 1 - len(answers) / len(items),
            "in_top5_share": _mean(
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


def _fault(rows: list[dict[str, str]], labels: set[str]) -> str | None:
    if len(rows) > 1:
        return "duplicated"
    if not rows or not rows[0]["label"]:
        return "missing"
    return None if rows[0]["label"] in labels else "unknown_label"


def _recall(
    items: dict[str, float], truth: dict[str, dict[str, str]]
) -> dict[str, dict[str, float]]:
    hits: dict[str, list[float]] = defaultdict(list)
    for item, hit in items.items():
        hits[truth[item]["label"]].append(hit)
    return {label: {"n": len(hits[label]), "recall": _mean(hits[label])} for label in sorted(hits)}


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
    return _mean(easy) - _mean(hard)


def _most_common(counts: Counter[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ordered[:N_CONFUSED_PAIRS]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
