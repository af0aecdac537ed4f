"""Intervals on scores of items: what a difference between two candidates is worth."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(scores: Array, *, draws: int, rng: np.random.Generator) -> Interval:
    """95 % percentile-bootstrap interval of the mean over items.

    Args:
        scores: Score of each item, shape (n,).
        draws: Resamples; 10_000 gives the third digit.
        rng: A stream from `sia.seeds`; the result is a function of its state.
    """
    means = _resampled_means(scores, draws, rng)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(scores.mean()), low=float(low), high=float(high))


def paired_difference(
    before: Array, after: Array, *, draws: int, rng: np.random.Generator
) -> Interval:
    """95 % interval of mean(after) - mean(before) over the same items.

    Args:
        before: Shape (n,), aligned with `after` by item.
        after: Shape (n,).
        draws: Resamples.
        rng: A stream from `sia.seeds`.

    Raises:
        ValueError: The two differ in length.
    """
    if before.shape != after.shape:
        raise ValueError(f"{before.shape[0]} and {after.shape[0]} items cannot be paired")
    return mean_interval(after - before, draws=draws, rng=rng)


def aligned(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[Array, Array]:
    """The scores of two candidates on the same items, in the order of the items' ids.

    Raises:
        ValueError: The items differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"{len(a.keys() ^ b.keys())} items have a score in one candidate only")
    names = sorted(a)
    return np.array([a[name] for name in names]), np.array([b[name] for name in names])


def _resampled_means(scores: Array, draws: int, rng: np.random.Generator) -> Array:
    # Scores of items take few distinct values, so resampling counts is exact and much cheaper
    # than resampling items.
    values, counts = np.unique(scores, return_counts=True)
    resampled = rng.multinomial(len(scores), counts / len(scores), size=draws)
    means: Array = resampled @ values / len(scores)
    return means
