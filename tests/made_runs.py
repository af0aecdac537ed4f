"""Run directories made in a moment, with the code of real runs: for pages and benchmarks."""

import json
from pathlib import Path
from typing import Any

from sia import rundir
from sia.records import (
    Attempt,
    Candidate,
    Decision,
    Ending,
    Evaluation,
    Exam,
    ExamRow,
    Failure,
    Generation,
    Lever,
    Outcome,
    Proposal,
    RunResult,
    Update,
    to_json,
)
from sia.rundir import RunDir, RunInfo, candidate_dir

HARNESS = '''"""Answers by a threshold."""

import csv

THRESHOLD = {threshold}


def label(x: float) -> str:
    return "large" if x > THRESHOLD else "small"
'''


def make_run(
    path: Path,
    *,
    generations: int = 4,
    trajectories: int = 0,
    items: int = 40,
    retrained: int | None = 2,
    failed: int | None = 3,
    said: str = "A lower threshold.",
    created_at: str = "2026-11-25T10:00:00+00:00",
    seed: int = 0,
    ended: bool = True,
    exam: bool = False,
) -> Path:
    """A run of the toy task.

    Args:
        path: Its folder, made new.
        generations: All with one candidate; the first is the reference.
        trajectories: Of each attempt.
        items: Of the dev split.
        retrained: Generation whose lever is weights.
        failed: Generation whose target crashes.
        said: Put wherever a model says something.
        ended: Whether it has a result; else it looks like one that was killed.
        exam: Whether the sealed test is open.
    """
    info = RunInfo(
        run_id=f"toy-made-{seed}",
        task="toy",
        task_version=1,
        meta="scripted",
        target="embedded",
        seed=seed,
        config_sha256="0" * 64,
        created_at=created_at,
        protocol=1,
        provenance={"choices": {"weights": "auto"}},
    )
    run = RunDir.create(path, info, "levers:\n- harness\n- weights\n- stop\nseed: 0\n")
    try:
        _play(run, generations, trajectories, items, retrained, failed, said)
        if ended:
            best = f"g{min(1, generations - 1):03}-c0"
            run.finish(
                RunResult(
                    status="finished",
                    reason="done",
                    best=best,
                    best_score=1.0,
                    generations=generations,
                    elapsed_s=run.journal.elapsed_s,
                )
            )
        if exam:
            _open_exam(path, info, items)
    finally:
        run.close()
    return path


def _play(
    run: RunDir,
    generations: int,
    trajectories: int,
    items: int,
    retrained: int | None,
    failed: int | None,
    said: str,
) -> None:
    def step(key: str, record: Any) -> None:
        run.journal.step(key, type(record), lambda: record)

    best, best_score = None, -1.0
    for index in range(generations):
        identity, key = f"g{index:03}-c0", f"{index:04}"
        lever = Lever.WEIGHTS if index == retrained else Lever.HARNESS
        if index:
            decision = Decision(lever=lever, hypothesis=said, evidence=said, recipe="sft")
            step(f"{index - 1:04}/decision", decision)
        candidate = Candidate(
            id=identity,
            generation=index,
            index=0,
            parent=f"g{index - 1:03}-c0" if index else None,
            proposal=Proposal(hypothesis=said, source="scripted", changes={"threshold": index}),
            harness_sha256=f"{index:064}",
            lever=lever,
            policy=identity if lever is Lever.WEIGHTS else "",
        )
        step(f"{key}/0/candidate", candidate)
        folder = candidate_dir(run.path, index, 0)
        _write_folder(folder, index, trajectories, said)
        if lever is Lever.WEIGHTS:
            update = Update(candidate=identity, recipe="sft", report={"steps": 20.0})
            step(f"{key}/0/update", update)
            _write_policy(folder / "policy")
        crashed = index == failed
        attempt = Attempt(
            candidate=identity,
            outcome=Outcome.CRASHED if crashed else Outcome.OK,
            reason=said if crashed else "",
            exit_code=1 if crashed else 0,
            trajectories=trajectories,
        )
        step(f"{key}/0/attempt", attempt)
        score = 1.0 if index == 1 else round(1 - 3 * ((index * 7) % 5 + 1) / items, 6)
        if not crashed:
            evaluation = _evaluation(identity, score, items, said)
            step(f"{key}/0/evaluation", evaluation)
        accepted = not crashed and score > best_score
        if accepted:
            best, best_score = identity, score
        closed = Generation(
            index=index,
            candidates=(identity,),
            incumbent=best,
            best_score=best_score,
            accepted=accepted,
        )
        step(f"{key}/generation", closed)
    step(f"{generations:04}/ending", Ending(reason="generations", detail="all done"))


