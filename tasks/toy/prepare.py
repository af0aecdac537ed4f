"""Makes the toy data from the seed: numbers, and whether they exceed a threshold."""

import json
import random
import shutil
from pathlib import Path

from sia.tasks.tables import read_table, write_table

THRESHOLD = 0.37
NOISE = 0.05  # share of train rows with the wrong label
COUNTS = {"train": 200, "dev": 200, "test": 200}


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Writes the public and the private side; `raw` is not used.

    Exactly 37 % of the dev and of the test items are small, so that the null control is a constant.
    """
    rng = random.Random(seed)
    ids = [f"n{number:04}" for number in range(sum(COUNTS.values()))]
    rng.shuffle(ids)
    rows = {}
    for split, count in COUNTS.items():
        small = round(THRESHOLD * count)
        numbers = [rng.uniform(0, THRESHOLD) for _ in range(small)]
        numbers += [rng.uniform(THRESHOLD, 1) for _ in range(count - small)]
        rng.shuffle(numbers)
        rows[split] = [{"id": ids.pop(), "x": f"{x:.4f}", "label": _label(x)} for x in numbers]
    for row in rows["train"]:
        row["label"] = _flip(row["label"]) if rng.random() < NOISE else row["label"]
    items = [*rows["dev"], *rows["test"]]
    rng.shuffle(items)
    write_table(public / "train.csv", ("id", "x", "label"), rows["train"])
    write_table(public / "items.csv", ("id", "x"), items)
    (public / "labels.json").write_text(json.dumps(["large", "small"]), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("task.md"), public / "task.md")
    for split in ("dev", "test"):
        write_table(private / split / "labels.csv", ("id", "label"), rows[split])


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Copies the public side to `out`, with the dev items added to train."""
    shutil.copytree(public, out)
    numbers = {row["id"]: row["x"] for row in read_table(public / "items.csv")}
    dev = [row | {"x": numbers[row["id"]]} for row in read_table(private_dev / "labels.csv")]
    train = read_table(public / "train.csv") + dev
    write_table(out / "train.csv", ("id", "x", "label"), train)


def _label(x: float) -> str:
    return "large" if x > THRESHOLD else "small"


def _flip(label: str) -> str:
    return "small" if label == "large" else "large"
