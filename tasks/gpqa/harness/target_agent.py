"""The reference harness: picks an option by its looks, without knowing anything.

No language model and no knowledge: chance is 25 % and this is about chance. It exists so that the
task, its verifier and the loop can be tried without a key; `target=llm` answers the questions.
"""

import argparse
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

LETTERS = ("A", "B", "C", "D")
FEATURES = ("length", "overlap", "central", "numbers")
STEPS = 300  # of gradient descent on a convex loss of four weights
RATE = 0.3

Row = dict[str, str]
Floats = NDArray[np.float64]


def main() -> None:
    """Read the two folders of the contract, write the submission and the trajectories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    file = Path(__file__).with_name("harness.yaml")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    train, items = (
        read_rows(args.dataset_dir / "train.csv"),
        read_rows(args.dataset_dir / "items.csv"),
    )
    weights = np.array([float(config["weights"][name]) for name in FEATURES])
    if config["learn"]["use"]:
        weights = learned(train, ridge=config["learn"]["ridge"])
    scores = np.array([features(row) @ weights for row in items])
    answers = [LETTERS[k] for k in scores.argmax(axis=1)]  # the first one among equals
    with (args.working_dir / "submission.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("id", "answer"))
        writer.writerows((row["id"], answer) for row, answer in zip(items, answers, strict=True))
    write_trajectories(args.working_dir, items, scores, weights, config)


def features(row: Row) -> Floats:
    """What can be seen of each option, shape (4, F); mean 0 over the options, spread 1 or 0."""
    options = [row[letter] for letter in LETTERS]
    words = [set(re.findall(r"\w+", option.lower())) for option in options]
    question = set(re.findall(r"\w+", row["question"].lower()))
    columns = {
        "length": [len(option) for option in options],
        "overlap": [len(own & question) / max(len(own), 1) for own in words],
        "central": [
            sum(len(own & other) / max(len(own | other), 1) for other in words) for own in words
        ],
        "numbers": [len(re.findall(r"\d+", option)) for option in options],
    }
    seen = np.array([columns[name] for name in FEATURES], dtype=float).T
    spread = seen.std(axis=0)
    return (seen - seen.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def learned(train: Sequence[Row], *, ridge: float) -> Floats:
    """Weights of a conditional logit on the labelled questions, by gradient descent."""
    if not train:
        return np.zeros(len(FEATURES))
    seen = np.array([features(row) for row in train])
    right = np.array([LETTERS.index(row["label"]) for row in train])
    weights = np.zeros(len(FEATURES))
    for _ in range(STEPS):
        scores = seen @ weights
        chance = np.exp(scores - scores.max(axis=1, keepdims=True))
        chance /= chance.sum(axis=1, keepdims=True)
        expected = np.einsum("no,nof->nf", chance, seen)
        gradient = (seen[np.arange(len(right)), right] - expected).mean(axis=0)
        weights += RATE * (gradient - ridge * weights)
    return weights


def write_trajectories(
    working_dir: Path,
    items: Sequence[Row],
    scores: Floats,
    weights: Floats,
    config: Mapping[str, Any],
) -> None:
    """The items with the smallest lead, and why their answer was taken."""
    best = -np.sort(-scores, axis=1)
    folder = working_dir / "agent_execution"
    folder.mkdir(exist_ok=True)
    used = ", ".join(f"{n} {w:+.2f}" for n, w in zip(FEATURES, weights, strict=True))
    for k in np.argsort(best[:, 0] - best[:, 1], kind="stable")[: config["trajectories"]]:
        row = items[k]
        options = "\n".join(
            f"{letter}) {row[letter]}  [{score:+.2f}]"
            for letter, score in zip(LETTERS, scores[k], strict=True)
        )
        messages = [
            {"role": "user", "content": f"{row['question']}\n\n{options}"},
            {"role": "tool", "content": f"weights of the looks of an option: {used}"},
            {"role": "assistant", "content": LETTERS[int(scores[k].argmax())]},
        ]
        path = folder / f"execution_q{row['id']}.json"
        path.write_text(json.dumps(messages, ensure_ascii=False, indent=1), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file by column name."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
