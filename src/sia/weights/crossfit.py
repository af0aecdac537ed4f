"""Cross-fitted scores of a policy `label`, for a harness that learns from them.

A harness that stacks a policy's scores with its own needs, for every train item, scores of a policy
that has not seen it. So the train items are dealt into folds, one adapter is trained without each
fold, and it scores that fold; items without a label are scored by all adapters, whose probabilities
are averaged. Texts that occur twice fall into one fold.

    python -m sia.weights.crossfit job.json --folds 5

The job is that of `python -m sia.weights`. `out` gets adapter folders `fold0`, `fold1`, ..., which
are the parents of the next cross-fit's folds, and `scores.npz`: `ids` (N,), `labels` (C,) and
`logprobs` (N, C).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sia.errors import SiaError, WeightsError
from sia.tasks.task import load_module
from sia.weights.policy import Item
from sia.weights.recipes import recipe as find_recipe
from sia.weights.rollout import fold_of, load_train_task
from sia.weights.update import Fold, Job, device_of, make_policy, read_job, update

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCORES_FILE = "scores.npz"


def cross_fit(job: Job, *, folds: int) -> Path:
    """Trains an adapter without each fold and writes the scores; gives their file.

    A killed cross-fit goes on with the fold, and the step, it was at. `limits.wall_s` holds for all
    folds together.

    Raises:
        WeightsError: The job, its data or the machine is at fault, or its policy gives no labels.
    """
    if folds < 2:
        raise WeightsError(f"folds={folds!r}: cross-fitting needs 2 or more.")
    if job.task is None or job.public is None:
        raise WeightsError("job: cross-fitting needs task and public, to deal the train items.")
    if job.policy.get("kind") != "label":
        raise WeightsError(
            f"policy.kind={job.policy.get('kind')!r}: only the policy `label` is cross-fitted."
        )
    begun = time.monotonic()
    out = Path(job.out)
    if (out / SCORES_FILE).is_file():
        raise WeightsError(f"out={job.out!r} exists already. Choose another folder, or remove it.")
    work = out.with_name(f".{out.name}.crossfit")
    work.mkdir(parents=True, exist_ok=True)
    for k in range(folds):
        update(_job_of_fold(job, k, folds, work, begun))
    _write(work / SCORES_FILE, job, folds, work)
    os.replace(work, out)
    return out / SCORES_FILE


def _job_of_fold(job: Job, k: int, folds: int, work: Path, begun: float) -> Job:
    limits = job.limits
    if limits.wall_s is not None:
        left = max(limits.wall_s - (time.monotonic() - begun), 1.0)
        limits = dataclasses.replace(limits, wall_s=left / (folds - k))
    parent = None if job.parent is None else str(Path(job.parent) / f"fold{k}")
    return dataclasses.replace(
        job, out=str(work / f"fold{k}"), parent=parent, limits=limits, leave_out=Fold(k=k, of=folds)
    )


def _write(path: Path, job: Job, folds: int, adapters: Path) -> None:
    """Scores of the train items by the adapter that has not seen them, of the others by all."""
    assert job.task is not None
    assert job.public is not None
    train = load_train_task(Path(job.task), Path(job.public)).items
    questions = _questions(Path(job.task), Path(job.public))
    from sia.weights.label import Label

    policy = make_policy(
        job.policy, find_recipe(job.recipe), device=device_of(job.device), seed=job.seed
    )
    assert isinstance(policy, Label)
    n_labels = len(policy.labels)
    own = np.zeros((len(train), n_labels), np.float32)
    others = np.zeros((len(questions), n_labels), np.float64)
    fold = np.array([fold_of(item.prompt, folds) for item in train])
    for k in range(folds):
        policy.load_adapter(adapters / f"fold{k}")
        rows = np.flatnonzero(fold == k)
        own[rows] = policy.scores([train[row].prompt for row in rows]).numpy()
        if questions:
            others += np.exp(policy.scores([item.prompt for item in questions]).numpy()) / folds
    ids = [item.id for item in (*train, *questions)]
    logprobs = np.concatenate([own, np.log(others + 1e-12).astype(np.float32)])
    write_scores(path, ids=ids, labels=policy.labels, logprobs=logprobs)


def write_scores(
    path: Path, *, ids: Sequence[str], labels: Sequence[str], logprobs: NDArray[np.float32]
) -> None:
    """Writes a scores file that needs no pickle to be read."""
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        np.savez(file, ids=np.array(ids), labels=np.array(labels), logprobs=logprobs)
    aside.replace(path)


def _questions(task: Path, public: Path) -> list[Item]:
    """Items without a label, where the task names some."""
    found = getattr(load_module(task), "questions", None)
    rows: Sequence[Mapping[str, Any]] = found(public) if found else []
    return [Item(id=str(row["id"]), prompt=str(row["prompt"])) for row in rows]


def main() -> int:
    """Cross-fits; prints where the scores are. Exit code 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m sia.weights.crossfit", description=__doc__)
    parser.add_argument("job", type=Path, help="see sia.weights.update.Job")
    parser.add_argument("--folds", type=int, default=5)
    arguments = parser.parse_args()
    try:
        print(cross_fit(read_job(arguments.job), folds=arguments.folds))
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
