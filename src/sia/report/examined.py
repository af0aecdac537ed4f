"""Examined runs, read for comparison: scores by item, the path of the search, what it took."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sia import rundir, spend
from sia.errors import RunDirectoryError
from sia.records import (
    BEST,
    FINAL_REFIT,
    FIRST_HARNESS,
    REFERENCE,
    Candidate,
    Evaluation,
    ExamRow,
    Generation,
    Lever,
    Update,
    from_data,
)
from sia.report.run import read_exam
from sia.rundir import RunInfo
from sia.tasks import bundled_task
from sia.tracking.calls import CallsView

NOT_BASELINES = (BEST, FINAL_REFIT, FIRST_HARNESS)

ARMS = ("harness", "weights", "both")  # in the order of the tables
# What makes no other experiment of a run.
_SAME = ("task", "seed", "levers", "resume", "workers", "tracking", "sandbox", "exam", "gateway",
         "trusted_packages")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class of the dev items; `items` is 1 where the verifier does not count them."""

    share: float
    items: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One scored candidate, with the best dev score after it.

    Attributes:
        lever: What made it.
        accepted: It became the best.
        elapsed_s: Of the run, when its score was known.
        cost_usd: Of all model calls up to its generation; None where no call has a price.
    """

    generation: int
    lever: Lever
    best: float
    accepted: bool
    elapsed_s: float
    cost_usd: float | None


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One run after its exam.

    Attributes:
        levers: `harness`, `weights` or `both`: what it was allowed to pull.
        config: As it ran, without what makes no other experiment of it.
        maximize: Whether a higher score is better.
        rows: Of the exam, by name.
        dev_items: Dev score of each item, of the rows whose candidate was scored in the run.
        candidates: Dev scores by item of every candidate that was scored anew, in order.
        classes: Dev score by class of the reference harness and of the best candidate.
        cost_usd: None where no call has a price.
    """

    path: Path
    info: RunInfo
    metric: str
    levers: str
    config: Mapping[str, Any]
    maximize: bool
    rows: Mapping[str, ExamRow]
    dev_items: Mapping[str, Mapping[str, float]]
    candidates: tuple[Mapping[str, float], ...]
    classes: Mapping[str, Mapping[str, ClassScore]]
    steps: tuple[Step, ...]
    generations: int
    updates: int
    elapsed_s: float
    cost_usd: float | None = None
    warnings: tuple[str, ...] = ()


def read(path: Path) -> Examined:
    """Reads an examined run.

    Raises:
        RunDirectoryError: It is none.
    """
    info, exam = rundir.read_info(path), read_exam(path)
    result = rundir.read_result(path)
    if result is None:
        raise RunDirectoryError(f"{path} has no {rundir.RESULT_FILE}: restore it from a copy.")
    text = (path / rundir.CONFIG_FILE).read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    journal = rundir.read_journal(path)
    candidates, evaluations = {}, {}
    for line in journal:
        if line.kind == "Candidate":
            candidate = from_data(line.data, Candidate)
            candidates[candidate.id] = candidate
        elif line.kind == "Evaluation":
            evaluation = from_data(line.data, Evaluation)
            evaluations[evaluation.candidate] = evaluation
    generations = [
        from_data(line.data, Generation) for line in journal if line.kind == "Generation"
    ]
    updates = [from_data(line.data, Update) for line in journal if line.kind == "Update"]
    rows = {row.name: row for row in exam.rows}
    shown = {
        name: evaluations[row.candidate]
        for name, row in rows.items()
        if row.candidate in evaluations and row.dev is not None
    }
    anew = [each for each in candidates.values() if each.duplicate_of is None]
    calls = CallsView(path, info.run_id)
    calls.read()
    spent = spend.total(spend.from_record(result.spend))
    levers = rundir.arm(text)
    maximize = _maximize(info, generations)
    return Examined(
        path=path,
        info=info,
        metric=exam.metric,
        levers=levers,
        config=_choices(config, info, weights=levers in ("weights", "both")),
        maximize=maximize,
        rows=rows,
        dev_items={name: evaluation.items for name, evaluation in shown.items()},
        candidates=tuple(
            evaluations[each.id].items
            for each in anew
            if each.id in evaluations and evaluations[each.id].score is not None
        ),
        classes={
            name: by_class(shown[name].breakdown) for name in (REFERENCE, BEST) if name in shown
        },
        steps=tuple(_steps(journal, candidates, maximize, calls)),
        generations=result.generations,
        updates=sum(not update.problem for update in updates),
        elapsed_s=result.elapsed_s,
        cost_usd=spent.cost_usd or None,
        warnings=exam.warnings,
    )


