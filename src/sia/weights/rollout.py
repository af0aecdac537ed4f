"""Answers and what they are worth: a task's train items, its reward, and rounds of answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sia.errors import WeightsError
from sia.seeds import stream
from sia.tasks.task import load_module
from sia.weights.policy import Item, Policy, Sample, Step, Tokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Scored answers, B of them, as a policy reads them.

    Attributes:
        groups: Equal for answers to the same item.
        step_rewards: Of answers whose steps are rewarded, in place of the reward of the whole.
        logprobs_BT: Under the policy that gave them; None if unknown.
        unscored: Answers that had no reward and were left out.
    """

    tokens: Tokens
    rewards: list[float]
    groups: list[int]
    step_rewards: list[tuple[Step, ...] | None]
    logprobs_BT: Tensor | None = None
    unscored: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a task offers to train on: items of its public side, and a reward for any answer.

    Attributes:
        rows: What `items` of the task gave, by id: it is handed back to `reward` as it is.
        reward_of: The task's `reward(item, answer)`; None where there are only recorded samples.
        steps_of: The task's `steps(item, answer)`, pairs of (characters, reward); None if it has
            none.
        sha256: Digest of the items and of the code that rewards them.
    """

    items: list[Item]
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reward_of: Callable[[Mapping[str, Any], str], float | None] | None = None
    steps_of: Callable[[Mapping[str, Any], str], Sequence[tuple[int, float]]] | None = None
    sha256: str = ""

    def reward(self, item: Item, answer: str) -> float | None:
        """The reward of an answer; None where the task cannot score it.

        Raises:
            WeightsError: The task's function failed, or gave something else than a finite number.
        """
        assert self.reward_of is not None
        try:
            found = self.reward_of(self.rows[item.id], answer)
        except Exception as error:
            raise WeightsError(
                f"reward() of the task failed on item {item.id!r}, answer {answer[:80]!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return None if found is None else _finite(found, item.id, answer)

    def steps(self, item: Item, answer: str) -> tuple[Step, ...] | None:
        """Rewards within an answer; None where the task knows only the whole."""
        if self.steps_of is None:
            return None
        found = self.steps_of(self.rows[item.id], answer)
        return tuple(
            Step(end=int(end), reward=_finite(reward, item.id, answer)) for end, reward in found
        )


def load_train_task(path: Path, public: Path) -> TrainTask:
    """Reads a task's `train.py` and its train items.

    Raises:
        WeightsError: The file or its functions are missing, or there are no usable items.
    """
    try:
        code = path.read_bytes()
        module = load_module(path)
    except (OSError, SyntaxError, ImportError) as error:
        raise WeightsError(
            f"{path} cannot be read ({error}). A task that can be trained on has a "
            "train.py with items(public_dir) and reward(item, answer)."
        ) from error
    for name in ("items", "reward"):
        if not callable(getattr(module, name, None)):
            raise WeightsError(
                f"{path} has no function {name}(). A train.py has items(public_dir) and "
                "reward(item, answer)."
            )
    rows = [dict(row) for row in module.items(public)]
    try:
        items = [
            Item(id=str(row["id"]), prompt=str(row["prompt"]), reference=row.get("reference"))
            for row in rows
        ]
    except KeyError as error:
        raise WeightsError(f"{path}: items() gave an item without {error}.") from error
    if not items:
        raise WeightsError(f"{path}: items() found no train items in {public}.")
    by_id = {item.id: row for item, row in zip(items, rows, strict=True)}
    if len(by_id) < len(items):
        raise WeightsError(f"{path}: items() gave {len(items) - len(by_id)} ids more than once.")
    text = json.dumps(rows, sort_keys=True, default=str, ensure_ascii=False)
    return TrainTask(
        items=items,
        rows=by_id,
        reward_of=module.reward,
        steps_of=getattr(module, "steps", None),
        sha256=hashlib.sha256(code + text.encode()).hexdigest(),
    )


def fold_of(prompt: str, folds: int) -> int:
    """The fold of an item: a function of its prompt, so that twins are never torn apart."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % folds


def read_samples(path: Path) -> list[Sample]:
    """Recorded samples, one JSON object a line.

    Raises:
        WeightsError: The file is missing or empty, or a line is not a sample.
    """
    samples = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise WeightsError(f"samples={str(path)!r} cannot be read ({error.strerror}).") from error
    decoder = msgspec.json.Decoder(Sample)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            samples.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            # JSON has no NaN: whoever writes one writes a line that is not JSON.
            raise WeightsError(f"{path}, line {number} is not a sample: {error}") from error
    if not samples:
        raise WeightsError(f"{path} holds no samples. An update needs at least one.")
    return samples


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes samples, one JSON object a line.

    Raises:
        WeightsError: A reward is not a finite number; JSON would silently make a null of it.
    """
    for sample in samples:
        if sample.reward is not None:
            _finite(sample.reward, sample.item, sample.answer)
    path.write_bytes(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))


def answer_items(
    policy: Policy,
    task: TrainTask,
    items: Sequence[Item],
    *,
    group: int,
    temperature: float,
    seed: int,
) -> Answers:
    """`group` answers of the policy to each item, scored by the task.

    An answer whose reward is None is left out and counted.

    Raises:
        WeightsError: See `TrainTask.reward`.
    """
    import torch

    sampled = policy.sample(
        [item.prompt for item in items], group=group, temperature=temperature, seed=seed
    )
    kept, rewards, groups, steps = [], [], [], []
    for row, answer in enumerate(sampled.answers):
        item = items[row // group]
        reward = task.reward(item, answer)
        if reward is None:
            continue
        kept.append(row)
        rewards.append(reward)
        groups.append(row // group)
        steps.append(task.steps(item, answer))
    tokens, logprobs_BT = sampled.tokens, sampled.logprobs_BT
    if len(kept) < len(sampled.answers):
        index = torch.tensor(kept, dtype=torch.long, device=logprobs_BT.device)
        tokens, logprobs_BT = tokens.rows(index), logprobs_BT[index]
    return Answers(
        tokens=tokens,
        rewards=rewards,
        groups=groups,
        step_rewards=steps,
        logprobs_BT=logprobs_BT,
        unscored=len(sampled.answers) - len(kept),
    )


def hand(number: int, size: int, n: int, seed: int) -> list[int]:
    """Hand `number` of `size` out of `n` things: all have their turn before one comes again.

    A function of its arguments alone, so that an update that goes on after a kill draws what it
    would have drawn. A hand is never larger than `n`.
    """
    size = min(size, n)
    first = number * size
    found: list[int] = []
    while len(found) < size:
        turn, offset = divmod(first + len(found), n)
        order = stream(seed, f"turn/{turn}").permutation(n).tolist()
        found += order[offset : offset + size - len(found)]
    return found


def _finite(value: Any, item: str, answer: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise WeightsError(
            f"The reward of item {item!r}, answer {answer[:80]!r} is {value!r}, not a finite "
            "number. Give None for an answer that cannot be scored."
        )
    return number
