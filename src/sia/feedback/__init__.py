"""What the Feedback-Agent is shown of the past.

Dev scores and aggregates at most: never a test result, never an answer key, never the score of a
single item.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from sia.records import Candidate, Outcome, Result

__all__ = ["Blind", "Feedback", "Scores", "Shown"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One past candidate as the meta backend sees it."""

    candidate: Candidate
    outcome: Outcome
    reason: str
    score: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    symptoms: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, Any] = field(default_factory=dict)


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
