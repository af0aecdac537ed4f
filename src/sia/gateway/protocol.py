"""What the parts of a run know of the gateway: leases, and what they cost."""

import enum
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sia.sandbox import Endpoint


class Role(enum.StrEnum):
    """Who asks a model."""

    META = "meta"  # writes the first harness
    FEEDBACK = "feedback"  # decides and edits ever after
    TARGET = "target"


@dataclass(frozen=True, kw_only=True)
class Spend:
    """What calls have cost; adds up with `+`.

    Attributes:
        calls: Answered calls that were paid for; what a recording answered is not among them.
        failed: Calls that ended without a usable answer.
        replayed: Calls that a recording answered.
        input_tokens: Prompt tokens, those read from a vendor's cache included.
        cached_tokens: Those among them that were read from the cache.
        output_tokens: Generated tokens.
        cost_usd: By the price table of the provider; 0 where a model has no price.
        unpriced: Calls to models without a price.
    """

    calls: int = 0
    failed: int = 0
    replayed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unpriced: int = 0

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Lease(Protocol):
    """The right of one caller to ask a model during one step of the run."""

    @property
    def endpoint(self) -> Endpoint:
        """Where, and with which key."""
        ...

    @property
    def refused(self) -> str:
        """Why a call of this lease was refused for lack of budget; empty if none was."""
        ...

    @property
    def answered(self) -> int:
        """How many calls of this lease got a usable answer, recorded ones included."""
        ...


class Gateway(Protocol):
    """The one way to a model. Safe to use from several threads."""

    def lease(
        self, role: Role, scope: str, *, policy: Path | None = None
    ) -> AbstractContextManager[Lease]:
        """Opens the way for one step; its key is worthless after the block.

        Args:
            role: Decides about provider and model.
            scope: Names the step, for example `g003-c0/target`. Calls are recorded under it; a
                step that is done again is answered from what it recorded before.
            policy: What an update of the weights has left. A model that the run serves itself
                answers with it; others are asked as they are.
        """
        ...

    def spend(self) -> dict[Role, Spend]:
        """What each role has spent so far, earlier sessions of the run included."""
        ...
