"""What may be trained on: the train items of the public side, and the reward of an answer."""

import csv
from pathlib import Path
from typing import Any

Item = dict[str, Any]


def items(public_dir: Path) -> list[Item]:
    """Train items with their labels, in the order of the file."""
    return [
        {"id": row["id"], "prompt": row["text"], "reference": row["label"]}
        for row in _rows(public_dir / "train.csv")
    ]


def reward(item: Item, answer: str) -> float:
    """1 for the right label, 0 for any other answer."""
    return float(answer == item["reference"])


def questions(public_dir: Path) -> list[Item]:
    """Items without labels: those of dev and test, which nothing tells apart."""
    return [{"id": row["id"], "prompt": row["text"]} for row in _rows(public_dir / "items.csv")]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
