"""Score one submission of `gpqa` against one split's labels."""

from collections import Counter
from pathlib import Path
from typing import Any

from sia.tasks.scoring import mean, recall_by, sort_rows
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
    found = sort_rows(
        read_submission(submission_dir, HEADER),
        truth,
        id="id",
        answer="answer",
        readable=lambda row: row["answer"] in LETTERS,
    )
    answers = {item: row["answer"] for item, row in found.answered.items()}

    items = {item: float(answers.get(item) == row["label"]) for item, row in truth.items()}
    score = mean(items.values())
    domains = recall_by(items, truth, "domain")
    recalls = [domain["recall"] for domain in domains.values()]
    letters = Counter(answers.values())
    return {
        "score": score,
        "n_items": len(items),
        "n_answered": len(answers),
        "metrics": {
            "accuracy": score,
            "answered_share": len(answers) / len(items),
            "accuracy_answered": mean(items[item] for item in answers),
            **{
                f"accuracy_{domain.lower()}": domains[domain]["recall"]
                for domain in DOMAINS
                if domain in domains
            },
            "n_duplicated": float(found.duplicated),
            "n_unreadable": float(found.unreadable),
            "n_missing": float(found.missing),
        },
        "symptoms": {
            "abstained_share": 1 - len(answers) / len(items),
            "unreadable_share": found.unreadable / len(items),
            "wrong_when_answered": 1 - mean(items[item] for item in answers) if answers else 0.0,
            "domain_gap": max(recalls) - min(recalls),
            # 0 when all letters are given equally often, 0.75 when it is always the same one.
            "letter_bias": max(letters.values()) / len(answers) - 0.25 if answers else 0.0,
        },
        "items": items,
        "answers": {
            item: "|".join(row["answer"] for row in rows)[:MAX_ANSWER]
            for item, rows in found.given.items()
        },
        "breakdown": {
            "domain": domains,
            "subdomain": recall_by(items, truth, "subdomain"),
            "letters": {
                letter: {
                    "given": letters[letter],
                    "right": sum(row["label"] == letter for row in truth.values()),
                }
                for letter in LETTERS
            },
        },
    }
