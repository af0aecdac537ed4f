"""A language-model harness for a task of labels: reads harness.yaml beside it, asks once an item.

The task has `items.csv` (`id` and further columns) and perhaps `train.csv` with a column `label`.
A reply that does not end with one known label is an abstention: nothing is guessed.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from model import Message, Model, NoModel, Refused, Reply
from replies import Trajectories, exact_label, final_answer

Row = dict[str, str]


def main() -> None:
    """Read the two folders of the contract, write the submission and the trajectories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    file = Path(__file__).with_name("harness.yaml")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        answer_items(args.dataset_dir, args.working_dir, config)
    except (NoModel, Refused) as error:
        sys.exit(str(error))


def answer_items(dataset_dir: Path, working_dir: Path, config: Mapping[str, Any]) -> None:
    """One call an item; a failed call or an unclear reply leaves its answer empty."""
    model = Model(**config["model"])
    items = read_rows(dataset_dir / "items.csv")
    train_file = dataset_dir / "train.csv"
    train = read_rows(train_file) if train_file.is_file() else []
    labels = sorted({row["label"] for row in train})
    task = (dataset_dir / "task.md").read_text(encoding="utf-8")
    prompts = [prompt(item, train[: config["shots"]], task, config) for item in items]
    trajectories = Trajectories(working_dir, len(items))
    answers = [""] * len(items)

    def keep(number: int, reply: Reply) -> None:
        answers[number] = read_answer(reply.text, labels)
        verdict = f"extracted answer: {answers[number] or 'none (abstained)'}"
        trajectories.write(items[number]["id"], [(prompts[number], reply)], verdict)

    replies = model.ask_all(prompts, each=keep)
    with (working_dir / "submission.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("id", "label"))
        writer.writerows((item["id"], answer) for item, answer in zip(items, answers, strict=True))
    failed = sum(bool(reply.error) for reply in replies)
    answered = sum(map(bool, answers))
    model.say(
        f"{len(items)} items: {answered} answered, {len(items) - answered - failed} abstained, "
        f"{failed} failed"
    )


def prompt(item: Row, shots: Sequence[Row], task: str, config: Mapping[str, Any]) -> list[Message]:
    """What the model is asked about one item, examples first."""
    examples = "".join(f"{shown(row, config)}\nAnswer: {row['label']}\n\n" for row in shots)
    return [
        {"role": "system", "content": f"{task}\n\n{config['instruction']}"},
        {"role": "user", "content": f"{examples}{shown(item, config)}"},
    ]


def shown(row: Row, config: Mapping[str, Any]) -> str:
    """The columns of a row that a model should see."""
    seen = {name: value for name, value in row.items() if name not in ("id", "label")}
    return "\n".join(f"{name}: {value[: config['text_chars']]}" for name, value in seen.items())


def read_answer(text: str, labels: Sequence[str]) -> str:
    """The label in the final `Answer:` line; where no labels are known, whatever stands there."""
    answer = final_answer(text)
    return exact_label(answer, labels) if labels else answer


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file by column name."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
