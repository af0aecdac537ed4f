"""What verifiers of tables of answers share: a fixed denominator, and shares by group."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from sia.tasks.tables import Row


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """The rows of a submission, held against the items of one split.

    Attributes:
        given: Item -> all its rows, in their order; none where it was left out.
        answered: Item -> its row, where there is one alone that can be read.
        missing, duplicated, unreadable: How many items have no such row, and why.
    """

    given: dict[str, list[Row]]
    answered: dict[str, Row]
    missing: int
    duplicated: int
    unreadable: int


def sort_rows(
    rows: Iterable[Row],
    items: Collection[str],
    *,
    id: str,
    answer: str,
    readable: Callable[[Row], bool],
) -> Sorted:
    """Holds a submission against the items of a split.

    Rows of other items are ignored, because a submission covers dev and test together.

    Args:
        rows: From `read_submission`.
        items: Ids of the split; every one of them counts.
        id: Column of the ids.
        answer: Column of the answers; an empty one is missing.
        readable: Whether a row with an answer can be understood.
    """
    given: dict[str, list[Row]] = {item: [] for item in items}
    for row in rows:
        if row[id] in given:
            given[row[id]].append(row)
    answered: dict[str, Row] = {}
    missing = duplicated = unreadable = 0
    for item, own in given.items():
        if len(own) > 1:
            duplicated += 1
        elif not own or not own[0][answer]:
            missing += 1
        elif not readable(own[0]):
            unreadable += 1
        else:
            answered[item] = own[0]
    return Sorted(
        given=given, answered=answered, missing=missing, duplicated=duplicated,
        unreadable=unreadable,
    )  # fmt: skip


def recall_by(
    items: Mapping[str, float], truth: Mapping[str, Row], column: str
) -> dict[str, dict[str, float]]:
    """For each value of a column: how many items have it, and which share of them is right."""
    hits: dict[str, list[float]] = defaultdict(list)
    for item, hit in items.items():
        hits[truth[item][column]].append(hit)
    return {value: {"n": len(hits[value]), "recall": mean(hits[value])} for value in sorted(hits)}


def mean(values: Iterable[float]) -> float:
    """Their mean; 0 where there are none."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0
