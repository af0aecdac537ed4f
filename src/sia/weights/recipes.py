"""The menu of the weights lever: each recipe is an objective with its settings.

A recipe says which answers of a round count and for how much (`credit`), and what is minimised
(`loss`); sampling, batching and stepping are the same for all of them. All defaults are this
project's own: the paper (arXiv 2605.27276) reports rank 32 and a learning rate of 4e-5 on a large
model, and nothing else. This module imports no torch until a recipe is used.

A recipe of your own: a function in `objectives.py`, a class here, a schema in `sia.config`, a file
in `conf/weights`, and a test.

Letters: B answers of a round, R rows of them that are trained on, T tokens of an answer.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sia.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from sia.weights.policy import Scores


@dataclass(frozen=True, kw_only=True)
class Round:
    """Answers with their rewards, as `credit` sees them.

    Attributes:
        mask_BT: 1.0 for tokens of the answer.
        rewards_B: Finite.
        groups_B: Equal for answers to the same item.
        token_rewards_BT: The rewards at the tokens that earned them.
        logprobs_BT: Under the policy that gave the answers; None unless the recipe asks for it.
        base_BT: Under the base; None unless the recipe asks for it.
        values_BT: Of the value head; None unless the recipe asks for it.
    """

    mask_BT: Tensor
    rewards_B: Tensor
    groups_B: Tensor
    token_rewards_BT: Tensor
    logprobs_BT: Tensor | None = None
    base_BT: Tensor | None = None
    values_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Credit:
    """What is trained on: rows of the round, and what each of their tokens was worth.

    Attributes:
        rows_R: Indices into the round; answers without a signal are not among them.
        advantages_RT: (R, T), or (R, 1) for one advantage an answer.
        targets_RT: For the value head; None where there is none.
    """

    rows_R: Tensor
    advantages_RT: Tensor
    targets_RT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Answers of one optimiser step, or a part of them, as `loss` sees them.

    Attributes:
        weights_BT: Share of each token in the loss of the whole step; 0 on padding.
        share: 1 / number of answers of the whole step.
        old_BT: Log-probabilities at the time of sampling; None where the step is the first after
            it, so that they equal the present ones.
    """

    weights_BT: Tensor
    share: float
    advantages_BT: Tensor
    old_BT: Tensor | None = None
    base_BT: Tensor | None = None
    old_values_BT: Tensor | None = None
    targets_BT: Tensor | None = None

    def rows(self, part: slice) -> StepBatch:
        """Some of the answers."""
        parts = {
            name: value[part] for name, value in vars(self).items() if name.endswith("_BT")
            if value is not None
        }  # fmt: skip
        return dataclasses.replace(self, **parts)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all recipes share.

    Attributes:
        steps: Optimiser steps of an update.
        lr: Learning rate of AdamW, after `warmup` steps of linear growth.
        head_lr: Of heads over labels or values, which start from zero where the adapted layers
            start from a trained base; None: `lr`.
        decay: `none`, or `linear`: the learning rate then falls to 0 at the last step.
        batch: Answers of an optimiser step; None: the whole round.
        micro_batch: Answers that pass through the model at once; None: the whole step. Halves
            itself when memory runs out; changes neither loss nor gradient.
        max_grad_norm: Gradients are scaled down to this norm.
        rank: Of the adapter; a child keeps the rank, alpha, targets and kind of its parent.
        alpha: The adapter is scaled by alpha / rank.
        dora: DoRA instead of LoRA: magnitude and direction are trained apart.
        targets: `all-linear`, or comma-separated names of linear layers.
        average: How tokens are weighed; see `sia.weights.objectives.token_weights`.
    """

    needs: ClassVar[str]  # labels, rewards, pairs, or values
    when: ClassVar[str]  # to choose it
    unit: ClassVar[int] = 1  # rows that may not be torn apart
    uses_values: ClassVar[bool] = False  # of a value head

    name: str
    steps: int = 50
    lr: float = 1e-4
    head_lr: float | None = None
    warmup: int = 5
    decay: str = "none"
    weight_decay: float = 0.0
    batch: int | None = None
    micro_batch: int | None = None
    max_grad_norm: float = 1.0
    rank: int = 16
    alpha: float = 32.0
    dora: bool = False
    targets: str = "all-linear"
    average: str = "token"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            WeightsError: Values out of range, all of them in one message.
        """
        if faults := list(self.faults()):
            raise WeightsError(f"recipe {self.name!r}: " + " ".join(faults))

    def faults(self) -> list[str]:
        """A sentence for each value that is out of range."""
        found = []
        for name, least in _AT_LEAST.items():
            value = getattr(self, name, None)
            if value is not None and not (math.isfinite(value) and value >= least):
                found.append(f"{name}={value!r} must be at least {least:g}.")
        for name, most in _AT_MOST.items():
            value = getattr(self, name, None)
            if value is not None and value > most:
                found.append(f"{name}={value!r} must be at most {most:g}.")
        for name, allowed in _ONE_OF.items():
            value = getattr(self, name, allowed[0])
            if value not in allowed:
                found.append(f"{name}={value!r} must be one of {', '.join(allowed)}.")
        for name in ("lr", "head_lr"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                found.append(f"{name}={rate!r} must be more than 0.")
        for name in ("batch", "micro_batch"):
            if (getattr(self, name) or 0) % self.unit:
                found.append(f"{name}={getattr(self, name)!r} must be a multiple of {self.unit}.")
        return found

    def pace(self, step: int) -> float:
        """Share of the learning rate that a step has, counted from 0."""
        grown = min(1.0, (step + 1) / (self.warmup + 1))
        return grown if self.decay == "none" else grown * max(0.0, 1 - step / self.steps)

    @property
    def uses_base(self) -> bool:
        """Whether the log-probabilities under the base are needed."""
        return False

    @property
    def uses_entropy(self) -> bool:
        """Whether the entropy is part of the loss."""
        return False

    def credit(self, answers: Round) -> Credit:
        """Which answers count, and for how much."""
        raise NotImplementedError

    def loss(self, scores: Scores, batch: StepBatch) -> Tensor:
        """What is minimised; parts of a step add up to the loss of the step."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Recipe):
    """What recipes share that learn from the policy's own answers.

    Attributes:
        items: Train items of a round, drawn without repetition until all have had their turn.
        group: Answers to each of them.
        temperature: That they are sampled at.
        epochs: Passes over the answers of a round.
        kl_coef: How strongly the policy is held to the base; 0 saves the base's forward pass.
        kl_estimator: `k3` in the loss, `k3_weighted` by the ratio to the sampling policy, which
            makes its gradient unbiased, or `k1` taken from the reward.
    """

    items: int = 16
    group: int = 8
    temperature: float = 1.0
    epochs: int = 1
    kl_coef: float = 0.0
    kl_estimator: str = "k3_weighted"

    @property
    def uses_base(self) -> bool:
        """Whether the policy is held to the base."""
        return self.kl_coef > 0

    @property
    def charges_kl(self) -> bool:
        """Whether the KL divergence is taken from the reward."""
        return self.kl_coef > 0 and self.kl_estimator == "k1"

    def charged(self, answers: Round) -> Tensor:
        """Rewards of the answers, less the KL divergence where it is charged, (B,)."""
        if not self.charges_kl:
            return answers.rewards_B
        return answers.rewards_B + self._charge_BT(answers).sum(1)

    def _charge_BT(self, answers: Round) -> Tensor:
        from sia.weights import objectives

        assert answers.logprobs_BT is not None
        assert answers.base_BT is not None
        kl_BT = objectives.kl_to_base(answers.logprobs_BT, answers.base_BT, estimator="k1")
        return -self.kl_coef * kl_BT * answers.mask_BT

    def _held(self, loss: Tensor, scores: Scores, batch: StepBatch) -> Tensor:
        """The loss with the KL divergence to the base where it belongs there."""
        if not self.kl_coef or self.charges_kl:
            return loss
        from sia.weights import objectives

        assert batch.base_BT is not None
        old_BT = None
        if self.kl_estimator == "k3_weighted":
            old_BT = scores.logprobs_BT.detach() if batch.old_BT is None else batch.old_BT
        return loss + self.kl_coef * objectives.kl_loss(
            scores.logprobs_BT, batch.base_BT, batch.weights_BT, old_BT=old_BT
        )


@dataclass(frozen=True, kw_only=True)
class NoUpdate:
    """weights=none: the lever is off."""

    name: str = "none"


@dataclass(frozen=True, kw_only=True)
class Auto:
    """weights=auto: the Feedback-Agent chooses among all recipes.

    Attributes:
        recipes: Name -> settings that go over those that the task recommends, and over the
            recipe's own.
    """

    name: str = "auto"
    recipes: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sft(Recipe):
    """Cross-entropy on the reference answers of the train items."""

    needs: ClassVar[str] = "labels"
    when: ClassVar[str] = "labelled train items exist"

    name: str = "sft"
    lr: float = 2e-4
    batch: int | None = 16

    def credit(self, answers: Round) -> Credit:
        """All answers, for the same."""
        import torch

        rows_R = torch.arange(len(answers.rewards_B), device=answers.rewards_B.device)
        return Credit(rows_R=rows_R, advantages_RT=torch.ones_like(answers.rewards_B)[:, None])

    def loss(self, scores: Scores, batch: StepBatch) -> Tensor:
        """Negative log-likelihood."""
        from sia.weights import objectives

        return objectives.cross_entropy_loss(scores.logprobs_BT, batch.weights_BT)


@dataclass(frozen=True, kw_only=True)
class BestOfN(OnPolicy):
    """Cross-entropy on the best answers of each group.

    Attributes:
        top_k: Best answers of each group that are learned; groups of equal rewards have none.
    """

    needs: ClassVar[str] = "rewards"
    when: ClassVar[str] = "almost no reward yet and no gradient signal: a phase zero before RL"

    name: str = "best_of_n"
    group: int = 16
    top_k: int = 1

    def credit(self, answers: Round) -> Credit:
        """The best answers, for the same."""
        import torch

        from sia.weights import objectives

        rewards_B = self.charged(answers)
        rows_R = torch.nonzero(
            objectives.best_of_group(rewards_B, answers.groups_B, top_k=self.top_k)
        ).flatten()
        return Credit(rows_R=rows_R, advantages_RT=torch.ones_like(rewards_B)[rows_R, None])

    def loss(self, scores: Scores, batch: StepBatch) -> Tensor:
        """Negative log-likelihood, and the hold to the base."""
        from sia.weights import objectives

        loss = objectives.cross_entropy_loss(scores.logprobs_BT, batch.weights_BT)
        return self._held(loss, scores, batch)


@dataclass(frozen=True, kw_only=True)
class Clipped(OnPolicy):
    """What the recipes share that weigh answers by an advantage and clip the ratio.

    Attributes:
        clip_low: A token may get rarer by this share before it stops to pull.
        clip_high: A token may get likelier by this share before it stops to pull.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def loss(self, scores: Scores, batch: StepBatch) -> Tensor:
        """The clipped surrogate, and the hold to the base."""
        from sia.weights import objectives

        old_BT = scores.logprobs_BT.detach() if batch.old_BT is None else batch.old_BT
        loss = objectives.clipped_loss(
            scores.logprobs_BT, old_BT, batch.advantages_BT, batch.weights_BT,
            clip_low=self.clip_low, clip_high=self.clip_high,
        )  # fmt: skip
        return self._held(loss, scores, batch)


@dataclass(frozen=True, kw_only=True)
class Reinforce(OnPolicy):
    """Score-function gradient with a baseline, held to the base.

    Attributes:
        baseline: `leave_one_out` (RLOO), `mean` of the group, or `batch` for one answer an item.
    """

    needs: ClassVar[str] = "rewards"
    when: ClassVar[str] = "the reward is dense, the base is close already, regression is the risk"

    name: str = "reinforce"
    kl_coef: float = 0.02
    baseline: str = "leave_one_out"

    def credit(self, answers: Round) -> Credit:
        """Reward less baseline; groups without a signal are dropped."""
        from sia.weights import objectives

        return _signal(
            objectives.group_advantages(
                self.charged(answers), answers.groups_B, baseline=self.baseline, scale="none"
            )
        )

    def loss(self, scores: Scores, batch: StepBatch) -> Tensor:
        """-advantage * log-probability, and the hold to the base."""
        from sia.weights import objectives

        loss = objectives.reinforce_loss(scores.logprobs_BT, batch.advantages_BT, batch.weights_BT)
        return self._held(loss, scores, batch)


@dataclass(frozen=True, kw_only=True)
class Grpo(Clipped):
    """Group-relative policy optimisation.

    Attributes:
        baseline: `mean` of the group, or `leave_one_out` (RLOO).
        scale: Advantages are divided by the standard deviation of the `group`, of the `batch`, or
            not: `none`.

    Dr. GRPO is `scale=none average=constant`; DAPO is `average=token clip_high=0.28`; the original
    is `average=sequence`.
    """

    needs: ClassVar[str] = "rewards"
    when: ClassVar[str] = "rollouts are cheap and the reward comes only at the end of an answer"

    name: str = "grpo"
    average: str = "sequence"
    baseline: str = "mean"
    scale: str = "group"

    def credit(self, answers: Round) -> Credit:
        """Standing of each answer in its group; groups without a signal are dropped."""
        from sia.weights import objectives

        return _signal(
            objectives.group_advantages(
                self.charged(answers), answers.groups_B, baseline=self.baseline, scale=self.scale
            )
        )


@dataclass(frozen=True, kw_only=True)
class Ppo(Clipped):
    """Proximal policy optimisation with a value head and generalised advantage estimates.

    Attributes:
        gamma: Discount of a reward per token.
        lam: 1 trusts the rewards alone, 0 the value head alone.
        value_coef: Weight of the value loss.
        value_clip: How far the value may move in a round; None: as far as it wants.
        entropy_coef: Weight of the entropy bonus; 0 saves its memory.
        whiten: Whether advantages are scaled to mean 0 and variance 1 over the round. Once most
            answers are right this blows noise up; the charge for divergence keeps it in bounds.
    """

    needs: ClassVar[str] = "values"
    when: ClassVar[str] = "steps of long answers are rewarded and stability comes first"
    uses_values: ClassVar[bool] = True

    name: str = "ppo"
    epochs: int = 2
    kl_coef: float = 0.02
    kl_estimator: str = "k1"
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.5
    value_clip: float | None = 0.2
    entropy_coef: float = 0.0
    whiten: bool = True

    @property
    def uses_entropy(self) -> bool:
        """Whether there is an entropy bonus."""
        return self.entropy_coef > 0

    def credit(self, answers: Round) -> Credit:
        """All answers; each token for what it earned beyond the value head's expectation."""
        import torch

        from sia.weights import objectives

        assert answers.values_BT is not None
        rewards_BT = answers.token_rewards_BT
        if self.charges_kl:
            rewards_BT = rewards_BT + self._charge_BT(answers)
        found = objectives.gae(
            rewards_BT, answers.values_BT, answers.mask_BT, gamma=self.gamma, lam=self.lam
        )
        advantages_BT = found.values_BT
        if self.whiten:
            advantages_BT = objectives.whiten(advantages_BT, answers.mask_BT)
        rows_R = torch.arange(len(rewards_BT), device=rewards_BT.device)
        return Credit(rows_R=rows_R, advantages_RT=advantages_BT, targets_RT=found.targets_BT)

    def loss(self, scores: Scores, batch: StepBatch) -> Tensor:
        """The clipped surrogate, the value loss, the entropy bonus, and the hold to the base."""
        from sia.weights import objectives

        assert scores.values_BT is not None
        assert batch.old_values_BT is not None
        assert batch.targets_BT is not None
        loss = Clipped.loss(self, scores, batch)
        loss = loss + self.value_coef * objectives.value_loss(
            scores.values_BT, batch.old_values_BT, batch.targets_BT, batch.weights_BT,
            clip=self.value_clip,
        )  # fmt: skip
        if scores.entropy_BT is not None:
            bonus = objectives.entropy_bonus(scores.entropy_BT, batch.weights_BT)
            loss = loss - self.entropy_coef * bonus
        return loss


@dataclass(frozen=True, kw_only=True)
class Entropic(Clipped):
    """Entropic utility: rare large successes count for more than the spread of the group says.

    Attributes:
        kl: Distance of the weights from uniform, in nats; ln 2 is about half the group.
        cap: Upper limit of an advantage.
    """

    needs: ClassVar[str] = "rewards"
    when: ClassVar[str] = "the reward has a heavy right tail: rare, large successes"

    name: str = "entropic"
    kl_coef: float = 0.02
    kl: float = math.log(2.0)
    cap: float = 10.0

    def credit(self, answers: Round) -> Credit:
        """Entropic weight against the rest of the group; groups without a signal are dropped."""
        from sia.weights import objectives

        return _signal(
            objectives.entropic_advantages(
                self.charged(answers), answers.groups_B, kl=self.kl, cap=self.cap
            )
        )


@dataclass(frozen=True, kw_only=True)
class Dpo(OnPolicy):
    """Direct preference optimisation on the best and the worst answer of each group.

    Attributes:
        beta: How far the policy may move from the base: the larger, the closer it stays.
    """

    needs: ClassVar[str] = "pairs"
    when: ClassVar[str] = "the verifier can rank answers but not score them"
    unit: ClassVar[int] = 2

    name: str = "dpo"
    beta: float = 0.1

    @property
    def uses_base(self) -> bool:
        """Always: pairs are judged against the base."""
        return True

    def credit(self, answers: Round) -> Credit:
        """Rows in pairs: a better answer, then a worse one."""
        import torch

        from sia.weights import objectives

        pairs = objectives.best_and_worst(answers.rewards_B, answers.groups_B)
        rows_R = torch.stack([pairs.chosen_P, pairs.rejected_P], 1).flatten()
        return Credit(rows_R=rows_R, advantages_RT=torch.ones_like(answers.rewards_B)[rows_R, None])

    def loss(self, scores: Scores, batch: StepBatch) -> Tensor:
        """Mean over the pairs of the step."""
        from sia.weights import objectives

        assert batch.base_BT is not None
        counts_BT = batch.weights_BT != 0
        ours_B = (scores.logprobs_BT * counts_BT).sum(1)
        base_B = (batch.base_BT * counts_BT).sum(1)
        losses_P = objectives.dpo_losses(
            ours_B[0::2], ours_B[1::2], base_B[0::2], base_B[1::2], beta=self.beta
        )
        return self._held(losses_P.sum() * (2 * batch.share), scores, batch)


def _signal(advantages: Any) -> Credit:
    rows_R = advantages.signal_B.nonzero().flatten()
    return Credit(rows_R=rows_R, advantages_RT=advantages.values_B[rows_R, None])


RECIPES: dict[str, type[Recipe]] = {
    "sft": Sft,
    "best_of_n": BestOfN,
    "reinforce": Reinforce,
    "grpo": Grpo,
    "ppo": Ppo,
    "entropic": Entropic,
    "dpo": Dpo,
}

_AT_LEAST = {
    "steps": 1, "warmup": 0, "batch": 1, "micro_batch": 1, "rank": 1, "items": 1, "group": 2,
    "epochs": 1, "kl_coef": 0, "top_k": 1, "clip_low": 0, "clip_high": 0, "gamma": 0, "lam": 0,
    "value_coef": 0, "value_clip": 0, "entropy_coef": 0, "weight_decay": 0, "kl": 0, "beta": 0,
    "max_grad_norm": 1e-12, "alpha": 1e-12, "temperature": 1e-3, "cap": 1e-12,
}  # fmt: skip
_AT_MOST = {"gamma": 1, "lam": 1, "clip_low": 1}
_ONE_OF = {
    "average": ("token", "sequence", "constant"),
    "decay": ("none", "linear"),
    "baseline": ("mean", "leave_one_out", "batch"),
    "scale": ("group", "batch", "none"),
    "kl_estimator": ("k1", "k3", "k3_weighted"),
}


def recipe(settings: Mapping[str, Any]) -> Recipe:
    """The recipe that `settings["name"]` names, with the other settings in place of its defaults.

    Raises:
        WeightsError: The name or a setting is unknown, or a value is out of range.
    """
    name = settings.get("name")
    made = RECIPES.get(str(name))
    if made is None:
        raise WeightsError(
            f"There is no recipe {name!r}.{_nearest(str(name), RECIPES)} "
            f"Recipes: {', '.join(RECIPES)}"
        )
    known = {field.name: field for field in dataclasses.fields(made)}
    for key in settings:
        if key not in known:
            raise WeightsError(
                f"recipe {name!r} has no setting {key!r}.{_nearest(key, known)} "
                f"Settings: {', '.join(known)}"
            )
    try:
        return made(**settings)
    except TypeError as error:
        raise WeightsError(f"recipe {name!r}: a setting has the wrong type: {error}") from error


def menu() -> dict[str, dict[str, str]]:
    """What each recipe needs and when to choose it, for whoever decides."""
    return {name: {"needs": made.needs, "when": made.when} for name, made in RECIPES.items()}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
