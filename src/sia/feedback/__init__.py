"""What the Feedback-Agent is shown of the past.

Of the dev split alone: never a test result, never an answer key. `Scores` and `Blind` show no
single item; `Failures` and `Traces` show a bounded sample of failed ones, without what is right.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sia.errors import ConfigError
from sia.records import Candidate, Failure, Outcome, Result

__all__ = ["Blind", "Failures", "Feedback", "Scores", "Shown", "Traces"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One past candidate as the meta backend sees it.

    Attributes:
        failures: A sample of dev items that it did not get right.
        traces: How many of its trajectories may be looked at.
    """

    candidate: Candidate
    outcome: Outcome
    reason: str
    score: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    symptoms: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, Any] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    traces: int = 0


class Feedback(Protocol):
    """Selects what is shown of a result; pure."""

    def show(self, result: Result) -> Shown:
        """The part of `result` that the meta backend may see."""
        ...


class Scores:
    """The dev score with its aggregates: metrics, symptoms, per-class recall and confusions."""

    def show(self, result: Result) -> Shown:
        """Everything that is an aggregate over the dev items."""
        evaluation = result.evaluation
        if evaluation is None:
            return Blind().show(result)
        return Shown(
            candidate=result.candidate,
            outcome=result.outcome,
            reason=result.reason,
            score=result.score,
            metrics=evaluation.metrics,
            symptoms=evaluation.symptoms,
            breakdown=evaluation.breakdown,
        )


class Failures:
    """What `Scores` shows, and a sample of failed dev items with what the target answered.

    Args:
        items: At most so many; a record keeps no more than 20.
    """

    def __init__(self, *, items: int = 20) -> None:
        if items < 1:
            raise ConfigError(f"feedback.items={items} must be at least 1. Or: feedback=scores")
        self._items = items

    def show(self, result: Result) -> Shown:
        """Aggregates, and failures of the dev split if it was the one that was scored."""
        shown = Scores().show(result)
        if result.evaluation is None or result.evaluation.split != "dev":
            return shown
        return replace(shown, failures=result.evaluation.failures[: self._items])


class Traces:
    """What `Failures` shows, and trajectories.

    Args:
        items: Failed items at most.
        trajectories: Trajectories at most, those of failed items where their names tell.
    """

    def __init__(self, *, items: int = 20, trajectories: int = 5) -> None:
        if trajectories < 1:
            raise ConfigError(
                f"feedback.trajectories={trajectories} must be at least 1. Or: feedback=failures"
            )
        self._failures = Failures(items=items)
        self._trajectories = trajectories

    def show(self, result: Result) -> Shown:
        """Aggregates, failures, and leave to look at trajectories."""
        return replace(self._failures.show(result), traces=self._trajectories)


class Blind:
    """The dev score and nothing else: the arm that tells what reading the evaluation is worth."""

    def show(self, result: Result) -> Shown:
        """The score, and the reason of a failure."""
        return Shown(
            candidate=result.candidate,
            outcome=result.outcome,
            reason=result.reason,
            score=result.score,
        )
