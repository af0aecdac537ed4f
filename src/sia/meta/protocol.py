"""The contract of a meta backend: Meta-Agent for the first harness, Feedback-Agent ever after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sia.feedback import Shown
from sia.records import Candidate, Choice, Decision, Lever, Proposal, Update
from sia.tasks.task import Metric


@dataclass(frozen=True, kw_only=True)
class Request:
    """One harness is wanted.

    Attributes:
        decision: What led here.
        workspace: A copy of the parent's harness (of the reference harness for generation 0), to
            be edited in place. The only folder the backend may write to.
        parent: What the copy was made from; None for generation 0.
        history: All earlier candidates, oldest first, as far as `feedback` shows them.
        siblings: Proposals already made for this same generation, maybe from other parents.
        state: A folder that the backend may keep files of its own in; survives a resume.
        metric: What the scores in `history` mean.
        seed: For every random choice of this proposal; a function of run seed, generation and
            index, so that a resumed run proposes what the unbroken run proposed.
    """

    generation: int
    index: int
    decision: Decision
    workspace: Path
    parent: Candidate | None
    history: Sequence[Shown]
    siblings: Sequence[Proposal]
    state: Path
    metric: Metric
    seed: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which lever comes next?

    Attributes:
        generation: The one that was closed last; the decision is about the one after it.
        parent: What the next harness will be made from; of several, the first.
        folder: For what the backend wants to keep of this decision (prompt, transcript).
        history: All candidates, oldest first, as far as `feedback` shows them; never empty.
        levers: What may be chosen.
        recipes: How the weights may be updated; empty where that lever is off.
        updates: Those made so far, in order.
        references: Whether train items come with their answers.
        state, metric, seed: As in `Request`.
    """

    generation: int
    parent: Candidate | None
    folder: Path
    history: Sequence[Shown]
    levers: Sequence[Lever]
    recipes: Sequence[Choice]
    updates: Sequence[Update]
    references: bool
    state: Path
    metric: Metric
    seed: int


class MetaBackend(Protocol):
    """Proposes harnesses and decides which lever comes next.

    Both calls must be functions of their arguments: what a backend keeps between calls is a cache
    that can be rebuilt from the history, because a resumed run starts with a new object.
    """

    def propose(self, request: Request) -> Proposal:
        """Edits `request.workspace` in place and says what was changed and why.

        Raises:
            BadProposal: Nothing usable came of it; counted as a failed candidate.
            MetaBackendError: The backend cannot go on at all; ends the run.
        """
        ...

    def decide(self, question: Question) -> Decision:
        """Chooses the next lever after a generation was closed."""
        ...
