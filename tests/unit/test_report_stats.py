"""Statistics over runs: known values from other implementations, and what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from sia import seeds
from sia.report import stats


def rng() -> np.random.Generator:
    return seeds.stream(0, "test")


def test_one_seed_is_the_t_interval_over_items() -> None:
    scores = np.random.default_rng(0).random((1, 50))
    found = stats.crossed(scores)
    known = scipy_stats.ttest_1samp(scores[0], 0.0)
    low, high = known.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    found = stats.crossed(scores - 0.45)
    assert found.p == pytest.approx(scipy_stats.ttest_1samp(scores[0], 0.45).pvalue, rel=1e-6)


def test_scores_without_items_are_the_t_interval_over_seeds() -> None:
    scores = np.array([[0.71], [0.74], [0.70], [0.79]])
    found = stats.crossed(scores)
    known = scipy_stats.ttest_1samp(scores[:, 0], 0.0)
    low, high = known.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(known.pvalue, rel=1e-6)
    assert found.se == pytest.approx(scipy_stats.sem(scores[:, 0]))
    assert stats.crossed(scores[:1]).low is None
    assert stats.crossed(np.full((3, 1), 0.7)).low is None


def test_the_variance_is_that_of_the_crossed_analysis_of_variance() -> None:
    """Sums of squares written out by hand for two seeds and three items."""
    scores = np.array([[1.0, 2.0, 6.0], [5.0, 8.0, 8.0]])
    # Means of the seeds 3 and 7, of the items 3, 5 and 7: mean squares of seeds 24, of items 8, of
    # the rest 2. (seeds + items - rest) / (2 * 3) is the variance of the mean.
    found = stats.crossed(scores)
    assert found.value == 5.0
    assert found.se == pytest.approx(((24 + 8 - 2) / 6) ** 0.5)


def test_seeds_that_agree_leave_the_interval_to_the_items() -> None:
    one = np.random.default_rng(0).random((1, 40))
    found, alone = stats.crossed(np.repeat(one, 3, axis=0)), stats.crossed(one)
    assert found.low == pytest.approx(alone.low)
    assert found.high == pytest.approx(alone.high)


def test_dev_and_test_of_the_same_seeds_are_a_gap_between_independent_items() -> None:
    dev, test = np.random.default_rng(0).random((2, 1, 300))
    found = stats.crossed(dev, -test)
    known = scipy_stats.ttest_ind(dev[0], test[0], equal_var=False).confidence_interval()
    assert found.value == pytest.approx(dev.mean() - test.mean())
    assert (found.low, found.high) == pytest.approx(tuple(known), abs=1e-3)
    with pytest.raises(ValueError, match="not crossed"):
        stats.crossed(np.ones((2, 3)), np.ones((3, 3)))


@settings(deadline=None)
@given(
    st.integers(1, 5), st.integers(2, 30), st.floats(-5, 5), st.floats(0.1, 10),
    st.integers(0, 2**32),
)  # fmt: skip
def test_intervals_move_and_stretch_with_the_scores(
    n_seeds: int, n_items: int, shift: float, scale: float, seed: int
) -> None:
    scores = np.random.default_rng(seed).normal(size=(n_seeds, n_items))
    plain, moved = stats.crossed(scores), stats.crossed(shift + scale * scores)
    assert plain.low is not None
    assert plain.high is not None
    assert plain.low <= plain.value <= plain.high
    assert moved.low == pytest.approx(shift + scale * plain.low, abs=1e-8)
    assert moved.high == pytest.approx(shift + scale * plain.high, abs=1e-8)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 2**32))
def test_p_is_below_five_percent_where_the_interval_leaves_zero_out(
    n_seeds: int, n_items: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.normal(generator.normal(0, 0.5), 1, size=(n_seeds, n_items))
    found = stats.crossed(scores)
    assert found.p is not None
    assert found.low is not None
    assert found.high is not None
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_two_runs_scored_right_or_wrong_are_compared_by_mcnemars_exact_test() -> None:
    differences = np.array([1.0] * 15 + [-1.0] * 4 + [0.0] * 81)
    expected = scipy_stats.binomtest(15, 19).pvalue
    assert stats.paired_test(differences, rng=rng()) == pytest.approx(expected)
    assert stats.paired_test(np.zeros(9), rng=rng()) == 1.0


def test_graded_differences_are_compared_by_flipping_signs() -> None:
    differences = np.array([0.3, 0.2, 0.5, -0.1, 0.4, 0.6])
    # All 64 flips, counted: 2 of them reach the sum on each side of the two extremes.
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    sums = (signs * np.abs(differences)[:, None]).sum(0)
    expected = (np.abs(sums) >= differences.sum() - 1e-9).mean()
    assert stats.paired_test(differences, rng=rng()) == pytest.approx(expected)


def test_holms_correction_agrees_with_the_example_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_p_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = stats.holm(p_values)
    assert all(new >= old for new, old in zip(adjusted, p_values, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_optimism_of_equal_candidates_is_that_of_the_largest_of_so_many() -> None:
    """Against the expected maximum of 12 independent normal means."""
    found = [
        stats.optimism(np.random.default_rng(n).normal(size=(12, 100)), draws=200, rng=rng())
        for n in range(60)
    ]
    largest = np.random.default_rng(0).normal(size=(20_000, 12)).max(1).mean()
    assert np.mean(found) == pytest.approx(largest / 10, rel=0.08)


def test_a_choice_among_one_or_among_equals_flatters_nobody() -> None:
    scores = (np.random.default_rng(0).random((1, 80)) < 0.5).astype(float)
    assert stats.optimism(scores, draws=100, rng=rng()) == 0.0
    clear = np.concatenate([scores * 0.0, scores * 0.0 + 1.0])
    assert stats.optimism(clear, draws=100, rng=rng()) == 0.0
    # A twin in all items cannot be chosen for its luck.
    twin = stats.optimism(np.repeat(scores, 2, axis=0), draws=2_000, rng=rng())
    assert twin == pytest.approx(0.0, abs=0.005)


def test_the_floor_is_the_interval_of_a_difference_between_equal_arms() -> None:
    repeats = np.array([[0.70], [0.72], [0.74]])
    expected = scipy_stats.t.ppf(0.975, 2) * 0.02 * (2 / 3) ** 0.5
    assert stats.noise_floor(repeats, seeds=3) == pytest.approx(expected)
    with pytest.raises(ValueError, match="one repeat"):
        stats.noise_floor(repeats[:1], seeds=3)


def test_one_seed_knows_items_alone() -> None:
    differences = np.array([[1.0] * 15 + [-1.0] * 4 + [0.0] * 81])
    found = stats.paired_gain(differences, draws=10_000, rng=rng())
    assert found.p == found.p_items
    assert (found.low, found.high) == (found.these_low, found.these_high)
    known = scipy_stats.bootstrap(
        (differences[0],), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.011)


def gain(value: float, half: float, p: float) -> stats.Gain:
    return stats.Gain(
        value=value, se=half / 2, low=value - half, high=value + half, these_low=None,
        these_high=None, p=p, p_items=None, detectable=half,
    )  # fmt: skip


def test_a_gain_is_claimed_where_interval_correction_and_floor_agree() -> None:
    def verdicts(*gains: stats.Gain, floor: float | None = None) -> list[str]:
        return [c.verdict for c in stats.claims(gains, floor=[floor] * len(gains))]

    assert verdicts(gain(0.05, 0.02, 0.001)) == ["better"]
    assert verdicts(gain(-0.05, 0.02, 0.001)) == ["worse"]
    assert verdicts(gain(0.05, 0.06, 0.1)) == ["within noise"]
    assert verdicts(gain(0.05, 0.02, 0.001), floor=0.06) == ["within noise"]
    # Enough alone, not among three.
    assert verdicts(gain(0.05, 0.045, 0.03)) == ["better"]
    assert verdicts(*[gain(0.05, 0.045, 0.03)] * 3) == ["within noise"] * 3
