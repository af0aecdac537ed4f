"""Turn table.csv into the public side and the two private label sides."""

import random
import shutil
from collections import defaultdict
from pathlib import Path

from sia.tasks.tables import Row, opaque_ids, read_table, write_table

ID = "id"  # a column that names rows: replaced by ids that say nothing; "" for none
LABEL = "label"
NUMBERS = False  # whether labels are numbers
# Where other columns hold the same words as the labels, these are written in a way of their own:
# otherwise the leak walk could not tell a label on the public side from a chance.
LABEL_FORMAT = "{}"
DEV, TEST = 0.25, 0.25  # shares of the rows
HERE = Path(__file__).parent


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Writes `public/`, `private/dev/` and `private/test/`; same seed, same bytes.

    Rows that are equal but for id and label lie on one side. Rows without a label are left out.

    Args:
        raw: Not used: the table lies beside this file.
        public: Gets train.csv, items.csv (dev and test items mixed) and task.md.
        private: Gets dev/ and test/, each with labels.csv.
        seed: Of the split, the ids and the order of rows.

    Raises:
        ValueError: The table is too small, or a label is no number where it should be.
    """
    rng = random.Random(seed)
    rows = [row for row in read_table(HERE / "table.csv") if (row[LABEL] or "").strip()]
    if len(rows) < 40:
        raise ValueError(f"table.csv has {len(rows)} rows with a label; 40 are needed")
    features = [name for name in rows[0] if name not in (ID, LABEL)]
    columns = ["id", *features, LABEL]
    ids = opaque_ids(len(rows), rng)
    rows = [
        {"id": item, **{name: row[name] or "" for name in features}, LABEL: written(row[LABEL])}
        for item, row in zip(ids, rows, strict=True)
    ]
    train, dev, test = _sides(rows, features, rng)
    mixed = dev + test
    rng.shuffle(mixed)
    write_table(public / "train.csv", columns, train)
    write_table(public / "items.csv", columns[:-1], mixed)
    shutil.copyfile(HERE / "task.md", public / "task.md")
    for side, members in (("dev", dev), ("test", test)):
        labels = [{"id": row["id"], "label": row[LABEL]} for row in members]
        write_table(private / side / "labels.csv", ("id", "label"), labels)


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Writes a public folder whose train.csv holds the dev items too, for the last refit."""
    answers = {row["id"]: row["label"] for row in read_table(private_dev / "labels.csv")}
    train = read_table(public / "train.csv")
    columns = list(train[0])
    train += [
        {**row, LABEL: answers[row["id"]]}
        for row in read_table(public / "items.csv")
        if row["id"] in answers
    ]
    train.sort(key=lambda row: row["id"])  # dev rows at the end would tell who they were
    write_table(out / "train.csv", columns, train)
    for name in ("items.csv", "task.md"):
        shutil.copyfile(public / name, out / name)


def written(label: str) -> str:
    """A label as it stands in train.csv and in the submission."""
    return LABEL_FORMAT.format(float(label) if NUMBERS else label.strip())


def _sides(
    rows: list[Row], features: list[str], rng: random.Random
) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, dev and test, in groups of rows with equal features."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in features)].append(row)
    order = list(groups.values())
    rng.shuffle(order)
    dev: list[Row] = []
    test: list[Row] = []
    train: list[Row] = []
    for group in order:
        side = (
            dev if len(dev) < DEV * len(rows) else test if len(test) < TEST * len(rows) else train
        )
        side += group
    if not train:
        raise ValueError("too many rows have equal features: no row is left for train")
    return train, dev, test
