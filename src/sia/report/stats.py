"""Statistics over several runs of an arm: what a table of a paper may claim.

Scores of an arm are a matrix, shape (S, N): S seeds (one run each) by the N items of a split. All
runs answer the same items, so seeds and items are crossed:

    score[s, i] = mean + seed[s] + item[i] + rest[s, i]

The estimand is the mean over all seeds that could have been drawn and all items that the split was
drawn from. A resampling of seeds cannot give its interval: three seeds have too few resamples, and
they are too much alike. The intervals here come from the components of variance instead.
`benchmarks/coverage.py` measures how often they hold the truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from sia.verify.stats import Array, mean_interval

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 9_999  # of a permutation test: p is never below 1 / 10,000
SMALLEST_P = 1e-12
BETTER, WORSE, NOISE = "better", "worse", "within noise"
POOLING_SEEDS = 3  # with fewer, a small spread of seeds says nothing


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with what is known of its error.

    Attributes:
        se: Standard error; None where one number is all there is. With one seed it is that of
            the items alone and says nothing of other seeds.
        low: End of the 95 % interval; None like `se`.
        high: The other end.
        p: Two-sided, of the mean being zero: the level at which the interval ends there.
        detectable: The true mean that a test at 5 % would find in four of five repetitions.
    """

    value: float
    se: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    detectable: float | None = None


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What one arm is worth over another.

    Attributes:
        low: Of the 95 % interval for new seeds and items; with one seed, for new items alone.
        these_low: Of the 95 % interval for new items with these very runs: the paired bootstrap.
            None where the scores of single items are not known.
        p: Two-sided, for new seeds and items; with one seed that of `p_items`.
        p_items: Exact paired test on items, for these very runs.
        detectable: As in `Estimate`.
    """

    value: float
    se: float | None
    low: float | None
    high: float | None
    these_low: float | None
    these_high: float | None
    p: float | None
    p_items: float | None
    detectable: float | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What may be said of a gain beside others; `verdict` is `better`, `worse`, `within noise`."""

    p_holm: float | None
    verdict: str


def crossed(*blocks: Array) -> Estimate:
    """Mean with its interval for new seeds and new items, from crossed scores.

    The variance has two parts. Items: the variance of the items' means, less what the rest adds to
    it. Seeds: the variance of the seeds' means, the rest included. Each part has its own t
    quantile, and the squares of the two half widths are added (Howe 1974, Approximate tolerance
    limits and confidence limits on the distribution of the sum, JASA 69:789; Burdick and Graybill
    1992, Confidence Intervals on Variance Components). Where three or more seeds differ by no more
    than the rest explains, the rest, with its many degrees of freedom, stands for them.

    Args:
        blocks: Each of shape (S, N_k), with the same seeds in the same order. The value is the sum
            of the blocks' means; the items of different blocks are independent draws. One block
            of scores or of paired differences is the usual case; dev scores and negated test
            scores give the gap between the two. N_k = 1 means that the scores are aggregates
            whose items nobody knows: the interval is one for new seeds alone.

    Raises:
        ValueError: The blocks have different numbers of seeds, or one is empty.
    """
    n_seeds = blocks[0].shape[0]
    if any(block.ndim != 2 or block.shape[0] != n_seeds or not block.size for block in blocks):
        raise ValueError(f"blocks of shape {[block.shape for block in blocks]} are not crossed")
    value = float(sum(block.mean() for block in blocks))
    items = rest = 0.0
    item_df = min((block.shape[1] - 1 for block in blocks if block.shape[1] > 1), default=0)
    for block in blocks:
        if block.shape[1] > 1:
            of_items, of_rest = _item_variances(block)
            items += max(of_items - of_rest, 0.0)
            rest += of_rest
    parts = [(items, item_df)] if item_df else []
    if n_seeds > 1:
        means = np.sum([block.mean(1) for block in blocks], axis=0)
        seeds = float(means.var(ddof=1)) / n_seeds
        if item_df and n_seeds >= POOLING_SEEDS and seeds <= rest:
            parts.append((rest, (n_seeds - 1) * item_df))
        else:
            parts.append((seeds, n_seeds - 1))
    # Aggregates that agree to the last digit say nothing of what items would have said.
    if not parts or (not item_df and np.isclose(parts[0][0], 0.0, atol=1e-24)):
        return Estimate(value=value)
    half = _half_width(parts, 1 - LEVEL)
    power = [
        special.stdtrit(df, 1 - (1 - LEVEL) / 2) + special.stdtrit(df, POWER) for _, df in parts
    ]
    return Estimate(
        value=value,
        se=float(np.sqrt(sum(part for part, _ in parts))),
        low=value - half,
        high=value + half,
        p=_p_value(value, parts),
        detectable=float(
            np.sqrt(sum(q**2 * part for q, (part, _) in zip(power, parts, strict=True)))
        ),
    )


