"""A language model names the charge, with the nearest training cases in front of it.

One call an item. A reply that does not end with exactly one of the labels is an abstention: nothing
is guessed from the rest of the text.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from model import Message, Model, NoModel, Refused, Reply
from neighbours import chosen_shots, nearest, suggested
from replies import Trajectories, exact_label, final_answer

Row = dict[str, str]

N_ALTERNATIVES = 5
SYSTEM = """\
你是一名熟悉中国刑法的法官助理。根据案件事实判断罪名：只有一个正确答案，文中有时用“××”遮住了罪名。
罪名的写法必须与给出的候选完全一致，包括方括号，不加“罪”字。先用一两句话比较最接近的罪名，\
最后单独一行写出答案，格式为：
Answer: 罪名
如果无法判断，最后一行写：
Answer: 无法判断"""


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
    labels = json.loads((dataset_dir / "labels.json").read_text(encoding="utf-8"))
    train, items = read_rows(dataset_dir / "train.csv"), read_rows(dataset_dir / "items.csv")
    answers_of_train = [row["label"] for row in train]
    near = nearest(
        [row["text"] for row in train],
        [row["text"] for row in items],
        high=config["ngram"],
        chars=config["retrieval_chars"],
        count=config["neighbours"],
    )
    candidates = [suggested(own, answers_of_train, config["candidates"]) for own in near]
    prompts = []
    for item, own, best in zip(items, near, candidates, strict=True):
        shots = chosen_shots(
            own, answers_of_train, count=config["shots"], per_label=config["shots_per_label"]
        )
        prompts.append(prompt(item, [train[k] for k in shots], best, labels, config))
    trajectories = Trajectories(working_dir, len(items))
    answers = [""] * len(items)

    def keep(number: int, reply: Reply) -> None:
        answers[number] = read_answer(reply.text, labels)
        verdict = f"extracted answer: {answers[number] or 'none (abstained)'}"
        trajectories.write(items[number]["id"], [(prompts[number], reply)], verdict)

    replies = model.ask_all(prompts, each=keep)
    write_submission(working_dir / "submission.csv", items, answers, candidates)
    failed = sum(bool(reply.error) for reply in replies)
    answered = sum(map(bool, answers))
    model.say(
        f"{len(items)} items: {answered} answered, {len(items) - answered - failed} abstained, "
        f"{failed} failed"
    )


def prompt(
    item: Row,
    shots: Sequence[Row],
    candidates: Sequence[str],
    labels: Sequence[str],
    config: Mapping[str, Any],
) -> list[Message]:
    """What the model is asked about one item."""
    short = config["all_labels"] or len(labels) <= config["candidates"]
    listed = [*candidates, *(label for label in labels if label not in candidates)]
    choice = "\n".join(listed if short else candidates)
    open_list = "" if short else "（不在其中的罪名也可能正确）"
    examples = "".join(
        f"案情：{row['text'][: config['shot_chars']]}\nAnswer: {row['label']}\n\n" for row in shots
    )
    before = f"相似案件：\n\n{examples}" if examples else ""
    asked = f"候选罪名{open_list}：\n{choice}\n\n{before}案情：{cut(item['text'], config)}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def cut(text: str, config: Mapping[str, Any]) -> str:
    """The beginning and the end of a long text: the act is told first, the verdict's words last."""
    head, tail = config["text_chars"], config["tail_chars"]
    if len(text) <= head + tail:
        return text
    return f"{text[:head]}……{text[len(text) - tail :]}"


def read_answer(text: str, labels: Sequence[str]) -> str:
    """The label that the final `Answer:` line spells, with or without 罪; otherwise nothing."""
    answer = final_answer(text)
    return exact_label(answer, labels) or exact_label(
        answer.rstrip("。. 　*").removesuffix("罪"), labels
    )


def write_submission(
    path: Path, items: Sequence[Row], answers: Sequence[str], candidates: Sequence[Sequence[str]]
) -> None:
    """One row for each item; the neighbours' labels are the alternatives."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "label", "alternatives"))
        for item, answer, best in zip(items, answers, candidates, strict=True):
            others = [label for label in best if label != answer]
            names = [*([answer] if answer else []), *others][:N_ALTERNATIVES]
            writer.writerow((item["id"], answer, "|".join(names)))


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file by column name."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
