"""Which candidates become the parents of the next generation. Decides by dev score alone.

Whatever a search goes on from, the best candidate of all generations is what the run ends with and
what the exam looks at.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sia.errors import ConfigError
from sia.records import Result
from sia.search.tree import Archive, Puct
from sia.tasks.task import Metric

__all__ = ["Archive", "Chain", "KeepBest", "Puct", "Search", "best"]


class Search(Protocol):
    """Names the parents of a generation, and says how many candidates it has.

    Pure: the same results and the same state of `rng` give the same parents, so that a resumed run
    goes on from what the unbroken run went on from.
    """

    @property
    def candidates(self) -> int:
        """Candidates of every generation after the first; at least 1."""
        ...

    def parents(
        self, results: Sequence[Result], metric: Metric, rng: np.random.Generator
    ) -> Sequence[Result]:
        """The parent of each candidate of the next generation, in their order.

        One result may be named several times. Never one that has no score; empty where nothing was
        scored yet, and else of length `candidates`.

        Args:
            results: All so far, oldest first.
            metric: What the scores mean.
            rng: For every random choice; a stream of this generation's own.
        """
        ...


class Chain:
    """Always goes on from the latest scored candidate, also where it lost."""

    candidates = 1

    def parents(
        self, results: Sequence[Result], metric: Metric, rng: np.random.Generator
    ) -> Sequence[Result]:
        """The latest scored result."""
        scored = [result for result in results if result.score is not None]
        return scored[-1:]


class KeepBest:
    """Goes on from the best candidate so far: a tie or a loss keeps the incumbent."""

    def __init__(self, *, candidates: int = 1) -> None:
        """Sets how many candidates are made from it in a generation.

        Raises:
            ConfigError: None is wanted.
        """
        if candidates < 1:
            raise ConfigError(f"search.candidates={candidates} must be at least 1.")
        self.candidates = candidates

    def parents(
        self, results: Sequence[Result], metric: Metric, rng: np.random.Generator
    ) -> Sequence[Result]:
        """The earliest of the best results, once for each candidate."""
        incumbent = best(results, metric)
        return [incumbent] * self.candidates if incumbent else []


def best(results: Sequence[Result], metric: Metric) -> Result | None:
    """The result with the best score; of equal ones the earliest; None where nothing was scored."""
    found: Result | None = None
    for result in results:
        if result.score is None:
            continue
        if found is None or found.score is None or metric.better(result.score, found.score):
            found = result
    return found