def paired_gain(differences: Array, *, draws: int, rng: np.random.Generator) -> Gain:
    """Mean difference with all that is known of its error.

    Args:
        differences: Shape (S, N): of each item between the runs of each seed, positive where the
            arm is better. One column where the scores of single items are not known.
        draws: Of the bootstrap.
        rng: A stream from `sia.seeds`; the result is a function of its state.
    """
    found = crossed(differences)
    gain = Gain(
        value=found.value, se=found.se, low=found.low, high=found.high, these_low=None,
        these_high=None, p=found.p, p_items=None, detectable=found.detectable,
    )  # fmt: skip
    if differences.shape[1] == 1:
        return gain
    of_items = differences.mean(0)
    these = mean_interval(of_items, draws=draws, rng=rng)
    p_items = paired_test(of_items, rng=rng)
    gain = replace(gain, these_low=these.low, these_high=these.high, p_items=p_items)
    if differences.shape[0] > 1:
        return gain
    return replace(gain, low=these.low, high=these.high, p=p_items)


def claims(gains: Sequence[Gain], *, floor: Sequence[float | None]) -> list[Claim]:
    """What may be claimed of all comparisons of a table, in their order.

    `better` and `worse` need the interval, p after Holm's correction, and the noise floor to agree;
    all else is `within noise`.

    Args:
        gains: One for each comparison.
        floor: Of each comparison, from `noise_floor`; None where it is not known.
    """
    adjusted = iter(holm([gain.p for gain in gains if gain.p is not None]))
    found = []
    for gain, least in zip(gains, floor, strict=True):
        p_holm = next(adjusted) if gain.p is not None else None
        noise = (
            p_holm is None
            or gain.low is None
            or gain.high is None
            or p_holm >= 1 - LEVEL
            or gain.low <= 0 <= gain.high
            or abs(gain.value) <= (least or 0.0)
        )
        verdict = NOISE if noise else BETTER if gain.value > 0 else WORSE
        found.append(Claim(p_holm=p_holm, verdict=verdict))
    return found