def _evaluation(identity: str, score: float, items: int, said: str) -> Evaluation:
    wrong = round((1 - score) * items)
    scores = {f"n{k:05}": 0.0 if k < wrong else 1.0 for k in range(items)}
    return Evaluation(
        candidate=identity,
        split="dev",
        score=score,
        n_items=items,
        n_answered=items,
        metrics={"accuracy": score},
        symptoms={"recall_gap": 0.25},
        breakdown={
            "recall": {"large": score, "small": 1.0},
            "confusions": [["large", said, wrong]],
        },
        items=scores,
        failures=tuple(
            Failure(item=f"n{k:05}", answer=said, score=0.0) for k in range(min(3, wrong))
        ),
    )


def _write_folder(folder: Path, index: int, trajectories: int, said: str) -> None:
    harness = folder / "harness"
    harness.mkdir(parents=True)
    text = HARNESS.format(threshold=0.5 - index / 100)
    (harness / "target_agent.py").write_text(text + f"\n\nNOTE = {said!r}\n")
    (harness / "readme.md").write_text("Unchanged.\n")
    (folder / "improvement.md").write_text(f"# Threshold\n\n{said}\n\n- `threshold`: {index}\n")
    (folder / "prompt.md").write_text(f"Improve the harness. {said}\n")
    (folder / "stdout.log").write_text(f"answered {index}\n{said}\n")
    (folder / "stderr.log").write_text("")
    (folder / "usage.json").write_text('{"wall_s": 0.2, "max_rss_mib": 55.7}')
    if trajectories:
        (folder / "agent_execution").mkdir()
    for k in range(trajectories):
        talk: list[dict[str, Any]] = [
            {"role": "system", "content": "Say large or small."},
            {"role": "user", "content": f"x = 0.{k:04}, number {k}"},
            {
                "role": "assistant",
                "content": said,
                "tool_calls": [{"function": {"name": "compare", "arguments": f'{{"x": {k}}}'}}],
            },
        ]
        path = folder / "agent_execution" / f"execution_qn{k:05}.json"
        path.write_text(json.dumps(talk))


def _write_policy(folder: Path) -> None:
    folder.mkdir()
    curve = [
        {"step": k + 1, "loss": 2 / (k + 1), "reward": k / 20, "gradient_norm": 1.0}
        for k in range(20)
    ]
    (folder / "update.json").write_text(json.dumps({"curve": curve}))


def _open_exam(path: Path, info: RunInfo, items: int) -> None:
    scores = {f"t{k:05}": float(k % 10 > info.seed) for k in range(items)}
    value = sum(scores.values()) / items
    row = ExamRow(
        name="best by dev", candidate="g001-c0", dev=1.0, test=value, low=value - 0.1, high=1.0,
        gain=0.1, gain_low=0.02, gain_high=0.18, items=scores,
    )  # fmt: skip
    exam = Exam(
        run_id=info.run_id,
        task="toy",
        metric="accuracy",
        n_items=items,
        opened_at="2026-11-25T11:00:00+00:00",
        sandbox="bwrap",
        rows=(row,),
    )
    rundir.write_atomic(path / rundir.EXAM_FILE, to_json(exam, pretty=True))
