"""CSV tables, as most tasks use them for items, labels and submissions."""

import csv
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """Rows of a file of our own by column name."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Writes the named columns of `rows`, its folder included; equal rows are equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_submission(folder: Path, *headers: Sequence[str]) -> list[Row]:
    """All rows of a submission.csv that nobody vouches for, outer blanks removed.

    Args:
        folder: What was collected from the target.
        headers: The allowed headers, the longest last; every row has all columns of that one,
            empty where the file has none.

    Raises:
        ValueError: One line that says what is wrong with the file as a whole.
    """
    path = folder / "submission.csv"
    # A link could lead to the labels.
    if path.is_symlink() or not path.is_file():
        raise ValueError("submission.csv is missing or is not a plain file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"submission.csv is not UTF-8 (byte {error.start})") from None
    try:
        table = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"submission.csv is not a CSV file: {error}") from None
    header = table[0] if table else []
    if header not in [list(allowed) for allowed in headers]:
        wanted = ",".join(headers[-1])
        raise ValueError(f"submission.csv: the header is {header[:5]!r}, not {wanted}")
    names = headers[-1]
    return [
        {name: row[k].strip() if k < len(row) else "" for k, name in enumerate(names)}
        for row in table[1:]
        if row
    ]


def opaque_ids(n: int, rng: random.Random) -> list[str]:
    """`n` different ids that say nothing about what they stand for."""
    ids: dict[str, None] = {}
    while len(ids) < n:
        ids[f"{rng.getrandbits(40):010x}"] = None
    return list(ids)
