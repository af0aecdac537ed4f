"""Which candidate becomes the parent of the next generation. Decides by dev score alone."""

from collections.abc import Sequence
from typing import Protocol

from sia.records import Result
from sia.tasks.task import Metric

__all__ = ["Chain", "KeepBest", "Search", "best"]


class Search(Protocol):
    """A parent for the next generation, and how many candidates it gets; pure."""

    @property
    def candidates(self) -> int:
        """Candidates of every generation after the first."""
        ...

    def parent(self, results: Sequence[Result], metric: Metric) -> Result | None:
        """The result whose harness is edited next; None where nothing was scored yet."""
        ...


class Chain:
    """Always goes on from the latest scored candidate, also where it lost."""

    candidates = 1

    def parent(self, results: Sequence[Result], metric: Metric) -> Result | None:
        """The latest scored result."""
        return next((result for result in reversed(results) if result.score is not None), None)


class KeepBest:
    """Goes on from the best candidate so far: a tie or a loss keeps the incumbent."""

    def __init__(self, *, candidates: int = 1) -> None:
        self.candidates = candidates

    def parent(self, results: Sequence[Result], metric: Metric) -> Result | None:
        """The earliest of the best results."""
        return best(results, metric)


def best(results: Sequence[Result], metric: Metric) -> Result | None:
    """The result with the best score; of equal ones the earliest; None where nothing was scored."""
    found: Result | None = None
    for result in results:
        if result.score is None:
            continue
        if found is None or found.score is None or metric.better(result.score, found.score):
            found = result
    return found
