"""`python -m sia.exam RUN`: opens the sealed test of a finished run, once, in a process of its own.

The candidate to be examined was chosen by dev score before this starts; nothing here feeds back
into a search, and a run that has been examined cannot be resumed. The submissions are those that
were recorded during the run. Only two things are run anew: the task's baselines, and, with
`exam.final_refit`, the chosen harness with the dev labels added to train.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

from sia import build, report, rundir, seeds
from sia.config import Config, register
from sia.errors import RunDirectoryError, SiaError, TaskError
from sia.gateway.protocol import Role
from sia.provenance import tree_sha256
from sia.records import (
    BEST,
    FINAL_REFIT,
    FIRST_HARNESS,
    REFERENCE,
    Candidate,
    Evaluation,
    Exam,
    ExamRow,
    Outcome,
    RunResult,
    from_data,
    to_json,
)
from sia.rundir import RunInfo, candidate_dir
from sia.tasks import data
from sia.verify import TaskVerifier
from sia.verify.stats import aligned, mean_interval, paired_difference

DRAWS = 10_000  # of the bootstrap
FIRST = "g000-c0"  # the candidate of generation 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sia.exam", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument(
        "--final-refit",
        action=argparse.BooleanOptionalAction,
        help="run the chosen harness once more with the dev labels added to train "
        "(default: exam.final_refit of the run)",
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="FOLDER",
        help="copy what reports read to FOLDER/<name of the run>: records without the attempts",
    )
    args = parser.parse_args(argv)
    console = Console()
    try:
        for run in args.runs:
            exam = rundir.read_exam(run)
            if exam is None:
                exam = examine(run, final_refit=args.final_refit, say=console.print)
                _mirror(run, console.print)
            report.show(console, run, exam)
            if args.records:
                rundir.copy_records(run, args.records / run.name)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def examine(
    run: Path, *, final_refit: bool | None = None, say: Callable[[str], Any] = lambda text: None
) -> Exam:
    """Scores the recorded candidates on the sealed test and writes `exam.json`.

    Args:
        run: A finished run.
        final_refit: Overrides the run's `exam.final_refit`.
        say: Is told what is being done.

    Raises:
        RunDirectoryError: The run has not finished.
        TaskError: The task's data are not here, or are not those of the run.
    """
    info, best = rundir.read_info(run), _finished(run).best
    register()
    cfg = cast(Config, OmegaConf.load(run / rundir.CONFIG_FILE))
    checked = build.check(cfg)
    data.ensure(checked.task, ask=False)
    _same_data(info, checked)
    records = rundir.records(run)
    seconds = {line.key: line.wall_s for line in rundir.read_journal(run)}
    workshop = run / "exam"
    rundir.remove_tree(workshop)  # of an exam that was interrupted
    refit = cfg.exam.final_refit if final_refit is None else final_refit
    if refit and not (checked.task.root / "prepare.py").is_file():
        say("no final refit: nobody can say how dev labels are added to the data of this task")
        refit = False

    with (
        closing(TaskVerifier(task=checked.task, split="dev")) as dev,
        closing(TaskVerifier(task=checked.task, split="test")) as test,
        build.gateway(cfg, run, (Role.TARGET,)) as gateway,
    ):

        def recorded(name: str, identity: str | None) -> ExamRow:
            """A row from the submission that a candidate left during the run."""
            assert identity is not None
            say(f"examining {name} ({identity})")
            candidate = _candidate(records, identity)
            key = f"{candidate.generation:04}/{candidate.index}"
            folder = candidate_dir(run, candidate.generation, candidate.index)
            return _row(
                name=name,
                candidate=identity,
                dev=from_data(records[f"{key}/evaluation"], Evaluation).score,
                test=test.verify(identity, folder / "submission"),
                seconds=seconds[f"{key}/attempt"],
            )

        def fresh(
            name: str,
            harness: Path,
            *,
            public: Path | None,
            policy: Path | None = None,
            **fixed: Any,
        ) -> ExamRow:
            """A row from a new attempt, in the same sandbox and with the same limits."""
            out = workshop / name.replace(" ", "_")
            target = build.target(cfg, checked.task, checked.sandbox, data=public, gateway=gateway)
            deadline_s = build.limits(cfg, checked.task).attempt_s
            attempt = target.run(
                name, harness=harness, out=out, deadline_s=deadline_s, policy=policy
            )
            if attempt.outcome is not Outcome.OK:
                failure = f"{attempt.outcome}: {attempt.reason}"
                return ExamRow(name=name, **{**fixed, "note": failure})
            submission = out / "submission"
            return _row(
                name=name,
                dev=None if public else dev.verify(name, submission).score,
                test=test.verify(name, submission),
                seconds=json.loads((out / "usage.json").read_bytes())["wall_s"],
                **fixed,
            )

        rows = []
        first = _candidate(records, FIRST)
        if first.harness_sha256 == tree_sha256(checked.first_harness):
            rows.append(recorded(REFERENCE, FIRST))
        else:  # the Meta-Agent wrote one of its own
            say("running the reference harness")
            rows.append(fresh(REFERENCE, checked.first_harness, public=None))
            if f"{first.generation:04}/{first.index}/evaluation" in records:
                rows.append(recorded(FIRST_HARNESS, FIRST))
        for name, folder in sorted(checked.task.facts.baselines.items()):
            say(f"running the baseline {name}")
            rows.append(fresh(name, checked.task.root / folder, public=None))
        rows.append(recorded(BEST, best))
        if refit:
            say("running the best harness once more, with the dev labels added to train")
            chosen = _candidate(records, best)
            harness = candidate_dir(run, chosen.generation, chosen.index) / "harness"
            public = workshop / "public"
            workshop.mkdir(exist_ok=True)
            data.task_module(checked.task, "prepare").reveal_dev(
                checked.task.public_dir, checked.task.labels_dir("dev"), public
            )
            note = "dev labels added to train"
            policy = rundir.policy_dir(run, chosen.policy) if chosen.policy else None
            rows.append(
                fresh(FINAL_REFIT, harness, public=public, policy=policy, candidate=best, note=note)
            )
            rundir.remove_tree(public)

    exam = Exam(
        run_id=info.run_id,
        task=info.task,
        metric=checked.task.metric.name,
        n_items=checked.task.facts.splits.get("test", 0),
        opened_at=datetime.now(UTC).isoformat(timespec="seconds"),
        sandbox=checked.sandbox.name,
        warnings=checked.task.facts.warnings,
        rows=tuple(_with_intervals(row, rows[0], info.seed) for row in rows),
    )
    rundir.write_atomic(run / rundir.EXAM_FILE, to_json(exam, pretty=True))
    return exam


def _mirror(run: Path, say: Callable[[str], Any]) -> None:
    """Shows the exam in the run's tracker, too."""
    cfg = cast(Config, OmegaConf.load(run / rundir.CONFIG_FILE))
    tracker = build.part(cfg.tracking, cfg.trusted_packages)
    tracker.start(run)
    if problem := tracker.finish():
        say(problem)


