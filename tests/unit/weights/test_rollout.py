"""Whose turn it is, and samples on disk."""

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sia.weights.policy import Sample, Step
from sia.weights.rollout import hand, read_samples, write_samples


@given(n=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 5))
def test_everything_has_its_turn_before_anything_comes_again(n: int, size: int, seed: int) -> None:
    counts: Counter[int] = Counter()
    for number in range(6):
        dealt = hand(number, size, n, seed)
        assert len(dealt) == min(size, n)
        counts.update(dealt)
        assert max(counts.values()) - min(counts[k] for k in range(n)) <= 1


def test_a_hand_is_a_function_of_its_number_and_the_seed() -> None:
    assert hand(3, 4, 10, seed=1) == hand(3, 4, 10, seed=1)
    assert [hand(k, 10, 10, seed=1) for k in range(3)] != [
        hand(k, 10, 10, seed=2) for k in range(3)
    ]


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = [
        Sample(item="1", prompt="né?\n", answer="", reward=None, group="a"),
        Sample(
            item="2", prompt="", answer="好", reward=-1.5, group="b", logprob=-3.25,
            step_rewards=(Step(end=1, reward=-1.5),),
        ),
    ]  # fmt: skip
    write_samples(tmp_path / "samples.jsonl", samples)
    assert read_samples(tmp_path / "samples.jsonl") == samples
