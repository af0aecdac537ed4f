"""Score one submission of `gpqa` against one split's labels."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sia.tasks.tables import read_submission, read_table

HEADER = ["id", "answer"]
LETTERS = ("A", "B", "C", "D")
DOMAINS = ("Biology", "Chemistry", "Physics")
MAX_ANSWER = 200  # characters of an answer that are handed on


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Accuracy over every item of the split, with what the search may learn from it.

    The denominator is fixed: a missing, empty, unreadable or duplicated answer is wrong, and only
    one of the four letters, alone, is readable. Rows for ids outside the split are ignored, because
    a submission covers dev and test together.

    Args:
        submission_dir: Folder with submission.csv (`id,answer`); nothing else is read.
        labels_dir: Folder with labels.csv, as `prepare` writes it.

    Returns:
        score, n_items, n_answered, metrics, symptoms, items (id to 0.0 or 1.0), answers (id to what
        was handed in) and breakdown (recall by domain and subdomain, how often each letter was
        given and right).

    Raises:
        ValueError: submission.csv is missing, is not UTF-8 or has another header.
    """
    truth = {row["id"]: row for row in read_table(labels_dir / "labels.csv")}
    given: dict[str, list[str]] = defaultdict(list)
    for row in read_submission(submission_dir, HEADER):
        if row["id"] in truth:
            given[row["id"]].append(row["answer"])

    answers: dict[str, str] = {}
    faults: Counter[str] = Counter()
    for item in truth:
        if len(given[item]) > 1:
            faults["duplicated"] += 1
        elif not given[item] or not given[item][0]:
            faults["missing"] += 1
        elif given[item][0] not in LETTERS:
            faults["unreadable"] += 1
        else:
            answers[item] = given[item][0]

    items = {item: float(answers.get(item) == row["label"]) for item, row in truth.items()}
    score = _mean(items.values())
    domains = _by(items, truth, "domain")
    recalls = [found["recall"] for found in domains.values()]
    letters = Counter(answers.values())
    return {
        "score": score,
        "n_items": len(items),
        "n_answered": len(answers),
        "metrics": {
            "accuracy": score,
            "answered_share": len(answers) / len(items),
            "accuracy_answered": _mean(items[item] for item in answers),
            **{
                f"accuracy_{domain.lower()}": domains[domain]["recall"]
                for domain in DOMAINS
                if domain in domains
            },
            "n_duplicated": float(faults["duplicated"]),
            "n_unreadable": float(faults["unreadable"]),
            "n_missing": float(faults["missing"]),
        },
        "symptoms": {
            "abstained_share": 1 - len(answers) / len(items),
            "unreadable_share": faults["unreadable"] / len(items),
            "wrong_when_answered": 1 - _mean(items[item] for item in answers) if answers else 0.0,
            "domain_gap": max(recalls) - min(recalls),
            # 0 when all letters are given equally often, 0.75 when it is always the same one.
            "letter_bias": max(letters.values()) / len(answers) - 0.25 if answers else 0.0,
        },
        "items": items,
        "answers": {item: "|".join(given[item])[:MAX_ANSWER] for item in truth},
        "breakdown": {
            "domain": domains,
            "subdomain": _by(items, truth, "subdomain"),
            "letters": {
                letter: {
                    "given": letters[letter],
                    "right": sum(row["label"] == letter for row in truth.values()),
                }
                for letter in LETTERS
            },
        },
    }


def _by(
    items: dict[str, float], truth: dict[str, dict[str, str]], column: str
) -> dict[str, dict[str, float]]:
    """Share of right answers for each value of a column."""
    hits: dict[str, list[float]] = defaultdict(list)
    for item, hit in items.items():
        hits[truth[item][column]].append(hit)
    return {value: {"n": len(hits[value]), "recall": _mean(hits[value])} for value in sorted(hits)}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
