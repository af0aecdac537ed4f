import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sia import seeds
from sia.verify.stats import aligned, mean_interval, paired_difference


def test_the_interval_of_a_proportion_agrees_with_its_textbook_value() -> None:
    scores = np.array([1.0] * 700 + [0.0] * 213)
    found = mean_interval(scores, draws=20_000, rng=seeds.stream(0, "t"))
    p = 700 / 913
    half = 1.96 * (p * (1 - p) / 913) ** 0.5
    assert found.value == pytest.approx(p)
    assert found.low == pytest.approx(p - half, abs=0.002)
    assert found.high == pytest.approx(p + half, abs=0.002)


def test_pairing_removes_what_two_candidates_have_in_common() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.5).astype(float)
    after = before.copy()
    after[:10] = 1.0
    found = paired_difference(before, after, draws=10_000, rng=seeds.stream(0, "t"))
    assert found.value == pytest.approx((after - before).mean())
    assert found.high - found.low < 0.03


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_interval_holds_the_value_and_repeats(scores: list[float]) -> None:
    first = mean_interval(np.array(scores), draws=200, rng=seeds.stream(1, "x"))
    again = mean_interval(np.array(scores), draws=200, rng=seeds.stream(1, "x"))
    assert first == again
    assert first.low <= first.high
    assert min(scores) - 1e-9 <= first.low
    assert first.high <= max(scores) + 1e-9


def test_items_that_differ_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="2 items"):
        aligned({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 0.0})
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(np.ones(2), np.ones(3), draws=10, rng=seeds.stream(0, "t"))
    a, b = aligned({"b": 0.0, "a": 1.0}, {"a": 0.5, "b": 0.25})
    assert (a == [1.0, 0.0]).all()
    assert (b == [0.5, 0.25]).all()
