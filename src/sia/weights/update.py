"""One update: a parent adapter, a recipe and train items in; a child adapter and a report out.

The child is written aside and moved into place at the end, so `out` is either whole or not there.
What a killed update had done lies in `.<name>.update` beside `out` until it is finished; an update
that failed leaves nothing. The parent's adapter is only read.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import json
import logging
import math
import os
import pickle
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sia.errors import SiaError, WeightsError
from sia.provenance import tree_sha256
from sia.records import to_json
from sia.rundir import remove_tree, write_atomic
from sia.seeds import stream_seed
from sia.weights.models import is_packed, training_base
from sia.weights.policy import Policy
from sia.weights.recipes import OnPolicy, Recipe, Sft
from sia.weights.recipes import recipe as find_recipe
from sia.weights.rollout import TrainTask, fold_of, hand, load_train_task, read_samples

if TYPE_CHECKING:
    from sia.weights.data import Source, Steps

UPDATE_FILE = "update.json"
TINY = 4_000_000  # parameters; below it a second thread costs more than it brings
POLICIES = {  # kind -> class, imported when used
    "causal_lm": "sia.weights.causal_lm.CausalLM",
    "label": "sia.weights.label.Label",
}
PACKAGES = ("torch", "lightning", "peft", "transformers")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far an update goes.

    Attributes:
        steps: Optimiser steps at most; None: those of the recipe.
        wall_s: Seconds for everything that this process does, loading and probes included; None: no
            limit. The update ends cleanly with the steps it has.
        probe_items: Train items that are answered before and after, to see what was gained; 0 to
            save the time.
        checkpoint_steps: A killed update loses at most so many steps.
    """

    steps: int | None = None
    wall_s: float | None = None
    probe_items: int = 64
    checkpoint_steps: int = 10


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Train items that an update must not see: part `k`, from 0, `of` so many parts."""

    k: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `python -m sia.weights` is told.

    Attributes:
        policy: `kind` (causal_lm or label), `base` (a folder, an id of the model hub, or a name or
            file of `sia.weights.models`), and further arguments of the policy.
        recipe: `name`, and settings that differ from its defaults.
        out: Folder of the child adapter; must not exist.
        parent: Folder of the parent adapter; None: a fresh one.
        task: The task's `train.py`; None: there are only samples.
        public: The task's public side, for its `items`.
        samples: Recorded samples, JSON lines; None: references (sft) or fresh answers are used.
        device: `auto`, `cpu`, `cuda`, or `cuda:1`.
        leave_out: Train items that are not trained on; for cross-fitting.
    """

    policy: dict[str, Any]
    recipe: dict[str, Any]
    out: str
    parent: str | None = None
    task: str | None = None
    public: str | None = None
    samples: str | None = None
    seed: int = 0
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    leave_out: Fold | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How a policy does on a fixed choice of train items, one sampled answer each.

    Attributes:
        reward: Mean; None where there is no reward.
        entropy: Nats per token, estimated by the answers themselves.
        kl: Of the policy to its base, nats per answer, estimated likewise.
        answer_tokens: Mean length of an answer.
    """

    items: int
    reward: float | None
    entropy: float
    kl: float
    answer_tokens: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an update did.

    Attributes:
        ended: `steps`, `wall_s` (the time was over) or `no_signal` (nothing was left to learn).
        tokens: Of the answers of all rounds.
        seconds: Rounds and steps, without loading and probes.
        peak_memory_mib: Of the process on a CPU, of the allocator on a GPU.
        silent_share: Share of groups whose rewards were all equal; None without rewards.
        kl: To the base, nats per answer, after the update; None without a probe.
        entropy: Nats per token, after the update; None without a probe.
    """

    ended: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    peak_memory_mib: float
    reward_before: float | None
    reward_after: float | None
    kl: float | None
    entropy: float | None
    silent_share: float | None
    answers: int
    unscored: int
    cut: int
    rounds: int
    empty_rounds: int
    parameters: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """`update.json`: where an adapter comes from, and what its update did.

    Attributes:
        parent: Folder of the parent adapter, as it was given; None for a fresh one.
        parent_sha256: Digest of that folder.
        data_sha256: Of train items, reward code and samples.
        curve: Step, loss, reward and gradient norm of each optimiser step.
    """

    parent: str | None
    parent_sha256: str
    base: str
    base_sha256: str
    recipe: dict[str, Any]
    policy: dict[str, Any]
    data_sha256: str
    job_sha256: str
    seed: int
    packages: dict[str, str]
    report: Report
    curve: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The steps that were taken, with their tally, and the curve of loss and reward over them."""

    steps: Steps
    curve: list[dict[str, Any]]


def read_job(path: Path) -> Job:
    """Reads a job file.

    Raises:
        WeightsError: It is missing, is not JSON, or does not have the shape of a job.
    """
    try:
        return parse_job(json.loads(path.read_bytes()))
    except OSError as error:
        raise WeightsError(f"The job {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise WeightsError(f"The job {path} is not JSON: {error}") from error


def parse_job(data: Mapping[str, Any]) -> Job:
    """A job from plain data.

    Raises:
        WeightsError: A key is unknown or missing, or a value has the wrong type.
    """
    for kind, given in ((Job, data), (Limits, data.get("limits", {}))):
        known = [f.name for f in dataclasses.fields(kind)]
        if unknown := [key for key in given if key not in known]:
            raise WeightsError(f"job: unknown key {unknown[0]!r}. Keys: {', '.join(known)}")
    try:
        return msgspec.convert(dict(data), Job)
    except msgspec.ValidationError as error:
        raise WeightsError(f"job: {error}") from error


def read_record(folder: Path) -> Record:
    """The `update.json` of an adapter folder.

    Raises:
        WeightsError: There is none, or it is damaged.
    """
    try:
        return msgspec.json.decode((folder / UPDATE_FILE).read_bytes(), type=Record)
    except OSError as error:
        raise WeightsError(f"{folder} has no {UPDATE_FILE} ({error.strerror}).") from error
    except msgspec.MsgspecError as error:
        raise WeightsError(f"{folder / UPDATE_FILE} is damaged: {error}") from error


def update(job: Job) -> Record:
    """Makes the child adapter in `job.out`, or gives its record if this very job has made it.

    Raises:
        WeightsError: The job, its data or the machine is at fault; nothing is left behind.
    """
    begun = time.monotonic()
    chosen = _limited(job)
    out = Path(job.out)
    # What the job amounts to: with the recipe's defaults, and whatever its limits.
    settings = dataclasses.asdict(find_recipe(job.recipe))
    whole = dataclasses.replace(job, recipe=settings, limits=Limits())
    digest = hashlib.sha256(to_json(whole)).hexdigest()
    if out.exists():
        if (out / UPDATE_FILE).is_file() and read_record(out).job_sha256 == digest:
            return read_record(out)
        raise WeightsError(f"out={job.out!r} exists already. Choose another folder, or remove it.")
    work = out.with_name(f".{out.name}.update")
    with _failing_cleanly(work):
        _open(work, digest)
        record = _made(job, chosen, work, digest, begun)
        os.replace(work / "adapter", out)
        remove_tree(work)
    return record


def _limited(job: Job) -> Recipe:
    """The recipe, with its steps held to the job's limits."""
    limits = job.limits
    for name in ("steps", "wall_s", "checkpoint_steps"):
        value = getattr(limits, name)
        if value is not None and value <= 0:
            raise WeightsError(f"limits.{name}={value!r} must be more than 0.")
    chosen = find_recipe(job.recipe)
    if limits.steps is not None and limits.steps < chosen.steps:
        chosen = dataclasses.replace(chosen, steps=limits.steps)
    return chosen


