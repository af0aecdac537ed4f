"""Makes the toy data from the seed: numbers, and whether they exceed a threshold."""

import csv
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

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
        rows[split] = [(ids.pop(), f"{x:.4f}", _label(x)) for x in numbers]
    train = [(i, x, _flip(y) if rng.random() < NOISE else y) for i, x, y in rows["train"]]
    items = [(i, x) for split in ("dev", "test") for i, x, _ in rows[split]]
    rng.shuffle(items)
    public.mkdir(parents=True)
    _write(public / "train.csv", ("id", "x", "label"), train)
    _write(public / "items.csv", ("id", "x"), items)
    (public / "labels.json").write_text(json.dumps(["large", "small"]), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("task.md"), public / "task.md")
    for split in ("dev", "test"):
        (private / split).mkdir(parents=True)
        _write(private / split / "labels.csv", ("id", "label"), [(i, y) for i, _, y in rows[split]])


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Copies the public side to `out`, with the dev items added to train."""
    shutil.copytree(public, out)
    numbers = {row["id"]: row["x"] for row in _read(public / "items.csv")}
    train = [(row["id"], row["x"], row["label"]) for row in _read(public / "train.csv")]
    train += [(r["id"], numbers[r["id"]], r["label"]) for r in _read(private_dev / "labels.csv")]
    _write(out / "train.csv", ("id", "x", "label"), train)


def _label(x: float) -> str:
    return "large" if x > THRESHOLD else "small"


def _flip(label: str) -> str:
    return "small" if label == "large" else "large"


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
