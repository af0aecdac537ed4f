"""Entry of the reference harness: reads harness.yaml beside it and answers every item.

Knight items get the length of the best tour found; items that ask for moves get an engine's line,
if there is one, and otherwise an empty answer.
"""

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from engine import Engine, best_line, read_fen
from knights import distances, read_knight
from tours import Answer, Tours, solve


def main() -> None:
    """Read the two folders of the contract, write the submission and the trajectories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    config = yaml.safe_load(Path(__file__).with_name("harness.yaml").read_text(encoding="utf-8"))
    with (args.dataset_dir / "items.csv").open(encoding="utf-8", newline="") as file:
        items = list(csv.DictReader(file))
    rows, tours = [], []
    for item in items:
        tour = knight_answer(item["prompt"], config)
        if tour:
            tours.append((item, tour))
            rows.append((item["id"], str(tour.length)))
        else:
            rows.append((item["id"], moves_answer(item["prompt"], config) or ""))
    with (args.working_dir / "submission.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "answer"])
        writer.writerows(rows)
    write_trajectories(args.working_dir / "agent_execution", tours, count=config["trajectories"])


def knight_answer(prompt: str, config: Mapping[str, Any]) -> Answer | None:
    """The best tour found; None when the prompt asks for something else."""
    problem = read_knight(prompt)
    if problem is None:
        return None
    D = distances(problem, method=config["distance"]["method"])
    # A stream of its own for each item: what one costs does not change another.
    return solve(D, settings=Tours(**config["tour"]), rng=np.random.default_rng(len(D)))


def moves_answer(prompt: str, config: Mapping[str, Any]) -> str | None:
    """The engine's line; None when it is not used, not there, or the prompt states no position."""
    settings = Engine(**config["engine"])
    fen = read_fen(prompt)
    return best_line(fen, settings) if settings.use and fen else None


def write_trajectories(
    folder: Path, tours: list[tuple[dict[str, str], Answer]], *, count: int
) -> None:
    """One file for each of the `count` tours that are furthest from their bound."""
    worst = sorted(tours, key=lambda entry: entry[1].bound - entry[1].length)[:count]
    if worst:
        folder.mkdir(parents=True, exist_ok=True)
    for k, (item, tour) in enumerate(worst):
        squares = read_knight(item["prompt"]).squares  # type: ignore[union-attr]  # it has a tour
        way = " ".join(str(squares[i]) for i in tour.tour)
        verdict = "proven" if tour.bound == tour.length else f"no tour is below {tour.bound}"
        messages = [
            {"role": "user", "content": item["prompt"]},
            {"role": "tool", "content": f"Tour: {way}"},
            {"role": "assistant", "content": f"{tour.length} moves; {verdict}"},
        ]
        path = folder / f"execution_q{k}.json"
        path.write_text(json.dumps(messages, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
