"""The passenger list as columns: what the files say, missing values kept apart.

Legend: N passengers, train first, then the items that are not in train.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Words = NDArray[np.str_]

SPENDING = ("RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck")
MISSING = ""


@dataclass
class Passengers:
    """Columns of shape (N,); a missing word is empty, a missing number NaN."""

    ids: list[str]
    items: NDArray[np.int64]  # positions of the items, in the order of items.csv
    answers: NDArray[np.bool_]  # of train, the first len(answers)
    planet: Words
    destination: Words
    deck: Words
    side: Words
    cabin: Words  # the whole of it
    surname: Words
    asleep: Floats  # CryoSleep: 1, 0 or NaN
    vip: Floats
    age: Floats
    number: Floats  # of the cabin
    spending: Floats  # (N, 5), in the order of SPENDING
    group: NDArray[np.int64]  # first part of PassengerId

    def __len__(self) -> int:
        """N."""
        return len(self.ids)


def read_passengers(folder: Path) -> Passengers:
    """Every passenger of a dataset folder once, in the order of the files."""
    train, items = _rows(folder / "train.csv"), _rows(folder / "items.csv")
    # In the last refit the dev items are in train as well, and are still to be answered.
    known = {row["PassengerId"] for row in train}
    rows = train + [row for row in items if row["PassengerId"] not in known]
    place = {row["PassengerId"]: i for i, row in enumerate(rows)}
    cabins = [(row["Cabin"].split("/") if row["Cabin"] else ["", "nan", ""]) for row in rows]
    return Passengers(
        ids=list(place),
        items=np.array([place[row["PassengerId"]] for row in items]),
        answers=np.array([row["Transported"] == "yes" for row in train]),
        planet=np.array([row["HomePlanet"] for row in rows]),
        destination=np.array([row["Destination"] for row in rows]),
        deck=np.array([deck for deck, _, _ in cabins]),
        side=np.array([side for _, _, side in cabins]),
        cabin=np.array([row["Cabin"] for row in rows]),
        surname=np.array([row["Name"].split()[-1] if row["Name"] else MISSING for row in rows]),
        asleep=_switches(rows, "CryoSleep"),
        vip=_switches(rows, "VIP"),
        age=_numbers(rows, "Age"),
        number=np.array([float(number) for _, number, _ in cabins]),
        spending=np.stack([_numbers(rows, name) for name in SPENDING], axis=1),
        group=np.array([int(row["PassengerId"].split("_")[0]) for row in rows]),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _switches(rows: list[dict[str, str]], name: str) -> Floats:
    words = {"True": 1.0, "False": 0.0, MISSING: np.nan}
    return np.array([words[row[name]] for row in rows])


def _numbers(rows: list[dict[str, str]], name: str) -> Floats:
    return np.array([float(row[name] or "nan") for row in rows])
