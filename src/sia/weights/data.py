"""Batches of an update: rounds of answers, cut into optimiser steps.

A round is a function of the seed, its number, and the policy; where an update stands is three
numbers and the round at hand. So an update that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule
from torch import Tensor

from sia.errors import WeightsError
from sia.seeds import stream, stream_seed
from sia.weights import objectives
from sia.weights.memory import halving
from sia.weights.policy import Item, Policy, Sample, Tokens
from sia.weights.recipes import Credit, OnPolicy, Recipe, Round, Sft, StepBatch
from sia.weights.rollout import Answers, TrainTask, answer_items, hand

EMPTY_ROUNDS = 20  # in a row: then nothing can be learned any more
STEP_TOKENS = 8192  # that pass through the model at once where micro_batch is None
SAFETY = 1.1  # a step is not begun if it would end after the deadline, by the longest step so far


@dataclass(frozen=True, kw_only=True)
class StepData:
    """One optimiser step.

    Attributes:
        index: Number of the step, from 0.
        reward: Mean over the scored answers of the round; None where there are no rewards.
    """

    index: int
    tokens: Tokens
    batch: StepBatch
    reward: float | None


@dataclass
class Tally:
    """What the rounds of an update add up to.

    Attributes:
        tokens: Of all answers that were sampled or read, once a round.
        groups: Of answers to one item.
        silent: Groups whose rewards are all equal: they carry no signal.
        empty_rounds: Rounds without any signal; another one was drawn.
        unscored: Answers without a reward.
        cut: Prompts and answers that were too long.
    """

    answers: int = 0
    tokens: int = 0
    groups: int = 0
    silent: int = 0
    rounds: int = 0
    empty_rounds: int = 0
    unscored: int = 0
    cut: int = 0


class Source(Protocol):
    """Where the answers of a round come from."""

    def draw(self, number: int) -> Answers:
        """The answers of round `number`."""
        ...


class Rollouts:
    """Rounds that the policy of the moment answers."""

    def __init__(self, *, policy: Policy, recipe: OnPolicy, task: TrainTask, seed: int) -> None:
        self._policy, self._recipe, self._task, self._seed = policy, recipe, task, seed

    def draw(self, number: int) -> Answers:
        """Answers of the policy, as it is now, to the items whose turn it is."""
        items = [
            self._task.items[k]
            for k in hand(number, self._recipe.items, len(self._task.items), self._seed)
        ]
        return answer_items(
            self._policy, self._task, items, group=self._recipe.group,
            temperature=self._recipe.temperature,
            seed=stream_seed(self._seed, f"answers/{number}"),
        )  # fmt: skip


class Recorded:
    """Rounds of answers that were given before, by the policy that the update starts from.

    Samples without a reward are left out, except for `sft`, which needs none.
    """

    def __init__(
        self, *, policy: Policy, recipe: Recipe, samples: Sequence[Sample], seed: int
    ) -> None:
        """Reads the samples with the policy as it is now.

        Raises:
            WeightsError: No sample has a reward, or the policy could never give one of the answers.
        """
        scored = [s for s in samples if s.reward is not None or isinstance(recipe, Sft)]
        if not scored:
            raise WeightsError(
                f"None of the {len(samples)} samples has a reward: recipe {recipe.name!r} has "
                "nothing to learn from."
            )
        self._recipe, self._seed = recipe, seed
        self._unscored = len(samples) - len(scored)
        numbers = {group: n for n, group in enumerate(dict.fromkeys(s.group for s in scored))}
        self._samples = scored
        self._groups = [numbers[s.group] for s in scored]
        self._members: list[list[int]] = [[] for _ in numbers]
        for row, group in enumerate(self._groups):
            self._members[group].append(row)
        self._tokens = policy.encode([s.prompt for s in scored], [s.answer for s in scored])
        self._logprobs_BT: Tensor | None = None
        if isinstance(recipe, OnPolicy):
            self._logprobs_BT = scores(policy, recipe, self._tokens, "logprobs_BT")

    def draw(self, number: int) -> Answers:
        """The groups whose turn it is."""
        recipe = self._recipe
        size = recipe.items if isinstance(recipe, OnPolicy) else recipe.batch or 16
        chosen = hand(number, size, len(self._members), self._seed)
        rows = [row for group in chosen for row in self._members[group]]
        index = torch.tensor(rows, device=self._tokens.mask_BT.device)
        return Answers(
            tokens=self._tokens.rows(index),
            rewards=[self._samples[row].reward or 0.0 for row in rows],
            groups=[self._groups[row] for row in rows],
            step_rewards=[self._samples[row].step_rewards for row in rows],
            logprobs_BT=None if self._logprobs_BT is None else self._logprobs_BT[index],
            unscored=self._unscored if number == 0 else 0,
        )


def references(items: Sequence[Item]) -> list[Sample]:
    """The items that have a reference answer, as samples for `sft`.

    Raises:
        WeightsError: No item has one.
    """
    found = [
        Sample(item=i.id, prompt=i.prompt, answer=i.reference, reward=None, group=i.id)
        for i in items
        if i.reference is not None
    ]
    if not found:
        raise WeightsError(
            f"None of the {len(items)} train items has a reference answer, and recipe 'sft' needs "
            "them. Recipes that need rewards only: best_of_n, reinforce, grpo, entropic"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A round, ready to be cut into steps; rows are those of `credit`."""

    tokens: Tokens
    advantages_RT: Tensor
    old_RT: Tensor | None = None
    base_RT: Tensor | None = None
    old_values_RT: Tensor | None = None
    targets_RT: Tensor | None = None
    reward: float | None = None


