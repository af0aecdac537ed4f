"""Reading the public folder, and the ways to look at one text."""

import csv
import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import jieba

jieba.setLogLevel(logging.WARNING)

Part = Literal["whole", "head", "tail"]

NUMBER = re.compile(r"[0-9０-９]+(?:\.[0-9]+)?")
BLANKED = re.compile(r"[×＊*xX]{3,}")
# A surname, 某, and what tells several people of that name apart: 张某某, 李某甲, 王某1.
PERSON = re.compile(r"[\u4e00-\u9fff]某[某甲乙丙丁戊己庚辛]*(?:[0-9](?![0-9.]))?")
DATE = re.compile(r"[0-9]+年(?:[0-9]+月)?(?:[0-9]+日)?(?:[0-9]+时)?")
# The town in front of a court or prosecutor: cases from one town are not cases of one charge.
COURT = re.compile(r"[\u4e00-\u9fff]{2,20}?(人民检察院|检察院|检察机关|人民法院)")
CLAUSE_ENDS = frozenset("，。；：、！？")
SENTENCE_ENDS = frozenset("。；！？")
PAIR_REACH = 12


@dataclass(frozen=True)
class Cases:
    """Train and items of one public folder; `answers[i]` is the label index of `train_texts[i]`."""

    train_ids: list[str]
    train_texts: list[str]
    answers: list[int]
    item_ids: list[str]
    item_texts: list[str]
    labels: list[str]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What differs from case to case and is replaced by one sign for its kind."""

    numbers: bool
    persons: bool
    dates: bool
    courts: bool


def read_cases(dataset_dir: Path) -> Cases:
    """Everything the target gets, in the order of the files."""
    labels: list[str] = json.loads((dataset_dir / "labels.json").read_text(encoding="utf-8"))
    index = {label: k for k, label in enumerate(labels)}
    train = _rows(dataset_dir / "train.csv")
    items = _rows(dataset_dir / "items.csv")
    return Cases(
        train_ids=[row["id"] for row in train],
        train_texts=[row["text"] for row in train],
        answers=[index[row["label"]] for row in train],
        item_ids=[row["id"] for row in items],
        item_texts=[row["text"] for row in items],
        labels=labels,
    )


def mask_text(text: str, mask: Mask) -> str:
    """The text with the chosen kinds masked; dates first, because they are made of numbers."""
    if mask.dates:
        text = DATE.sub("日", text)
    if mask.persons:
        text = PERSON.sub("某", text)
    if mask.courts:
        text = COURT.sub(r"\1", text)
    if mask.numbers:
        text = BLANKED.sub("××", NUMBER.sub("0", text))
    return text


def take_part(text: str, part: Part, chars: int) -> str:
    """The first or last `chars` characters, or all of them."""
    if part == "head":
        return text[:chars]
    return text[-chars:] if part == "tail" else text


@cache
def words(text: str) -> tuple[str, ...]:
    """Jieba words, punctuation included; kept, because several views ask for the same text."""
    return tuple(jieba.cut(text))


def word_pairs(text: str, ends: frozenset[str]) -> list[str]:
    """Pairs of longer words that share a clause or sentence, whatever stands between them.

    Who did what to whom is spread over a clause, out of the reach of n-grams. Each word is paired
    with at most `PAIR_REACH` others, in alphabetical order, so that a list of a hundred goods
    does not drown the rest.
    """
    pairs: dict[str, None] = {}
    group: set[str] = set()
    for word in [*words(text), *ends]:
        if word not in ends:
            if len(word) > 1:
                group.add(word)
            continue
        ordered = sorted(group)
        for i, first in enumerate(ordered):
            for second in ordered[i + 1 : i + 1 + PAIR_REACH]:
                pairs[f"{first} {second}"] = None
        group = set()
    return list(pairs)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