def _open(work: Path, digest: str) -> None:
    """Makes the working folder, or takes up the one that the same job has left."""
    mark = work / "job.sha256"
    if not (mark.is_file() and mark.read_text() == digest):
        remove_tree(work)
        work.mkdir(parents=True)
        mark.write_text(digest)
    remove_tree(work / "adapter")


@contextmanager
def _failing_cleanly(work: Path) -> Iterator[None]:
    """Removes the working folder when an update fails; an interrupted one keeps it."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
    try:
        yield
    except SiaError:
        remove_tree(work)
        raise
    except Exception as error:
        remove_tree(work)
        text = str(error)
        if (isinstance(error, OSError) and error.errno in full) or (
            # safetensors and PyTorch write by themselves and say it in their own words
            "No space left" in text or "File too large" in text or "PytorchStreamWriter" in text
        ):
            raise WeightsError(
                f"Cannot write the adapter beside {work.parent}: {text.splitlines()[0]}. Free some "
                "space, or choose another folder. The parent's adapter is as it was."
            ) from error
        raise


def _made(job: Job, chosen: Recipe, work: Path, digest: str, begun: float) -> Record:
    """Everything but the last move."""
    import torch

    task = _task(job)
    device = device_of(job.device)
    policy = make_policy(job.policy, chosen, device=device, seed=job.seed)
    total = sum(p.numel() for p in policy.module.parameters())
    if device == "cpu" and total < TINY:
        torch.set_num_threads(1)
    if job.parent is not None:
        policy.load_adapter(Path(job.parent))
    source, data_sha256 = _source(job, chosen, policy, task)
    before = _before(job, chosen, policy, task, work)
    deadline = None
    if job.limits.wall_s is not None:
        deadline = begun + job.limits.wall_s - (before.seconds if before else 0.0)
    fitted = fit(
        policy=policy, recipe=chosen, source=source, work=work, seed=job.seed, device=device,
        checkpoint_steps=job.limits.checkpoint_steps, deadline=deadline,
    )  # fmt: skip
    steps, curve = fitted.steps, fitted.curve
    if not curve:
        raise WeightsError(_nothing(job, chosen, steps))
    after = _probe(job, chosen, policy, task) if before else None
    tally = steps.tally
    report = Report(
        ended=steps.ended,
        steps=len(curve),
        tokens=tally.tokens,
        seconds=round(steps.seconds, 3),
        tokens_per_s=round(tally.tokens / max(steps.seconds, 1e-9), 1),
        peak_memory_mib=round(_peak_mib(device), 1),
        reward_before=before.reward if before else None,
        reward_after=after.reward if after else None,
        kl=after.kl if after else None,
        entropy=after.entropy if after else None,
        silent_share=None if isinstance(chosen, Sft) else tally.silent / max(tally.groups, 1),
        answers=tally.answers,
        unscored=tally.unscored,
        cut=tally.cut,
        rounds=tally.rounds,
        empty_rounds=tally.empty_rounds,
        parameters=sum(p.numel() for p in policy.parameters()),
        device=device,
    )
    record = Record(
        parent=job.parent,
        parent_sha256=tree_sha256(Path(job.parent)) if job.parent else "",
        base=policy.base,
        base_sha256=policy.base_sha256,
        recipe=dataclasses.asdict(chosen),
        policy=job.policy,
        data_sha256=data_sha256,
        job_sha256=digest,
        seed=job.seed,
        packages={name: metadata.version(name) for name in PACKAGES},
        report=report,
        curve=curve,
    )
    folder = work / "adapter"
    folder.mkdir()
    policy.save_adapter(folder)
    write_atomic(folder / UPDATE_FILE, to_json(record, pretty=True))
    return record


def make_policy(settings: Mapping[str, Any], chosen: Recipe, *, device: str, seed: int) -> Policy:
    """The policy that `settings["kind"]` names, with an adapter as the recipe wants it.

    Raises:
        WeightsError: The kind is unknown, or a setting does not fit.
        ProviderError: The base is not on this machine.
    """
    given = dict(settings)
    kind = str(given.pop("kind", None))
    if kind not in POLICIES:
        raise WeightsError(f"policy.kind={kind!r} is unknown. Kinds: {', '.join(POLICIES)}")
    module, _, name = POLICIES[kind].rpartition(".")
    if is_packed(str(given.get("base"))):
        given["base"] = training_base(given["base"])
    try:
        made: Policy = getattr(importlib.import_module(module), name)(
            **given, rank=chosen.rank, alpha=chosen.alpha, dora=chosen.dora,
            targets=chosen.targets, values=chosen.uses_values, device=device, seed=seed,
        )  # fmt: skip
    except TypeError as error:
        raise WeightsError(f"policy: {error}") from error
    return made


def _task(job: Job) -> TrainTask | None:
    if job.task is None:
        if job.samples is None:
            raise WeightsError("job: neither task nor samples: there is nothing to train on.")
        return None
    if job.public is None:
        raise WeightsError("job: task needs public, the folder that its items are read from.")
    task = load_train_task(Path(job.task), Path(job.public))
    if (out := job.leave_out) is None:
        return task
    kept = [item for item in task.items if fold_of(item.prompt, out.of) != out.k]
    if not kept:
        raise WeightsError(f"job: leave_out={out} leaves none of {len(task.items)} train items.")
    digest = hashlib.sha256(f"{task.sha256}{out}".encode()).hexdigest()
    return dataclasses.replace(task, items=kept, sha256=digest)


def _source(job: Job, chosen: Recipe, policy: Policy, task: TrainTask | None) -> tuple[Source, str]:
    """Where rounds come from, and the digest of the data behind them."""
    from sia.weights.data import Recorded, Rollouts, references

    digest = hashlib.sha256((task.sha256 if task else "").encode())
    if job.samples is not None:
        samples = read_samples(Path(job.samples))
        digest.update(Path(job.samples).read_bytes())
    elif isinstance(chosen, Sft):
        assert task is not None
        samples = references(task.items)
    else:
        assert task is not None
        assert isinstance(chosen, OnPolicy)
        rollouts = Rollouts(policy=policy, recipe=chosen, task=task, seed=job.seed)
        return rollouts, digest.hexdigest()
    recorded = Recorded(policy=policy, recipe=chosen, samples=samples, seed=job.seed)
    return recorded, digest.hexdigest()


def _before(
    job: Job, chosen: Recipe, policy: Policy, task: TrainTask | None, work: Path
) -> Probe | None:
    """The probe before the first step; an update that goes on reads what it found then."""
    path = work / "before.json"
    if path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=Probe | None)
    probe = _probe(job, chosen, policy, task)
    write_atomic(path, msgspec.json.encode(probe))
    return probe


def _probe(job: Job, chosen: Recipe, policy: Policy, task: TrainTask | None) -> Probe | None:
    """None where there are no items, or none are wanted."""
    if task is None or not job.limits.probe_items:
        return None
    from sia.weights.data import scores
    from sia.weights.rollout import answer_items

    begun = time.monotonic()
    seed = stream_seed(job.seed, "probe")
    items = [task.items[k] for k in hand(0, job.limits.probe_items, len(task.items), seed)]
    temperature = chosen.temperature if isinstance(chosen, OnPolicy) else 1.0
    found = answer_items(policy, task, items, group=1, temperature=temperature, seed=seed)
    if not found.rewards:
        return None
    logprobs_BT = found.logprobs_BT
    assert logprobs_BT is not None
    base_BT = scores(policy, chosen, found.tokens, "logprobs_BT", base=True)
    tokens = float(found.tokens.mask_BT.sum())
    return Probe(
        items=len(items),
        reward=math.fsum(found.rewards) / len(found.rewards),
        entropy=-float(logprobs_BT.sum()) / max(tokens, 1.0),
        kl=float((logprobs_BT - base_BT).sum(1).mean()),
        answer_tokens=tokens / len(found.rewards),
        seconds=time.monotonic() - begun,
    )


def fit(
    *,
    policy: Policy,
    recipe: Recipe,
    source: Source,
    work: Path,
    seed: int,
    device: str,
    checkpoint_steps: int,
    deadline: float | None,
) -> Fitted:
    """Takes the steps of a recipe, from the last checkpoint in `work` if there is one."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from sia.weights.data import Steps, UpdateData
    from sia.weights.module import Update
    from sia.weights.progress import StepProgress

    steps = Steps(policy=policy, recipe=recipe, source=source, seed=seed, deadline=deadline)
    module = Update(policy=policy, recipe=recipe)
    kind, _, number = device.partition(":")
    checkpoints = ModelCheckpoint(
        dirpath=work, filename="{step}", every_n_train_steps=checkpoint_steps,
        save_top_k=1, save_on_train_epoch_end=False,
    )  # fmt: skip
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Checkpoints lie in a folder that holds a mark and a probe already: it is meant to.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")
        # They hold the state after the step, as they should.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        # Lightning 2.6 looks at trees in a way that PyTorch 2.13 has given up.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        trainer = Trainer(
            accelerator=kind, devices=[int(number)] if number else 1, max_epochs=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            callbacks=[checkpoints, StepProgress(total=recipe.steps)], default_root_dir=work,
        )  # fmt: skip
        trainer.fit(
            module, datamodule=UpdateData(steps=steps), ckpt_path=_newest_checkpoint(work),
            weights_only=True,
        )  # fmt: skip
    steps.pause()
    policy.module.to(device)  # Lightning leaves what it has trained on the CPU
    return Fitted(steps=steps, curve=module.curve)


