"""What may be trained on: numbers with their labels, some of them wrong, as a question in words."""

import csv
from pathlib import Path
from typing import Any


def items(public_dir: Path) -> list[dict[str, Any]]:
    """Train items, in the order of the file."""
    with (public_dir / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {"id": row["id"], "prompt": f"Is {row['x']} large or small?", "reference": row["label"]}
        for row in rows
    ]


def reward(item: dict[str, Any], answer: str) -> float:
    """1 for the label, 0 for anything else."""
    return float(answer.strip().lower() == item["reference"])
