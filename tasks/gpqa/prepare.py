"""Turn the wheel's file into the public side and the two private label sides of `gpqa`."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sia.tasks.tables import Row, opaque_ids, read_table, write_table

LETTERS = ("A", "B", "C", "D")
SHARES = {"train": 48, "dev": 75, "test": 75}  # of 198
COLUMNS = ["id", "domain", "subdomain", "question", *LETTERS]
HERE = Path(__file__).parent


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Write `public/`, `private/dev/` and `private/test/`; same seed, same bytes.

    Every side has its share of each domain, and each letter is right equally often on each side
    (where that is not possible, the first letters once more). The order of the wrong options is
    drawn, too: nothing of the source's order is left.

    Args:
        raw: Folder with questions.json.
        public: Gets train.csv, items.csv (dev and test items mixed) and task.md.
        private: Gets dev/ and test/, each with labels.csv.
        seed: Chooses sides, letters, ids and the order of the rows.

    Raises:
        ValueError: The raw file contradicts itself.
    """
    rng = random.Random(seed)
    sides: dict[str, list[Row]] = {}
    for side, questions in choose_sides(read_raw(raw), rng=rng).items():
        letters = [LETTERS[k % len(LETTERS)] for k in range(len(questions))]
        rng.shuffle(letters)
        sides[side] = [
            laid_out(question, letter, rng=rng)
            for question, letter in zip(questions, letters, strict=True)
        ]
    mixed = [row for rows in sides.values() for row in rows]
    for row, identity in zip(mixed, opaque_ids(len(mixed), rng), strict=True):
        row["id"] = identity
    for rows in (*sides.values(), mixed):
        rows.sort(key=lambda row: row["id"])  # the ids are random, so is this order
    write_table(public / "train.csv", [*COLUMNS, "label"], sides["train"])
    known = {row["id"] for row in sides["train"]}
    write_table(public / "items.csv", COLUMNS, [row for row in mixed if row["id"] not in known])
    shutil.copyfile(HERE / "task.md", public / "task.md")
    for side in ("dev", "test"):
        columns = ["id", "label", "domain", "subdomain"]
        write_table(private / side / "labels.csv", columns, sides[side])


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Write a public folder whose train.csv holds the dev items too, for the last refit.

    items.csv stays as it is, so one target serves both folders.
    """
    answers = {row["id"]: row["label"] for row in read_table(private_dev / "labels.csv")}
    train = read_table(public / "train.csv") + [
        {**row, "label": answers[row["id"]]}
        for row in read_table(public / "items.csv")
        if row["id"] in answers
    ]
    train.sort(key=lambda row: row["id"])
    write_table(out / "train.csv", [*COLUMNS, "label"], train)
    for name in ("items.csv", "task.md"):
        shutil.copyfile(public / name, out / name)


def read_raw(raw: Path) -> list[dict[str, Any]]:
    """Domain, subdomain, question, right option and the three wrong ones of every question.

    Raises:
        ValueError: A question has no four options, or its right one is not among them.
    """
    questions = []
    for entry in json.loads((raw / "questions.json").read_text(encoding="utf-8")):
        options, letter = entry["options"], entry["correct_answer_letter"]
        if sorted(options) != list(LETTERS) or options.get(letter) != entry["correct_answer"]:
            raise ValueError(f"question {entry['id']!r} does not fit its own answer")
        questions.append(
            {
                "domain": entry["domain"],
                "subdomain": entry["subdomain"],
                "question": entry["Question"].strip(),
                "right": options[letter].strip(),
                "wrong": [options[name].strip() for name in LETTERS if name != letter],
            }
        )
    return questions


def choose_sides(
    questions: Sequence[dict[str, Any]], *, rng: random.Random
) -> dict[str, list[dict[str, Any]]]:
    """The questions of each side; how many of each domain depends on the data alone."""
    ordered = []
    for domain in sorted({question["domain"] for question in questions}):
        own = [question for question in questions if question["domain"] == domain]
        ordered += rng.sample(own, len(own))
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in SHARES}
    total = sum(SHARES.values())
    for n_dealt, question in enumerate(ordered, start=1):
        # To the side that is furthest behind: so every domain is shared out like the whole.
        side = max(SHARES, key=lambda name: SHARES[name] * n_dealt / total - len(sides[name]))
        sides[side].append(question)
    return sides


def laid_out(question: dict[str, Any], letter: str, *, rng: random.Random) -> Row:
    """The question with its right option under `letter`."""
    wrong = rng.sample(question["wrong"], len(question["wrong"]))
    names = [name for name in LETTERS if name != letter]
    return {
        "domain": question["domain"],
        "subdomain": question["subdomain"],
        "question": question["question"],
        "label": letter,
        letter: question["right"],
        **dict(zip(names, wrong, strict=True)),
    }
