"""Entry of the reference harness: reads harness.yaml beside it and answers every item.

One pass: passenger list, repaired gaps, table of features, model, files.
"""

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from features import Features, Repair, Table, build, repair
from models import Forest, Hist, Model, probabilities
from passengers import Floats, Passengers, read_passengers


def main() -> None:
    """Read the two folders of the contract, write the submission and the trajectories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    config = yaml.safe_load(Path(__file__).with_name("harness.yaml").read_text(encoding="utf-8"))
    people = read_passengers(args.dataset_dir)
    table = make_table(people, config)
    chances = predict(table, people.answers, config)
    write_submission(args.working_dir / "submission.csv", people, chances)
    write_trajectories(
        args.working_dir / "agent_execution", people, table, chances, count=config["trajectories"]
    )


def make_table(people: Passengers, config: Mapping[str, Any]) -> Table:
    """The features in use, of train and items."""
    repaired = repair(people, Repair(**config["repair"]))
    return build(repaired, Features(**config["features"]))


def predict(table: Table, answers: np.ndarray, config: Mapping[str, Any]) -> Floats:
    """P(transported) of every passenger; the model saw the first len(answers)."""
    return probabilities(
        table,
        answers,
        model=Model(**config["model"]),
        hist=Hist(**config["hist"]),
        forest=Forest(**config["forest"]),
    )


def write_submission(path: Path, people: Passengers, chances: Floats) -> None:
    """One row for each item."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["PassengerId", "Transported"])
        for i in people.items.tolist():
            writer.writerow([people.ids[i], "yes" if chances[i] > 0.5 else "no"])


def write_trajectories(
    folder: Path, people: Passengers, table: Table, chances: Floats, *, count: int
) -> None:
    """One file for each of the `count` items whose answer is least certain."""
    order = np.argsort(np.abs(chances[people.items] - 0.5), kind="stable")[:count]
    if len(order):
        folder.mkdir(parents=True, exist_ok=True)
    for k, i in enumerate(people.items[order].tolist()):
        seen = ", ".join(
            f"{name}={value:g}" for name, value in zip(table.names, table.values[i], strict=True)
        )
        messages = [
            {"role": "user", "content": f"Passenger {people.ids[i]}: {seen}"},
            {"role": "assistant", "content": f"transported with probability {chances[i]:.3f}"},
        ]
        path = folder / f"execution_q{k}.json"
        path.write_text(json.dumps(messages, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
