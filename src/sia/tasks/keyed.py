"""Files that speak of items by id: which ids a file has, and the file without some of them.

Three forms are understood: a CSV table with a column of ids, JSON with a list of objects that have
an id, and a JSON object whose keys are the ids.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".json")
# Names of a field that tells items apart, the likeliest first.
ID_NAMES = ("id", "question_id", "item_id", "task_id", "qid", "uid")
ANSWER_NAMES = ("model_answer", "answer", "solution", "prediction", "label", "target")
MAX_ANSWER = 500  # characters
NESTED = "the JSON is nested too deeply"


@dataclass(frozen=True, kw_only=True)
class Key:
    """The items of a file.

    Attributes:
        column: The field that holds the id; None where the ids are the keys of an object.
        ids: In the order of the file, each once.
    """

    column: str | None
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A file that holds wanted items only, each at most once.

    Attributes:
        answers: Id -> what the file says about the item, as text.
        cells: Id -> the other columns, where the file is a table.
        repeated: Ids that were said more than once; all of their entries are gone.
        unknown: Entries that name no wanted item.
    """

    text: str
    answers: dict[str, str]
    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()
    unknown: int = 0


def find_key(path: Path, column: str | None = None) -> Key | None:
    """The items that a file of our own lists; None where they cannot be told.

    Args:
        path: A CSV or JSON file.
        column: The field that holds the id; None: found by its name, in a table else the first one.
    """
    if path.suffix not in SUFFIXES:
        return None
    try:
        if path.suffix == ".csv":
            table = _table(_text(path))
            name = _id_column(table[0] if table else [], column)
            if name is None:
                return None
            place = table[0].index(name)
            return _key(name, [row[place] if place < len(row) else "" for row in table[1:]])
        document = _document(_text(path))
    except ValueError:
        return None
    if isinstance(document, list):
        return _key_of_list(document, column)
    if not isinstance(document, dict):
        return None
    lists = [key for value in document.values() if (key := _key_of_list(value, column))]
    if lists:
        return lists[0] if len(lists) == 1 else None
    return _key(None, list(document))


def keep(path: Path, ids: Collection[str], *, columns: Sequence[str] = ()) -> Kept:
    """The same file with the entries of `ids` alone.

    An id that comes twice is dropped altogether: nobody can say which answer was meant. An id
    counts as the text that it is written as, so `01` and `1.0` are not `1`.

    Args:
        path: A file that nobody vouches for.
        ids: The items that are wanted.
        columns: Further names of a field that holds ids.

    Raises:
        ValueError: One line that says why the file cannot be read.
    """
    wanted = frozenset(ids)
    if path.suffix == ".csv":
        return _keep_rows(path.name, _table(_text(path)), wanted, columns)
    filtered = _Filter(wanted=wanted, names=(*columns, *ID_NAMES))
    document = _document(_text(path))
    try:
        filtered.count(document)
        text = json.dumps(filtered.slim(document), indent=1)
    except RecursionError:
        raise ValueError(NESTED) from None
    return Kept(
        text=text,
        answers={item: filtered.answers[item] for item in ids if item in filtered.answers},
        repeated=tuple(item for item in ids if filtered.counts[item] > 1),
        unknown=filtered.unknown,
    )


