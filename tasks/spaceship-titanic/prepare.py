"""Turn the wheel's files into the public side and the two private label sides."""

import random
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sia.tasks.tables import Row, read_table, write_table

N_DEV = 1500
ANSWER = "Transported"
# Not True and False: CryoSleep and VIP say that too, and a leak would not stand out.
WORDS = {"True": "yes", "False": "no"}
HERE = Path(__file__).parent


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Write `public/`, `private/dev/` and `private/test/`; same seed, same bytes.

    A travel group (the first part of PassengerId) lies in train or in dev as a whole. The test
    comes from the source, which drew it passenger by passenger: its groups may reach into both.

    Args:
        raw: Folder with train.csv, test_items.csv and test_labels.csv.
        public: Gets train.csv, items.csv (dev and test items mixed) and task.md.
        private: Gets dev/ and test/, each with labels.csv.
        seed: Chooses the dev groups and the order of the rows.

    Raises:
        ValueError: The raw files contradict each other.
    """
    rows = read_table(raw / "train.csv")
    test = read_table(raw / "test_labels.csv")
    items = read_table(raw / "test_items.csv")
    if [{k: v for k, v in row.items() if k != ANSWER} for row in test] != items:
        raise ValueError("test_items.csv and test_labels.csv differ; fetch them again")
    if {row["PassengerId"] for row in rows} & {row["PassengerId"] for row in test}:
        raise ValueError("train.csv and test_items.csv share passengers; fetch them again")
    if strange := {row[ANSWER] for row in rows + test} - WORDS.keys():
        raise ValueError(f"{ANSWER} is neither True nor False: {sorted(strange)!r}")
    for row in rows + test:
        row[ANSWER] = WORDS[row[ANSWER]]

    rng = random.Random(seed)
    dev = choose_dev(rows, rng=rng)
    chosen = {row["PassengerId"] for row in dev}
    train = [row for row in rows if row["PassengerId"] not in chosen]
    mixed = dev + test
    rng.shuffle(train)
    rng.shuffle(mixed)
    write_table(public / "train.csv", list(train[0]), train)
    write_table(public / "items.csv", [name for name in train[0] if name != ANSWER], mixed)
    shutil.copyfile(HERE / "task.md", public / "task.md")

    train_groups = {_group(row) for row in train}
    group_sizes = _counts(_group(row) for row in train + mixed)
    for side, members in (("dev", dev), ("test", test)):
        rng.shuffle(members)
        labels = [
            {
                "id": row["PassengerId"],
                "label": row[ANSWER],
                "asleep": row["CryoSleep"] or "unknown",
                "planet": row["HomePlanet"] or "unknown",
                "group_size": str(group_sizes[_group(row)]),
                "group_in_train": str(int(_group(row) in train_groups)),
            }
            for row in members
        ]
        write_table(private / side / "labels.csv", list(labels[0]), labels)


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Write a public folder whose train.csv holds the dev items too, for the last refit.

    items.csv stays as it is, so one target serves both folders.
    """
    answers = {row["id"]: row["label"] for row in read_table(private_dev / "labels.csv")}
    train = read_table(public / "train.csv")
    columns = list(train[0])
    train += [
        {**row, ANSWER: answers[row["PassengerId"]]}
        for row in read_table(public / "items.csv")
        if row["PassengerId"] in answers
    ]
    # Dev rows at the end of the file would tell who they were.
    train.sort(key=lambda row: row["PassengerId"])
    write_table(out / "train.csv", columns, train)
    for name in ("items.csv", "task.md"):
        shutil.copyfile(public / name, out / name)


def choose_dev(rows: list[Row], *, rng: random.Random) -> list[Row]:
    """`N_DEV` rows in whole groups, at most a quarter, with the share of answers of all rows.

    How many rows of each answer dev gets depends on the data alone, so that a constant answer
    scores the same for every seed.
    """
    n_dev = min(N_DEV, len(rows) // 4)
    left = {"yes": round(n_dev * sum(row[ANSWER] == "yes" for row in rows) / len(rows))}
    left["no"] = n_dev - left["yes"]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_group(row)].append(row)
    order = sorted(groups)
    rng.shuffle(order)
    dev: list[Row] = []
    for name in order:
        wanted = _counts(row[ANSWER] for row in groups[name])
        if all(wanted.get(answer, 0) <= left[answer] for answer in left):
            dev += groups[name]
            for answer in left:
                left[answer] -= wanted.get(answer, 0)
    if any(left.values()):
        raise ValueError(f"no whole groups fill dev: {left!r} rows are missing")
    return dev


def _group(row: Row) -> str:
    return row["PassengerId"].split("_")[0]


def _counts(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for value in values:
        counts[value] += 1
    return counts