def paired_test(differences: Array, *, rng: np.random.Generator) -> float:
    """Two-sided p of the items' differences being as likely below zero as above, size for size.

    Holds exactly at any number of items, for these runs: it knows nothing of other seeds. Where all
    differences that are not zero have one size, as between two runs scored 0 or 1, this is
    McNemar's exact test; else signs are flipped at random, 9,999 times, or in all ways where there
    are fewer.

    Args:
        differences: Shape (N,): of each item, averaged over seeds where there are several.
        rng: A stream from `sia.seeds`; the result is a function of its state.
    """
    sizes = np.abs(differences)
    tiny = 1e-12 * max(1.0, float(sizes.max(initial=0.0)))
    moved = differences[sizes > tiny]
    if not moved.size:
        return 1.0
    if np.ptp(np.abs(moved)) <= tiny:
        return float(stats.binomtest(int((moved > 0).sum()), moved.size).pvalue)
    found = stats.permutation_test(
        (moved,), np.sum, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        batch=1_000, rng=rng,
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for how many there are, in their order: below 0.05 means 5 % for all of them.

    Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def optimism(scores: Array, *, draws: int, rng: np.random.Generator) -> float:
    """How far the score of the best candidate is expected to lie above its true one.

    The choice is repeated on bootstrap samples of the items, each winner is scored on the items
    that its sample left out, and the mean of that is taken from the best score on all items
    (Tsamardinos, Greasidou and Borboudakis 2018, Bootstrapping the out-of-sample predictions for
    efficient and accurate cross-validation, Machine Learning 107:1895). Unbiased where candidates
    are equally good, a little too large where they differ. The mean over one bootstrap sample's own
    items instead, as in Efron's optimism, would be a third too small among equals.

    It knows the choice among these candidates alone. That they were made after looking at the
    same items adds to the real gap.

    Args:
        scores: Shape (candidates, items), in the order of the search, higher is better; of equal
            candidates the first is chosen.
        draws: Bootstrap samples.
        rng: A stream from `sia.seeds`.
    """
    n_candidates, n_items = scores.shape
    if n_candidates == 1 or n_items == 1:
        return 0.0
    counts = rng.multinomial(n_items, np.full(n_items, 1 / n_items), size=draws)
    left_out = counts == 0
    some = left_out.any(1)  # with a handful of items a sample can hold all of them
    counts, left_out = counts[some], left_out[some]
    winners = _argmax(counts @ scores.T / n_items)
    outside = (left_out @ scores.T) / left_out.sum(1, keepdims=True)
    return float(scores.mean(1).max() - outside[np.arange(len(winners)), winners].mean())


def noise_floor(repeats: Array, *, seeds: int) -> float:
    """The difference that two equally good arms stay below in 95 % of cases.

    Args:
        repeats: Scores of one baseline that was not changed, shape (R, K): R seeds, K attempts.
        seeds: How many runs each arm has.

    Raises:
        ValueError: Fewer than two seeds: their spread is not known.
    """
    if repeats.shape[0] < 2:
        raise ValueError("the spread of one repeat is not known")
    variance = float(repeats.var(axis=0, ddof=1).mean())
    quantile = special.stdtrit(repeats.shape[0] - 1, 1 - (1 - LEVEL) / 2)
    return float(quantile * np.sqrt(2 * variance / seeds))


def _item_variances(block: Array) -> tuple[float, float]:
    """What items, the rest included, and the rest alone add to the variance of the mean."""
    n_seeds, n_items = block.shape
    by_item = block.mean(0)
    of_items = float(by_item.var(ddof=1)) / n_items
    if n_seeds == 1:
        return of_items, 0.0
    rest = block - block.mean(1, keepdims=True) - by_item + block.mean()
    return of_items, float((rest**2).sum()) / ((n_seeds - 1) * (n_items - 1)) / block.size


def _half_width(parts: Sequence[tuple[float, int]], alpha: float) -> float:
    squares = (special.stdtrit(df, alpha / 2) ** 2 * part for part, df in parts)
    return float(np.sqrt(sum(squares)))


def _p_value(value: float, parts: Sequence[tuple[float, int]]) -> float:
    """The alpha at which the half width is the distance from zero."""
    if abs(value) >= _half_width(parts, SMALLEST_P):
        return SMALLEST_P if value else 1.0
    found = optimize.brentq(
        lambda log_alpha: _half_width(parts, float(np.exp(log_alpha))) - abs(value),
        np.log(SMALLEST_P),
        0.0,
    )
    return float(np.exp(found))


def _argmax(means: Array) -> NDArray[np.intp]:
    """The first of the largest in each row; sums that differ by rounding alone are equal."""
    first: NDArray[np.intp] = (means >= means.max(1, keepdims=True) - 1e-12).argmax(1)
    return first
