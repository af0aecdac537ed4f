"""From the passenger list to numbers: repaired gaps, and a column for each idea.

Nothing here looks at the answers, so train and items are treated as one list.
Legend: N passengers, P columns.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from passengers import MISSING, SPENDING, Floats, Passengers, Words

CHILD = 13  # below it nobody spends anything
LUXURY = [SPENDING.index(name) for name in ("RoomService", "Spa", "VRDeck")]
SHOPPING = [SPENDING.index(name) for name in ("FoodCourt", "ShoppingMall")]
PLANET_OF_DECK = {"A": "Europa", "B": "Europa", "C": "Europa", "T": "Europa", "G": "Earth"}
BLOCK = 300  # cabins


@dataclass(frozen=True, kw_only=True)
class Repair:
    """The `repair` section of harness.yaml."""

    spending: bool
    planet: bool
    cabin: bool


@dataclass(frozen=True, kw_only=True)
class Features:
    """The `features` section of harness.yaml."""

    cabin: bool
    order: bool
    group: bool
    family: bool
    logs: bool
    sums: bool
    nothing: bool
    age: bool
    companions: bool
    blocks: bool


@dataclass(frozen=True)
class Table:
    """Numbers with NaN for gaps (P columns of which some are codes of words)."""

    names: list[str]
    values: Floats  # (N, P)
    words: NDArray[np.bool_]  # (P,): which columns are codes, not quantities


def repair(people: Passengers, settings: Repair) -> Passengers:
    """The list with gaps filled where the rest of it leaves little doubt; other gaps stay."""
    if settings.planet:
        planet = _spread(people.planet, people.group)
        by_deck = np.array([PLANET_OF_DECK.get(deck, MISSING) for deck in people.deck])
        planet = np.where(planet == MISSING, by_deck, planet)
        people = replace(people, planet=_spread(planet, people.surname))
    if settings.cabin:
        side = _spread(people.side, people.group)
        # Members of a family that travel together share a cabin.
        kin = np.array(
            [f"{g} {s}" if s else "" for g, s in zip(people.group, people.surname, strict=True)]
        )
        deck = _spread(people.deck, kin)
        number = _spread_numbers(people.number, people.group)
        people = replace(people, side=side, deck=deck, number=number)
    if settings.spending:
        spending, asleep = people.spending.copy(), people.asleep.copy()
        asleep[np.isnan(asleep) & (np.nansum(spending, 1) > 0)] = 0
        idle = (asleep == 1) | (people.age < CHILD)
        spending[np.isnan(spending) & idle[:, None]] = 0
        # Nine of ten adults who spend nothing sleep.
        quiet = np.isnan(asleep) & (np.nansum(spending, 1) == 0) & ~(people.age < CHILD)
        asleep[quiet] = 1
        spending[np.isnan(spending) & (asleep == 1)[:, None]] = 0
        people = replace(people, spending=spending, asleep=asleep)
    return people


def build(people: Passengers, settings: Features) -> Table:
    """One column for each idea in use."""
    columns: dict[str, Floats] = {
        "planet": _codes(people.planet),
        "destination": _codes(people.destination),
        "asleep": people.asleep,
        "vip": people.vip,
        "age": people.age,
    }
    words = {"planet", "destination"}
    total = np.nansum(people.spending, axis=1)
    for k, name in enumerate(SPENDING):
        own = people.spending[:, k]
        columns[name] = np.log1p(own) if settings.logs else own
    if settings.cabin:
        columns |= {
            "deck": _codes(people.deck),
            "side": _codes(people.side),
            "number": people.number,
        }
        words |= {"deck", "side"}
    if settings.order:
        columns["order"] = people.group.astype(float)
    sizes = _sizes(people.group)
    if settings.group:
        place = np.array([float(name.split("_")[1]) for name in people.ids])
        columns |= {"group_size": sizes, "place": place, "alone": (sizes == 1).astype(float)}
    if settings.family:
        family = np.where(people.surname == MISSING, np.nan, _sizes(people.surname))
        columns["family_size"] = family
        kin = _sizes(
            np.array([f"{g} {s}" for g, s in zip(people.group, people.surname, strict=True)])
        )
        columns["kin"] = kin
    if settings.sums:
        for name, part in (("luxury", LUXURY), ("shopping", SHOPPING), ("total", [0, 1, 2, 3, 4])):
            columns[name] = np.log1p(np.nansum(people.spending[:, part], axis=1))
    if settings.nothing:
        columns["nothing"] = (total == 0).astype(float)
        columns["n_kinds"] = (people.spending > 0).sum(1).astype(float)
    if settings.age:
        for name, low, high in (("child", 0, CHILD), ("youth", CHILD, 18), ("young", 18, 26)):
            columns[name] = ((people.age >= low) & (people.age < high)).astype(float)
    if settings.companions:
        for name, values in (
            ("their_luxury", np.log1p(np.nansum(people.spending[:, LUXURY], axis=1))),
            ("their_shopping", np.log1p(np.nansum(people.spending[:, SHOPPING], axis=1))),
            ("their_sleep", people.asleep),
            ("their_age", people.age),
        ):
            columns[name] = _mean_of_others(values, people.group)
    if settings.blocks:
        block = np.where(np.isnan(people.number), -1, people.number // BLOCK).astype(int)
        columns["block"] = _codes(block.astype(str))
        words.add("block")
        # Cabins of a deck are numbered in the order of booking.
        columns["place_on_deck"] = people.number / np.array(
            [_largest(people.number, people.deck)[deck] for deck in people.deck]
        )
    names = list(columns)
    values = np.stack([columns[name] for name in names], axis=1)
    return Table(names, values, np.array([name in words for name in names]))


def _spread(words: Words, keys: NDArray[np.generic]) -> Words:
    """Gaps filled with the most frequent word under the same key; equals go by name."""
    seen: dict[object, Counter[str]] = {}
    for key, word in zip(keys.tolist(), words.tolist(), strict=True):
        if word and key != MISSING:
            seen.setdefault(key, Counter())[word] += 1
    best = {key: min(c, key=lambda w, c=c: (-c[w], w)) for key, c in seen.items()}  # type: ignore[misc]
    return np.array(
        [
            word or best.get(key, MISSING)
            for key, word in zip(keys.tolist(), words.tolist(), strict=True)
        ]
    )


def _spread_numbers(numbers: Floats, keys: NDArray[np.generic]) -> Floats:
    """Gaps filled with the mean under the same key."""
    mean = _mean_by(numbers, keys)
    return np.where(np.isnan(numbers), mean, numbers)


def _mean_by(values: Floats, keys: NDArray[np.generic]) -> Floats:
    _, place = np.unique(keys, return_inverse=True)
    known = ~np.isnan(values)
    count = np.bincount(place, known)
    total = np.bincount(place, np.where(known, values, 0))
    return np.where(count[place] > 0, total[place] / np.maximum(count[place], 1), np.nan)


def _mean_of_others(values: Floats, keys: NDArray[np.generic]) -> Floats:
    """Mean over the others under the same key; NaN where there are none."""
    _, place = np.unique(keys, return_inverse=True)
    known = ~np.isnan(values)
    own = np.where(known, values, 0)
    count = np.bincount(place, known)[place] - known
    total = np.bincount(place, own)[place] - own
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _sizes(keys: NDArray[np.generic]) -> Floats:
    _, place = np.unique(keys, return_inverse=True)
    return np.bincount(place)[place].astype(float)


def _largest(numbers: Floats, keys: Words) -> Mapping[str, float]:
    return {
        key: float(np.nanmax(numbers[keys == key], initial=1.0))
        for key in sorted(set(keys.tolist()))
    }


def _codes(words: Sequence[str] | Words) -> Floats:
    """Position of each word among the sorted words, NaN where it is missing."""
    words = np.asarray(words)
    _, place = np.unique(words, return_inverse=True)
    return np.where(words == MISSING, np.nan, place.astype(float))