def arms_of(runs: Sequence[Examined]) -> dict[str, list[Examined]]:
    """The runs of one task by arm, named after what differs between them.

    `harness`, `weights` and `both` stand for the levers; any other choice is named by its group's
    option, and any other value by its key.
    """
    labels: list[list[str]] = [[] for _ in runs]
    if len({run.levers for run in runs}) > 1:
        for label, run in zip(labels, runs, strict=True):
            label.append(run.levers)
    for group in sorted({group for run in runs for group in run.config}):
        values = [run.config.get(group) for run in runs]
        options = [_option(group, value) for value in values]
        several = len({option for option in options if option is not None}) > 1
        for index, option in enumerate(options):
            if option is not None and several:
                labels[index].append(option)
            # Options of different classes have different keys: compared are those of one kind.
            alike = [v for v, other in zip(values, options, strict=True) if other == option]
            labels[index] += _differing(group, values[index], alike)
    arms: dict[str, list[Examined]] = {}
    for label, run in sorted(
        zip(labels, runs, strict=True),
        key=lambda pair: (
            ARMS.index(pair[1].levers) if pair[1].levers in ARMS else len(ARMS), pair[0],
            pair[1].info.seed,
        ),
    ):  # fmt: skip
        arms.setdefault(", ".join(label) or run.levers, []).append(run)
    return arms


def by_class(breakdown: Mapping[str, Any]) -> dict[str, ClassScore]:
    """The table `recall` of a verifier, in its two forms; empty where there is none."""
    table = breakdown.get("recall")
    if not isinstance(table, dict):
        return {}
    found = {}
    for name, value in table.items():
        share, items = (
            (value.get("recall"), value.get("n", 1)) if isinstance(value, dict) else (value, 1)
        )
        if isinstance(share, int | float):
            found[name] = ClassScore(share=share, items=items)
    return found


def _steps(
    journal: Iterable[rundir.Line],
    candidates: Mapping[str, Candidate],
    maximize: bool,
    calls: CallsView,
) -> Iterable[Step]:
    priced = any(scope.spend.cost_usd for scope in calls.scopes())
    best: float | None = None
    for line in journal:
        if line.kind != "Evaluation":
            continue
        evaluation = from_data(line.data, Evaluation)
        if evaluation.score is None:
            continue
        candidate = candidates[evaluation.candidate]
        score = evaluation.score
        accepted = best is None or (score > best if maximize else score < best)
        best = score if best is None or accepted else best
        yield Step(
            generation=candidate.generation,
            lever=candidate.lever,
            best=best,
            accepted=accepted,
            elapsed_s=line.elapsed_s,
            cost_usd=sum(
                scope.spend.cost_usd
                for scope in calls.scopes()
                if scope.generation is not None and scope.generation <= candidate.generation
            )
            if priced
            else None,
        )


def _maximize(info: RunInfo, generations: Sequence[Generation]) -> bool:
    """By the bundled task; for one that lives elsewhere, by what the run accepted."""
    if (task := bundled_task(info.task)) is not None:
        return task.metric.direction == "maximize"
    scores = [
        each.best_score for each in generations if each.accepted and each.best_score is not None
    ]
    return len(scores) < 2 or scores[-1] > scores[0]


def _choices(config: Mapping[str, Any], info: RunInfo, *, weights: bool) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if key not in _SAME}
    found["meta"] = {**found["meta"], "name": info.meta}
    if not weights:  # what was never pulled made no difference
        found.pop("weights")
    return found


def _option(group: str, value: Any) -> str | None:
    """What was chosen in a config group; None for plain values."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("name"), str):
        return str(value["name"])
    target = value.get("_target_")
    return None if target is None else _snake(str(target).rpartition(".")[2])


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _differing(group: str, value: Any, alike: Sequence[Any]) -> list[str]:
    """`group.key=value` for each leaf that is not the same in all of `alike`."""
    leaves = [_leaves(group, each) for each in alike]
    return [
        f"{key}={leaf}"
        for key, leaf in sorted(_leaves(group, value).items())
        if any(other.get(key) != leaf for other in leaves)
    ]


def _leaves(prefix: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {
            key: leaf
            for name, inner in value.items()
            if name not in ("_target_", "name")
            for key, leaf in _leaves(f"{prefix}.{name}", inner).items()
        }
    return {prefix: str(value)}