def _keep_rows(
    name: str, table: list[list[str]], wanted: frozenset[str], columns: Sequence[str]
) -> Kept:
    header = table[0] if table else []
    column = next((_id_column(header, name) for name in columns if name in header), None)
    column = column or _id_column(header, None)
    if column is None:
        raise ValueError(f"{name} has no column of ids; its header is {header[:5]!r}")
    place = header.index(column)
    rows = [row for row in table[1:] if row]
    counts = Counter(row[place].strip() if place < len(row) else "" for row in rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        item = row[place].strip() if place < len(row) else ""
        if item not in wanted or counts[item] > 1:
            continue
        if len(row) != len(header):
            raise ValueError(f"{name}: the row of {item!r} has {len(row)} cells, not {len(header)}")
        row[place] = item
        writer.writerow(row)
        cells[item] = {key: cell for key, cell in zip(header, row, strict=True) if key != column}
    return Kept(
        text=out.getvalue(),
        answers={item: _answer(others) for item, others in cells.items()},
        cells=cells,
        repeated=tuple(sorted(item for item in wanted if counts[item] > 1)),
        unknown=sum(count for item, count in counts.items() if item not in wanted),
    )


class _Filter:
    """Goes over a JSON document twice: counts its ids, then leaves out what is not wanted."""

    def __init__(self, *, wanted: frozenset[str], names: Sequence[str]) -> None:
        self._wanted = wanted
        self._names = names
        self.counts: Counter[str] = Counter()
        self.answers: dict[str, str] = {}
        self.unknown = 0

    def count(self, value: Any) -> None:
        """Counts how often each id is answered within each list or object; the most counts."""
        if isinstance(value, list):
            found = Counter(self._id(each) for each in value if self._is_entry(each))
            for item, count in found.items():
                self.counts[item] = max(self.counts[item], count)
            for each in value:
                if not self._is_entry(each):
                    self.count(each)
        elif isinstance(value, dict):
            if self._is_map(value):
                for name in value:
                    self.counts[name] = max(self.counts[name], 1)
            else:
                for each in value.values():
                    self.count(each)

    def slim(self, value: Any) -> Any:
        """The value without what is not wanted."""
        if isinstance(value, list):
            if any(self._is_entry(each) for each in value):
                return [each for each in value if self._take_entry(each)]
            return [self.slim(each) for each in value]
        if isinstance(value, dict):
            if self._is_map(value):
                return {name: each for name, each in value.items() if self._take(name, each)}
            return {name: self.slim(each) for name, each in value.items()}
        return value

    def _take_entry(self, entry: Any) -> bool:
        if not self._is_entry(entry):
            self.unknown += 1
            return False
        others = {name: value for name, value in entry.items() if name not in self._names}
        return self._take(self._id(entry), others)

    def _take(self, item: str, answer: Any) -> bool:
        if item not in self._wanted:
            self.unknown += 1
            return False
        if self.counts[item] > 1:
            return False
        self.answers.setdefault(item, _answer(answer))
        return True

    def _is_entry(self, value: Any) -> bool:
        return isinstance(value, dict) and any(name in value for name in self._names)

    def _is_map(self, value: dict[str, Any]) -> bool:
        return not self._wanted.isdisjoint(value)

    def _id(self, entry: dict[str, Any]) -> str:
        """The id of an entry; one that goes by several ids names no item."""
        found = {_plain_id(entry[name]) for name in self._names if name in entry}
        return found.pop() if len(found) == 1 else ""


def _key_of_list(value: Any, column: str | None) -> Key | None:
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(each, dict) for each in value):
        return None
    for name in (column,) if column else ID_NAMES:
        if all(name in each for each in value):
            return _key(name, [_plain_id(each[name]) for each in value])
    return None


def _key(column: str | None, ids: list[str]) -> Key | None:
    """None where something is no id, or comes twice."""
    if len(ids) < 2 or "" in ids or len(set(ids)) < len(ids):
        return None
    return Key(column=column, ids=tuple(ids))


def _id_column(header: Sequence[str], column: str | None) -> str | None:
    """The column of ids: the named one, else one with a usual name, else one that ends in `id`."""
    if column is not None:
        return column if column in header else None
    lower = {name.lower(): name for name in header}
    for name in ID_NAMES:
        if name in lower:
            return lower[name]
    return next((name for name in header if name.lower().endswith("id")), None)


def _plain_id(value: Any) -> str:
    """An id as text; empty for what cannot be one."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _answer(value: Any) -> str:
    """What is shown as the answer: the field of a usual name, else everything."""
    if isinstance(value, Mapping):
        if len(value) == 1:
            return _answer(next(iter(value.values())))
        for name in ANSWER_NAMES:
            if name in value:
                return _answer(value[name])
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "" if value is None else text[:MAX_ANSWER]


def _text(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing or is not a plain file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 (byte {error.start})") from None


def _table(text: str) -> list[list[str]]:
    try:
        table = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"not a CSV file: {error}") from None
    if table and len(set(table[0])) < len(table[0]):
        raise ValueError(f"the header names a column twice: {table[0][:5]!r}")
    return table


def _document(text: str) -> Any:
    """JSON in which every number is finite and no object names a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(NESTED) from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"the JSON names {twice[:80]!r} twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"the JSON holds {name}, which is no number")
