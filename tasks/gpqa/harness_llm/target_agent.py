"""A language model answers the questions; what is not clearly one letter is an abstention.

`ask: reason` lets it think before its answer line, `direct` asks for the line alone, `likelihood`
asks for one token and reads the probability of each letter where the endpoint returns it. With
`votes` above one, each vote shows the options in another order, and the majority counts.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from letters import LETTERS, likeliest, majority, spoken
from model import Message, Model, NoModel, Refused, Reply
from replies import Trajectories

Row = dict[str, str]

INSTRUCTIONS = {
    "reason": "Think step by step, as long as it takes and no longer. Then end with one line of "
    "the form\nAnswer: <A, B, C or D>\nIf you cannot tell, end with\nAnswer: none",
    "direct": "Reply with one line of the form\nAnswer: <A, B, C or D>",
    "likelihood": "Reply with the letter of the right option and nothing else.",
}
ONE_TOKEN = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}


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
    """`votes` calls an item; failed calls and unclear replies have no vote."""
    likelihood = config["ask"] == "likelihood"
    extra = {**(config["model"]["extra"] or {}), **(ONE_TOKEN if likelihood else {})}
    model = Model(**{**config["model"], "extra": extra})
    train, items = read_rows(dataset_dir / "train.csv"), read_rows(dataset_dir / "items.csv")
    votes = config["votes"]
    orders = [turned(turn) for turn in range(votes)]
    asked = [(item, order) for item in items for order in orders]
    prompts = [
        prompt(item, order, chosen_shots(item, train, config), config) for item, order in asked
    ]
    trajectories = Trajectories(working_dir, len(items))
    letters = [""] * len(asked)
    replies: list[Reply | None] = [None] * len(asked)

    def keep(number: int, reply: Reply) -> None:
        item, order = asked[number]
        options = {shown: item[own] for shown, own in order.items()}
        letter = (likeliest(reply) if likelihood else "") or spoken(reply, options)
        letters[number] = order.get(letter, "")
        replies[number] = reply
        first = number - number % votes
        calls = [(prompts[k], replies[k]) for k in range(first, first + votes)]
        if all(one for _, one in calls):
            given = letters[first : first + votes]
            said = " ".join(vote or "-" for vote in given)
            verdict = f"votes: {said}; answer: {majority(given) or 'none (abstained)'}"
            trajectories.write(item["id"], calls, verdict)

    model.ask_all(prompts, each=keep)
    answers = [majority(letters[k : k + votes]) for k in range(0, len(asked), votes)]
    with (working_dir / "submission.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("id", "answer"))
        writer.writerows((item["id"], answer) for item, answer in zip(items, answers, strict=True))
    answered = sum(map(bool, answers))
    failed = sum(bool(reply and reply.error) for reply in replies)
    model.say(
        f"{len(items)} items: {answered} answered, {len(items) - answered} abstained; "
        f"{failed} of {len(asked)} calls failed"
    )


def turned(turn: int) -> dict[str, str]:
    """Shown letter -> own letter, with the options moved on by `turn` places."""
    return {LETTERS[(k + turn) % len(LETTERS)]: own for k, own in enumerate(LETTERS)}


def prompt(
    item: Row, order: Mapping[str, str], shots: Sequence[Row], config: Mapping[str, Any]
) -> list[Message]:
    """What the model is asked about one item, examples first, as turns of the conversation."""
    line = "{}" if config["ask"] == "likelihood" else "Answer: {}"
    messages = [{"role": "system", "content": INSTRUCTIONS[config["ask"]]}]
    plain = turned(0)
    for shot in shots:
        messages.append({"role": "user", "content": question(shot, plain)})
        messages.append({"role": "assistant", "content": line.format(shot["label"])})
    return [*messages, {"role": "user", "content": question(item, order)}]


def question(row: Row, order: Mapping[str, str]) -> str:
    """A question with its options in the order shown."""
    options = "\n".join(f"{letter}) {row[order[letter]]}" for letter in LETTERS)
    return f"{row['question']}\n\n{options}"


def chosen_shots(item: Row, train: Sequence[Row], config: Mapping[str, Any]) -> list[Row]:
    """Labelled questions of the same subdomain before those of the same domain before others."""
    near = sorted(
        train,
        key=lambda row: (row["subdomain"] != item["subdomain"]) + (row["domain"] != item["domain"]),
        reverse=True,
    )
    return near[len(near) - min(config["shots"], len(near)) :]


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file by column name."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
