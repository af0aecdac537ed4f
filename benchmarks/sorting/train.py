"""Sort four digits: `7204>` wants `0247`. The reward is the share of places that are right."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGITS = 4
TRAIN, HELD_OUT = 2000, 500


def numbers() -> list[str]:
    """All items in one fixed order: the first `TRAIN` are trained on, the last held out."""
    found = [f"{n:0{DIGITS}}" for n in range(10**DIGITS)]
    random.Random(0).shuffle(found)
    return found[: TRAIN + HELD_OUT]


def items(public: Path) -> list[dict[str, Any]]:
    """Train items; they are made, not read."""
    return [_item(number) for number in numbers()[:TRAIN]]


def held_out() -> list[dict[str, Any]]:
    """Items that no update sees."""
    return [_item(number) for number in numbers()[TRAIN:]]


def reward(item: Mapping[str, Any], answer: str) -> float:
    """Share of right places; 0 for an answer of another length."""
    return sum(gain for _, gain in steps(item, answer))


def steps(item: Mapping[str, Any], answer: str) -> list[tuple[int, float]]:
    """The same reward at the places that earn it."""
    reference = item["reference"]
    if len(answer) != len(reference):
        return []
    return [
        (place + 1, (given == right) / DIGITS)
        for place, (given, right) in enumerate(zip(answer, reference, strict=True))
    ]


def _item(number: str) -> dict[str, Any]:
    return {"id": number, "prompt": f"{number}>", "reference": "".join(sorted(number))}
