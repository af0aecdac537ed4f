"""Turn the wheel's files into the public side and the two private sides of `longcot-chess`."""

import importlib
import json
import random
import re
import shutil
import sys
from pathlib import Path

from sia.tasks.tables import Row, opaque_ids, read_table, write_table

N_DEV = {"knight": 9, "moves": 3}  # of 39 and 11
N_TRAIN = 24
PROOF_S = 120.0  # per generated problem; a second or less is usual
HERE = Path(__file__).parent
ANSWER = {"knight": re.compile(r"\d+"), "moves": re.compile(r"\S+ \S+ \S+")}


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Write `public/`, `private/dev/` and `private/test/`; same seed, same bytes.

    Args:
        raw: Folder with questions.json and answers.json.
        public: Gets train.csv (generated), items.csv (dev and test items mixed) and task.md.
        private: Gets dev/ and test/, each with labels.csv.
        seed: Chooses the dev items, the ids, the order and the generated problems.

    Raises:
        ValueError: The raw files contradict each other.
    """
    rows = read_raw(raw)
    rng = random.Random(seed)
    dev: list[Row] = []
    for kind, count in N_DEV.items():
        dev += rng.sample([row for row in rows if row["kind"] == kind], count)
    for row in rows:
        row["side"] = "dev" if row in dev else "test"
    pattern = next(row["prompt"] for row in rows if row["kind"] == "knight")
    train = [{**row, "side": "train"} for row in generate(pattern, N_TRAIN, rng=rng)]
    mixed = train + rows
    rng.shuffle(mixed)
    for row, identity in zip(mixed, opaque_ids(len(mixed), rng), strict=True):
        row["id"] = identity

    sides = {
        side: [row for row in mixed if row["side"] == side] for side in ("train", "dev", "test")
    }
    write_table(public / "train.csv", ["id", "prompt", "label"], sides["train"])
    items = [row for row in mixed if row["side"] != "train"]
    write_table(public / "items.csv", ["id", "prompt"], items)
    shutil.copyfile(HERE / "task.md", public / "task.md")
    for side in ("dev", "test"):
        write_table(private / side / "labels.csv", ["id", "label", "kind"], sides[side])


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Write a public folder whose train.csv holds the dev items too, for the last refit."""
    answers = {row["id"]: row["label"] for row in read_table(private_dev / "labels.csv")}
    train = read_table(public / "train.csv") + [
        {**row, "label": answers[row["id"]]}
        for row in read_table(public / "items.csv")
        if row["id"] in answers
    ]
    train.sort(key=lambda row: row["id"])
    write_table(out / "train.csv", ["id", "prompt", "label"], train)
    for name in ("items.csv", "task.md"):
        shutil.copyfile(public / name, out / name)


def read_raw(raw: Path) -> list[Row]:
    """Prompt, kind and label of every item, in the order of the file.

    Raises:
        ValueError: An item has no answer, or one of another form than its kind asks for.
    """
    questions = json.loads((raw / "questions.json").read_text(encoding="utf-8"))
    answers = json.loads((raw / "answers.json").read_text(encoding="utf-8"))
    if [q["question_id"] for q in questions] != list(answers):
        raise ValueError("questions.json and answers.json name different items; fetch them again")
    rows = []
    for question in questions:
        answer = answers[question["question_id"]]
        kind = "moves" if isinstance(answer, list) else "knight"
        label = " ".join(answer) if kind == "moves" else str(answer)
        if not ANSWER[kind].fullmatch(label):
            raise ValueError(f"the answer to {question['question_id']!r} is not of kind {kind!r}")
        rows.append({"prompt": question["prompt"], "kind": kind, "label": label})
    return rows


def generate(pattern: str, count: int, *, rng: random.Random) -> list[Row]:
    """Knight problems with other squares in the words of `pattern`, and their proven answers.

    The answers come from the exact piece of the harness; one that is not proven is refused.
    """
    knights, tours = _harness("knights"), _harness("tours")
    given = knights.read_knight(pattern)
    rows: list[Row] = []
    while len(rows) < count:
        cells = rng.sample(range(given.size**2), 1 + len(given.targets))
        squares = [str(divmod(cell, given.size)) for cell in cells]
        texts = re.split(r"\(\d+, \d+\)", pattern)
        prompt = "".join(a + b for a, b in zip(texts, [*squares, ""], strict=True))
        D = knights.distances(knights.read_knight(prompt), method="bfs")
        greedy = tours.greedy(D, 1)
        found = tours.exact(D, upper=greedy, limit_s=PROOF_S)
        if found.length != found.bound:
            raise ValueError("a generated problem could not be solved within its time; try again")
        rows.append({"prompt": prompt, "label": str(found.length), "kind": "knight"})
    return rows


def _harness(name: str):  # type: ignore[no-untyped-def]  # a module, whose functions are its own
    folder = str(HERE / "harness")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
