"""What each piece of the harness is worth: cross-validation over whole groups of train.csv alone.

python tasks/spaceship-titanic/pieces.py --data tasks/spaceship-titanic/data/public
"""

import argparse
import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HARNESS = Path(__file__).parent / "harness"
sys.path.insert(0, str(HARNESS))

from passengers import Passengers, read_passengers  # noqa: E402
from target_agent import make_table, predict  # noqa: E402

N_FOLDS = 5

# Name, and what it sets on top of the last row whose name starts without a dot.
PIECES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("newcomer: logistic regression on the columns", {}),
    ("logs, sums", {"features.logs": True, "features.sums": True, "features.nothing": True}),
    (
        "repaired, cabin, group",
        {
            "repair.spending": True,
            "repair.planet": True,
            "repair.cabin": True,
            "features.cabin": True,
            "features.group": True,
            "features.age": True,
        },
    ),
    ("· pairs", {"model.pairs": True}),
    ("· blocks", {"features.blocks": True}),
    ("· companions", {"features.companions": True}),
    ("· forest", {"model.kind": "forest"}),
    ("hist", {"model.kind": "hist"}),
    ("· without sums", {"features.sums": False, "features.nothing": False}),
    ("slow", {"hist.learning_rate": 0.03, "hist.rounds": 250, "hist.leaves": 15}),
    ("· l2, two fifths of the columns", {"hist.l2": 5.0, "hist.columns": 0.4}),
    ("· leaves of 40", {"hist.min_leaf": 40}),
    ("· order", {"features.order": True}),
    ("· family", {"features.family": True}),
    ("· companions", {"features.companions": True}),
    ("· blocks", {"features.blocks": True}),
    ("· no repair", {"repair.spending": False, "repair.planet": False, "repair.cabin": False}),
    ("bags, two fifths of the columns", {"model.bags": 5, "hist.columns": 0.4}),
    ("· order, companions", {"features.companions": True, "features.order": True}),
    ("blend, pairs", {"model.kind": "blend", "model.pairs": True}),
    ("· blocks", {"features.blocks": True}),
    ("· order, companions", {"features.companions": True, "features.order": True}),
)


def main() -> None:
    """Print a row of the table for each piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    people = read_passengers(args.data)
    base = yaml.safe_load((HARNESS / "harness.yaml").read_text(encoding="utf-8"))
    for name, changes in PIECES:
        config = changed(base, changes)
        if not name.startswith("·"):
            base = config
        print(f"| {name} | {cross_validate(people, config):.4f} |", flush=True)


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with dotted names set."""
    fresh = copy.deepcopy(dict(config))
    for name, value in changes.items():
        section, key = name.split(".")
        fresh[section][key] = value
    return fresh


def cross_validate(people: Passengers, config: Mapping[str, Any]) -> float:
    """Accuracy over train, each passenger judged by models that saw none of its group."""
    table = make_table(people, config)
    n = len(people.answers)
    names = np.unique(people.group[:n])
    fold_of = dict(
        zip(names.tolist(), np.random.default_rng(0).integers(0, N_FOLDS, len(names)), strict=True)
    )
    fold = np.array([fold_of[group] for group in people.group[:n].tolist()])
    hits = 0
    for k in range(N_FOLDS):
        order = np.concatenate([np.flatnonzero(fold != k), np.flatnonzero(fold == k)])
        seen = int((fold != k).sum())
        part = replace(table, values=table.values[order])
        chances = predict(part, people.answers[order[:seen]], config)
        hits += int(((chances[seen:] > 0.5) == people.answers[order[seen:]]).sum())
    return hits / n


if __name__ == "__main__":
    main()