def _newest_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is whole: a kill may have cut the last one short."""
    import torch

    def step(path: Path) -> int:
        return int(path.stem.partition("=")[2] or 0)

    for path in sorted(work.glob("step=*.ckpt"), key=step, reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            path.unlink()
            continue
        return str(path)
    return None


def _nothing(job: Job, chosen: Recipe, steps: Steps) -> str:
    """Why an update made no step."""
    if steps.ended == "wall_s":
        return f"limits.wall_s={job.limits.wall_s:g} was over before the first step was done."
    tally = steps.tally
    if tally.answers == 0:
        return (
            f"None of the {tally.unscored} answers of {tally.rounds} rounds could be scored: "
            "reward() of the task gave None for all of them."
        )
    return (
        f"No group told good answers from bad ones: in each of {tally.groups} groups all rewards "
        f"are equal, so recipe {chosen.name!r} has nothing to learn from. Raise recipe.temperature "
        "or recipe.group, or begin with recipe sft."
    )


def device_of(name: str) -> str:
    """`cpu`, `cuda` or `cuda:1`; `auto` takes a GPU where there is one.

    Raises:
        WeightsError: There is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise WeightsError(f"device={name!r}: PyTorch sees no GPU here. Use device=auto or cpu.")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise WeightsError(f"device={name!r} is none of auto, cpu, cuda, cuda:1.")
    return name


def _peak_mib(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