@dataclass
class _State:
    """Where the update stands."""

    step: int = 0
    round: int = 0
    plan: list[list[int]] = field(default_factory=list)  # rows of the steps still to come
    seconds: float = 0.0  # that the update has used before this process, probes left out


class Steps:
    """The optimiser steps of an update, in order. An iterable that can go on where it stood.

    Attributes:
        ended: Why it ended: `steps`, `wall_s`, or `no_signal`; empty while it has not.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        recipe: Recipe,
        source: Source,
        seed: int,
        deadline: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares nothing yet.

        Args:
            policy: Answers, or reads the recorded answers.
            recipe: Says what counts.
            source: Of the rounds.
            seed: Of the order in which a round is trained on.
            deadline: By `clock`; no step is begun that would probably end after it.
            clock: Seconds from anywhere, never backwards.
        """
        self._policy, self._recipe, self._source, self._seed = policy, recipe, source, seed
        self._deadline, self._clock = deadline, clock
        self._state = _State()
        self._prepared: _Prepared | None = None
        self._begun: float | None = None
        self.tally = Tally()
        self.ended = ""

    def __len__(self) -> int:
        return self._recipe.steps

    def __iter__(self) -> Iterator[StepData]:
        longest = 0.0
        while self._state.step < self._recipe.steps:
            longest = max(longest, self.pause())
            self._begun = self._clock()
            if self._deadline is not None and self._begun + SAFETY * longest > self._deadline:
                self.ended = "wall_s"
                return
            if not self._state.plan and not self._next_round():
                self.ended = "no_signal"
                return
            rows = self._state.plan.pop(0)
            self._state.step += 1
            if self._state.step == self._recipe.steps:
                self.ended = "steps"
            yield self._step(self._state.step - 1, rows)

    def pause(self) -> float:
        """Counts the time of the step that has just been taken, and gives it, in seconds."""
        took = 0.0 if self._begun is None else self._clock() - self._begun
        self._begun = None
        self._state.seconds += took
        return took

    @property
    def seconds(self) -> float:
        """Rounds and steps so far, earlier processes included, up to the last `pause`."""
        return self._state.seconds

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later process needs to go on."""
        found: dict[str, Any] = {
            "state": vars(self._state).copy(),
            "tally": vars(self.tally).copy(),
        }
        if self._state.plan and self._prepared is not None:
            prepared = vars(self._prepared).copy()
            prepared["tokens"] = vars(self._prepared.tokens).copy()
            found["prepared"] = prepared
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        self._state = _State(**state["state"])
        self.tally = Tally(**state["tally"])
        self._prepared = None
        if (prepared := state.get("prepared")) is not None:
            # A checkpoint is read into the memory of the CPU.
            device = next(self._policy.module.parameters()).device
            there = move_data_to_device(prepared, device)
            self._prepared = _Prepared(**{**there, "tokens": Tokens(**there["tokens"])})

    def _next_round(self) -> bool:
        """Draws until a round has something to learn from; False if none has."""
        for _ in range(EMPTY_ROUNDS):
            answers = self._source.draw(self._state.round)
            self._state.round += 1
            self._count(answers)
            prepared = self._prepare(answers) if answers.rewards else None
            if prepared is not None:
                self._prepared = prepared
                self._state.plan = self._plan(len(prepared.advantages_RT))
                return True
            self.tally.empty_rounds += 1
        return False

    def _count(self, answers: Answers) -> None:
        rewards_B = torch.tensor(answers.rewards, dtype=torch.float64)
        groups_B = torch.tensor(answers.groups, dtype=torch.long)
        tally = self.tally
        tally.rounds += 1
        tally.answers += len(answers.rewards)
        tally.tokens += int(answers.tokens.mask_BT.sum())
        tally.unscored += answers.unscored
        tally.cut += answers.tokens.cut
        if len(answers.rewards):
            signal_B = objectives.group_signal(rewards_B, groups_B)
            tally.groups += len(torch.unique(groups_B))
            tally.silent += len(torch.unique(groups_B[~signal_B]))

    def _prepare(self, answers: Answers) -> _Prepared | None:
        """What the recipe makes of a round; None if nothing of it carries a signal."""
        policy, recipe, tokens = self._policy, self._recipe, answers.tokens
        mask_BT = tokens.mask_BT
        rewards_B = torch.tensor(answers.rewards, device=mask_BT.device)
        old_BT = answers.logprobs_BT
        charged = isinstance(recipe, OnPolicy) and recipe.charges_kl
        base_BT = scores(policy, recipe, tokens, "logprobs_BT", base=True) if charged else None
        values_BT = scores(policy, recipe, tokens, "values_BT") if recipe.uses_values else None
        credit: Credit = recipe.credit(
            Round(
                mask_BT=mask_BT,
                rewards_B=rewards_B,
                groups_B=torch.tensor(answers.groups, device=mask_BT.device),
                token_rewards_BT=self._token_rewards(answers, rewards_B),
                logprobs_BT=old_BT,
                base_BT=base_BT,
                values_BT=values_BT,
            )
        )
        rows_R = credit.rows_R
        if len(rows_R) == 0:
            return None
        tokens = tokens.rows(rows_R)
        if recipe.uses_base and not charged:
            base_RT: Tensor | None = scores(policy, recipe, tokens, "logprobs_BT", base=True)
        else:
            base_RT = None if base_BT is None else base_BT[rows_R]
        return _Prepared(
            tokens=tokens,
            advantages_RT=credit.advantages_RT,
            old_RT=None if old_BT is None or self._fresh(answers) else old_BT[rows_R],
            base_RT=base_RT,
            old_values_RT=None if values_BT is None else values_BT[rows_R],
            targets_RT=credit.targets_RT,
            reward=None if isinstance(recipe, Sft) else math.fsum(answers.rewards) / len(rewards_B),
        )

    def _fresh(self, answers: Answers) -> bool:
        """Whether a round is one step of the policy that answered it: then old and new agree."""
        recipe = self._recipe
        return (
            isinstance(self._source, Rollouts)
            and isinstance(recipe, OnPolicy)
            and recipe.epochs == 1
            and (recipe.batch is None or recipe.batch >= len(answers.rewards))
        )

    def _token_rewards(self, answers: Answers, rewards_B: Tensor) -> Tensor:
        """Each reward at the token that earned it: the last one, or those that end its steps."""
        mask_BT = answers.tokens.mask_BT
        paid_BT = torch.zeros_like(mask_BT)
        last_B = (mask_BT.sum(1).long() - 1).clamp(min=0)
        whole = torch.tensor([steps is None for steps in answers.step_rewards])
        rows_B = torch.arange(len(rewards_B), device=mask_BT.device)
        paid_BT[rows_B, last_B] = rewards_B * whole.to(mask_BT.device)
        if bool(whole.all()) or not self._recipe.uses_values:
            return paid_BT
        ends_BT = self._policy.ends(answers.tokens)
        for row, steps in enumerate(answers.step_rewards):
            for step in steps or ():
                before = int((ends_BT[row] < step.end).sum())
                paid_BT[row, min(before, int(last_B[row]))] += step.reward
        return paid_BT

    def _plan(self, n: int) -> list[list[int]]:
        """Rows of each step of a round, shuffled where there are several steps."""
        recipe = self._recipe
        epochs = recipe.epochs if isinstance(recipe, OnPolicy) else 1
        units = n // recipe.unit
        parts = math.ceil(n / recipe.batch) if recipe.batch else 1
        if parts == epochs == 1:
            return [list(range(n))]
        plan = []
        for epoch in range(epochs):
            rng = stream(self._seed, f"order/{self._state.round}/{epoch}")
            order = rng.permutation(units).tolist() if parts > 1 else list(range(units))
            for part in range(parts):
                share = order[units * part // parts : units * (part + 1) // parts]
                plan.append([u * recipe.unit + k for u in share for k in range(recipe.unit)])
        return [rows for rows in plan if rows]

    def _step(self, index: int, rows: list[int]) -> StepData:
        prepared = self._prepared
        assert prepared is not None
        whole = len(rows) == len(prepared.advantages_RT) and rows == list(range(len(rows)))
        where = slice(None) if whole else torch.tensor(rows, device=prepared.advantages_RT.device)

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[where]

        tokens = prepared.tokens.rows(where)
        weights_BT = objectives.token_weights(
            tokens.mask_BT, average=self._recipe.average, length=self._policy.max_answer_tokens
        )
        batch = StepBatch(
            weights_BT=weights_BT,
            share=1 / len(rows),
            advantages_BT=prepared.advantages_RT[where],
            old_BT=some(prepared.old_RT),
            base_BT=some(prepared.base_RT),
            old_values_BT=some(prepared.old_values_RT),
            targets_BT=some(prepared.targets_RT),
        )
        return StepData(index=index, tokens=tokens, batch=batch, reward=prepared.reward)


class UpdateData(LightningDataModule):
    """The steps of an update, as Lightning wants them."""

    def __init__(self, *, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> Steps:
        """The steps; not a `DataLoader`: answers are made by the policy that is being trained."""
        return self.steps

    def transfer_batch_to_device(
        self, batch: StepData, device: torch.device, dataloader_idx: int
    ) -> StepData:
        """A batch is made where the policy is."""
        return batch


@torch.no_grad()
def scores(
    policy: Policy, recipe: Recipe, tokens: Tokens, which: str, *, base: bool = False
) -> Tensor:
    """One kind of scores of all answers, (B, T), without a graph, in parts that fit into memory."""
    rows = len(tokens.mask_BT)
    temperature = recipe.temperature if isinstance(recipe, OnPolicy) else 1.0

    def run(size: int) -> Tensor:
        parts = []
        for start in range(0, rows, size):
            part = tokens.rows(slice(start, start + size))
            found = policy.logprobs(
                part, temperature=temperature, base=base, values=which == "values_BT"
            )
            parts.append(getattr(found, which))
        return torch.cat(parts) if parts else torch.zeros_like(tokens.mask_BT)

    return halving(run, part_size(recipe, tokens)).value


def part_size(recipe: Recipe, tokens: Tokens) -> int:
    """Answers that pass through the model at once."""
    rows = max(len(tokens.mask_BT), 1)
    size = recipe.micro_batch or STEP_TOKENS // max(tokens.width, 1)
    size -= size % recipe.unit
    return min(max(size, recipe.unit), max(rows, recipe.unit))
