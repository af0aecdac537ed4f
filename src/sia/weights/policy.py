"""What can be trained: the contract of a policy, and what passes between it and an update.

Letters: B answers, T tokens of an answer. A policy whose answer is one label has T = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Item:
    """A train item: what is asked, and the right answer where there is one."""

    id: str
    prompt: str
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A reward that is due within an answer, after its first `end` characters."""

    end: int
    reward: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer of a policy to a train item; a line of a samples file.

    Attributes:
        item: Id of the item.
        reward: None where the answer could not be scored.
        group: Samples of one group answer the same item and were sampled alike.
        logprob: Of the whole answer under the policy that gave it, in nats; None if unknown.
        step_rewards: Where the reward was earned, for recipes that credit steps; else None.
    """

    item: str
    prompt: str
    answer: str
    reward: float | None
    group: str
    logprob: float | None = None
    step_rewards: tuple[Step, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Prompts and answers as a policy reads them.

    Attributes:
        inputs: Tensors whose first axis is B; only the policy that made them looks inside.
        mask_BT: 1.0 for tokens of the answer, 0.0 for padding, which is on the right.
        width: Tokens that the model reads for one row, prompt, answer and padding.
        cut: How many prompts or answers were longer than the policy's limits and were cut.
    """

    inputs: dict[str, Tensor]
    mask_BT: Tensor
    width: int
    cut: int = 0

    def rows(self, index: Tensor | slice) -> Tokens:
        """Some of the answers, in the order of `index`."""
        inputs = {name: tensor[index] for name, tensor in self.inputs.items()}
        return Tokens(inputs=inputs, mask_BT=self.mask_BT[index], width=self.width)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Answers of a policy: `group` for each prompt, those of one prompt side by side.

    Attributes:
        answers: As text, without special tokens.
        tokens: The same answers as the policy sampled them.
        logprobs_BT: Under the sampling policy at its temperature; 0 on padding.
    """

    answers: list[str]
    tokens: Tokens
    logprobs_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a policy says about given answers, (B, T) each; 0 on padding.

    Attributes:
        logprobs_BT: Log-probability of each token, given all before it.
        entropy_BT: Of the distribution that the token came from, in nats; None unless asked for.
        values_BT: The value head before the token; None unless asked for.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor | None = None
    values_BT: Tensor | None = None


class Policy(Protocol):
    """Answers items, and can be trained: a frozen base and a small adapter.

    Everything is deterministic: the same adapter, arguments and seed give the same result on the
    same machine. Dropout is off.
    """

    @property
    def module(self) -> nn.Module:
        """All parameters, frozen ones included; on the device where the policy computes."""
        ...

    @property
    def base(self) -> str:
        """What the base is called, for messages and records."""
        ...

    @property
    def base_sha256(self) -> str:
        """Identity of the base; an adapter fits no other one."""
        ...

    @property
    def max_answer_tokens(self) -> int:
        """Tokens of the longest answer that it can give; 1 where an answer is one label."""
        ...

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> Tokens:
        """Prompts and given answers, aligned.

        Raises:
            WeightsError: An answer that this policy could never give.
        """
        ...

    def sample(
        self, prompts: Sequence[str], *, group: int, temperature: float, seed: int
    ) -> Sampled:
        """`group` answers to each prompt. Builds no graph."""
        ...

    def logprobs(
        self,
        tokens: Tokens,
        *,
        temperature: float = 1.0,
        base: bool = False,
        entropy: bool = False,
        values: bool = False,
    ) -> Scores:
        """Scores of given answers, with a graph unless gradients are switched off.

        Args:
            tokens: From `encode` or `sample` of this policy.
            temperature: That the answers are, or were, sampled at.
            base: With the adapter switched off.
            entropy: Whether to give the entropy too; costs memory.
            values: Whether to give the values too; needs a value head.
        """
        ...

    def ends(self, tokens: Tokens) -> Tensor:
        """Characters of the answer up to and including each token, (B, T) of integers."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order: the adapter, and the value head where there is one."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter, and nothing of the base, into an empty folder."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Reads what `save_adapter` wrote.

        Raises:
            WeightsError: The folder holds no adapter, or one for another base.
        """
        ...
