"""What feedback lets through: aggregates, few failures, never an answer key or another split."""

import random

import pytest

from sia.errors import ConfigError
from sia.feedback import Blind, Failures, Scores, Traces
from sia.records import (
    Attempt,
    Candidate,
    Evaluation,
    Failure,
    Outcome,
    Proposal,
    Result,
    from_json,
    to_json,
)
from sia.tasks.task import Metric
from sia.verify.failures import MAX_FAILURES, MIN_WINDOW, sample_failures

ACCURACY = Metric(name="accuracy")


def result(split: str = "dev") -> Result:
    failures = tuple(Failure(item=f"i{n}", answer="a", score=0.0) for n in range(20))
    return Result(
        candidate=Candidate(
            id="g000-c0", generation=0, index=0, parent=None, proposal=Proposal(hypothesis="h")
        ),
        attempt=Attempt(candidate="g000-c0", outcome=Outcome.OK),
        evaluation=Evaluation(
            candidate="g000-c0",
            split=split,
            score=0.25,
            items={"i0": 0.0},
            metrics={"m": 1.0},
            failures=failures,
        ),
    )


@pytest.mark.parametrize("feedback", [Scores(), Blind()])
def test_single_items_are_shown_by_two_options_only(feedback: Scores | Blind) -> None:
    shown = feedback.show(result())
    assert (shown.score, shown.failures, shown.traces) == (0.25, (), 0)


def test_failures_and_traces_are_bounded_by_their_settings() -> None:
    shown = Failures(items=3).show(result())
    assert [failure.item for failure in shown.failures] == ["i0", "i1", "i2"]
    assert (shown.metrics, shown.traces) == ({"m": 1.0}, 0)
    shown = Traces(items=2, trajectories=4).show(result())
    assert (len(shown.failures), shown.traces) == (2, 4)


def test_failures_of_another_split_are_not_shown() -> None:
    for feedback in (Failures(), Traces()):
        assert feedback.show(result("test")).failures == ()


def test_an_attempt_without_a_score_has_no_failures() -> None:
    failed = Result(candidate=result().candidate, attempt=result().attempt, evaluation=None)
    assert Failures().show(failed).failures == ()


def test_nothing_to_show_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"feedback\.items=0"):
        Failures(items=0)
    with pytest.raises(ConfigError, match=r"feedback\.trajectories=0"):
        Traces(trajectories=0)


def test_an_evaluation_with_failures_survives_its_record() -> None:
    evaluation = result().evaluation
    assert from_json(to_json(evaluation), Evaluation) == evaluation


def items(n: int, right: int = 0) -> dict[str, float]:
    return {f"item-{i}": float(i < right) for i in range(n)}


def test_a_sample_is_small_and_takes_each_answer_in_turn() -> None:
    answers = {name: "often" if i % 10 else "rare" for i, name in enumerate(items(400))}
    sample = sample_failures(items(400), answers, ACCURACY)
    assert len(sample) == MAX_FAILURES
    assert [failure.answer for failure in sample[:4]] == ["often", "rare", "often", "rare"]


def test_a_sample_does_not_depend_on_the_order_of_the_items() -> None:
    scores = items(300, right=100)
    answers = {name: name[-1] for name in scores}
    shuffled = list(scores)
    random.Random(3).shuffle(shuffled)
    other = sample_failures(
        {name: scores[name] for name in shuffled}, dict(reversed(answers.items())), ACCURACY
    )
    assert other == sample_failures(scores, answers, ACCURACY)


def test_right_answers_and_unknown_items_are_never_in_a_sample() -> None:
    scores = items(50, right=40)
    answers = {**dict.fromkeys(scores, "x"), "a-test-item": "secret"}
    sample = sample_failures(scores, answers, ACCURACY)
    assert sample
    assert {failure.item for failure in sample} <= {f"item-{i}" for i in range(40, 50)}


def test_only_a_fixed_part_of_the_items_can_ever_be_seen() -> None:
    """An agent that learns by heart what it was shown gains an eighth at most."""
    seen: set[str] = set()
    scores = items(800)
    for _ in range(200):
        sample = sample_failures(scores, {}, ACCURACY)
        seen |= {failure.item for failure in sample}
        scores |= {failure.item: 1.0 for failure in sample}
    assert sample == ()
    assert len(seen) == 100
    small = {failure.item for failure in sample_failures(items(12), {}, ACCURACY)}
    assert len(small) == 12 <= MIN_WINDOW


def test_a_missing_answer_is_an_answer_too_and_a_long_one_is_cut() -> None:
    sample = sample_failures(items(2), {"item-0": "\ud800" + "x" * 900}, ACCURACY)
    assert sorted(len(failure.answer) for failure in sample) == [0, 200]
    assert from_json(to_json(sample[0]), Failure) == sample[0]


def test_where_less_is_better_a_failure_is_more_than_the_best() -> None:
    rmse = Metric(name="rmse", direction="minimize", best=0.0)
    assert [f.item for f in sample_failures({"a": 0.0, "b": 2.0}, {}, rmse)] == ["b"]