def _finished(run: Path) -> RunResult:
    result = rundir.read_result(run)
    if result is None or result.status != "finished":
        raise RunDirectoryError(
            f"{run} is {result.status if result else 'not finished'}: there is nothing to examine "
            f"yet. Go on with it: python -m sia resume={run}"
        )
    return result


def _same_data(info: RunInfo, checked: build.Checked) -> None:
    task = checked.task
    if info.task_version != task.facts.version:
        raise TaskError(
            f"The run was made with version {info.task_version} of task {info.task!r}, this is "
            f"version {task.facts.version}: their scores cannot be compared. Start a new run."
        )
    if info.provenance.get("public_sha256") != tree_sha256(task.public_dir):
        raise TaskError(
            f"The public data of task {info.task!r} are not those of the run: items and labels "
            f"would not fit together. Restore them: {task.restore}"
        )


def _candidate(records: dict[str, Any], identity: str | None) -> Candidate:
    for key, record in records.items():
        if key.endswith("/candidate") and record["id"] == identity:
            candidate = from_data(record, Candidate)
            # A duplicate has no submission of its own.
            twin = candidate.duplicate_of
            return candidate if twin is None else _candidate(records, twin)
    raise RunDirectoryError(f"The journal records no candidate {identity!r}.")


def _row(
    *,
    name: str,
    dev: float | None,
    test: Evaluation,
    seconds: float,
    candidate: str | None = None,
    note: str = "",
) -> ExamRow:
    return ExamRow(
        name=name,
        candidate=candidate,
        dev=dev,
        test=test.score,
        seconds=round(seconds, 3),
        metrics=test.metrics,
        note=f"{note}; {test.problem}" if test.problem and note else note or test.problem,
        items=test.items,
    )


def _with_intervals(row: ExamRow, reference: ExamRow, seed: int) -> ExamRow:
    if row.test is None or not row.items:
        return row
    scores = np.array([row.items[item] for item in sorted(row.items)])
    spread = mean_interval(scores, draws=DRAWS, rng=seeds.stream(seed, f"exam/{row.name}"))
    row = replace(row, low=spread.low, high=spread.high)
    if row.name == reference.name or not reference.items:
        return row
    before, after = aligned(reference.items, row.items)
    rng = seeds.stream(seed, f"exam/{row.name}/gain")
    gain = paired_difference(before, after, draws=DRAWS, rng=rng)
    return replace(row, gain=gain.value, gain_low=gain.low, gain_high=gain.high)


if __name__ == "__main__":
    sys.exit(main())
