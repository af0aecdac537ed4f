"""Turn the wheel's files into the public side and the two private label sides of `lawbench`."""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from sia.tasks.tables import Row, opaque_ids, read_table, write_table

N_DEV = 800
HERE = Path(__file__).parent


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Write `public/`, `private/dev/` and `private/test/`; same seed, same bytes.

    A text that occurs twice in the raw training file, or that occurs in the test too, stays in
    train: no dev item has a twin in train, and the count of known test texts is the same before
    and after `reveal_dev`.

    Args:
        raw: Folder with train.csv, classes.json, test_items.csv and test_labels.csv.
        public: Gets train.csv, items.csv (dev and test items mixed), labels.json and task.md.
        private: Gets dev/ and test/, each with labels.csv and labels.json.
        seed: Chooses the dev items, the ids and the order of the rows.

    Raises:
        ValueError: The raw files contradict each other.
    """
    train_raw = read_table(raw / "train.csv")
    test_items = read_table(raw / "test_items.csv")
    labels: list[str] = json.loads((raw / "classes.json").read_text(encoding="utf-8"))
    answers = {row["id"]: row["label"] for row in read_table(raw / "test_labels.csv")}
    if {row["id"] for row in test_items} != answers.keys():
        raise ValueError("test_items.csv and test_labels.csv name different ids; fetch them again")
    unknown = ({row["label"] for row in train_raw} | set(answers.values())) - set(labels)
    if unknown or any("|" in label for label in labels):
        raise ValueError(f"labels outside classes.json, or with a '|' in them: {sorted(unknown)!r}")

    rng = random.Random(seed)
    dev_rows = choose_dev(train_raw, held_back={row["text"] for row in test_items}, rng=rng)
    chosen = {row["id"] for row in dev_rows}
    train = [row for row in train_raw if row["id"] not in chosen]
    test = [{**row, "label": answers[row["id"]]} for row in test_items]

    tagged = [("train", row) for row in train]
    tagged += [("dev", row) for row in dev_rows] + [("test", row) for row in test]
    rng.shuffle(tagged)
    sides: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    items: list[Row] = []
    for (side, row), new_id in zip(tagged, opaque_ids(len(tagged), rng), strict=True):
        fresh = {"id": new_id, "text": row["text"], "label": row["label"]}
        sides[side].append(fresh)
        if side != "train":
            items.append(fresh)

    write_table(public / "train.csv", ["id", "text", "label"], sides["train"])
    write_table(public / "items.csv", ["id", "text"], items)
    _write_labels(public / "labels.json", labels)
    shutil.copyfile(HERE / "task.md", public / "task.md")
    known_texts = {row["text"] for row in train}
    n_train = Counter(row["label"] for row in train)
    for side in ("dev", "test"):
        rows = [
            {
                "id": row["id"],
                "label": row["label"],
                "n_chars": str(len(row["text"])),
                "n_train": str(n_train[row["label"]]),
                "in_train": str(int(row["text"] in known_texts)),
            }
            for row in sides[side]
        ]
        write_table(private / side / "labels.csv", list(rows[0]), rows)
        _write_labels(private / side / "labels.json", labels)


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Write a public folder whose train.csv holds the dev items too, for the last refit.

    items.csv stays as it is, so one target serves both folders.
    """
    answers = {row["id"]: row["label"] for row in read_table(private_dev / "labels.csv")}
    dev = [
        {**row, "label": answers[row["id"]]}
        for row in read_table(public / "items.csv")
        if row["id"] in answers
    ]
    train = read_table(public / "train.csv") + dev
    # By id, which is random: dev rows at the end of the file would tell who they were.
    train.sort(key=lambda row: row["id"])
    write_table(out / "train.csv", ["id", "text", "label"], train)
    for name in ("items.csv", "labels.json", "task.md"):
        shutil.copyfile(public / name, out / name)


def choose_dev(rows: Sequence[Row], *, held_back: set[str], rng: random.Random) -> list[Row]:
    """About `N_DEV` rows, stratified by label, none of whose texts occurs elsewhere.

    How many rows a label gives depends on the data alone; which rows, on `rng`.
    """
    copies = Counter(row["text"] for row in rows)
    eligible: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if copies[row["text"]] == 1 and row["text"] not in held_back:
            eligible[row["label"]].append(row)
    quota = _quotas(Counter(row["label"] for row in rows), total=N_DEV)
    chosen: list[Row] = []
    for label in sorted(quota):
        # Half of a small label stays in train: a label without examples teaches nothing.
        n = min(quota[label], len(eligible[label]) // 2)
        chosen += rng.sample(eligible[label], n)
    return chosen


def _quotas(counts: Counter[str], *, total: int) -> dict[str, int]:
    """Largest remainders, ties by name; at most half of all rows when there are few."""
    n = sum(counts.values())
    share = min(total, n // 2) / n
    quota = {label: int(share * count) for label, count in counts.items()}
    by_remainder = sorted(counts, key=lambda label: (quota[label] - share * counts[label], label))
    for label in by_remainder[: round(share * n) - sum(quota.values())]:
        quota[label] += 1
    return quota


def _write_labels(path: Path, labels: list[str]) -> None:
    path.write_text(json.dumps(labels, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
