"""What an agent reads of the past: `history.md` and the files of `feedback/`.

Everything comes from what `feedback` has selected and from what targets left in the run directory,
and is bounded. Paths of this machine are cut out, so that two runs of one course read the same.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sia.feedback import Shown
from sia.records import Candidate, Outcome
from sia.rundir import candidate_dir
from sia.sandbox.collect import TRAJECTORIES, TRAJECTORY
from sia.tasks.task import Metric

MAX_ROWS = 30
MAX_CELL = 300  # characters
MAX_STDERR = 4_000
MAX_TRAJECTORY = 50_000


def history_table(history: Sequence[Shown], metric: Metric, run: Path) -> str:
    """`history.md`: all candidates, oldest first; of many, the best and the latest."""
    scores = {shown.candidate.id: shown.score for shown in history}
    kept = _kept(history, metric)
    lines = [
        "# What was tried",
        "",
        f"{metric.name} on the dev items; "
        f"{'higher' if metric.direction == 'maximize' else 'lower'} is better. "
        "The change is that against the parent, positive when better.",
        "",
    ]
    if left_out := len(history) - len(kept):
        lines += [f"{left_out} earlier candidates are left out; the best are among these.", ""]
    lines += [
        "| candidate | parent | score | change | outcome | hypothesis | what changed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shown in kept:
        candidate, parent = shown.candidate, shown.candidate.parent
        before = scores.get(parent) if parent else None
        change = (
            ""
            if shown.score is None or before is None
            else f"{metric.gain(shown.score, before):+.4f}"
        )
        cells = [
            candidate.id,
            parent or "",
            "" if shown.score is None else f"{shown.score:.4f}",
            change,
            f"{shown.outcome}: {shown.reason}" if shown.reason else str(shown.outcome),
            candidate.proposal.hypothesis,
            "; ".join(f"{name} {value}" for name, value in candidate.proposal.changes.items()),
        ]
        lines.append("| " + " | ".join(_cell(cell, run) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def standing(history: Sequence[Shown], parent: Candidate | None, metric: Metric, run: Path) -> str:
    """Where the search stands, in a few sentences."""
    scored = [shown for shown in history if shown.score is not None]
    if not scored:
        sentences = ["No candidate has been scored yet."]
    else:
        best = scored[0]
        for shown in scored[1:]:
            if metric.better(shown.score or 0.0, best.score or 0.0):
                best = shown
        sentences = [
            f"The best so far is {best.candidate.id}, {metric.name} {best.score:.4f} on dev."
        ]
    if parent is not None:
        sentences.append(f"The next harness is made from {parent.id}.")
    if history:
        last = history[-1]
        score = "no score" if last.score is None else f"{metric.name} {last.score:.4f}"
        reason = f" ({_cell(last.reason, run)})" if last.reason else ""
        sentences.append(f"The latest is {last.candidate.id}: {last.outcome}{reason}, {score}.")
    return " ".join(sentences)


def feedback_files(
    history: Sequence[Shown], parent: Candidate | None, run: Path
) -> dict[str, bytes]:
    """The files of `feedback/` by name: of the parent, and of what was tried last."""
    by_id = {shown.candidate.id: shown for shown in history}
    subject = by_id.get(parent.id) if parent else None
    last = history[-1].candidate.generation if history else 0
    latest = [s for s in history if s.candidate.generation == last and s is not subject]
    scores: dict[str, Any] = {
        "parent": _scores(subject, run) if subject else None,
        "latest": [_scores(shown, run) for shown in latest],
    }
    text = json.dumps(scores, indent=1, sort_keys=True, ensure_ascii=False)
    files = {"scores.json": _encoded(text + "\n")}
    if subject is not None:
        folder = _folder(subject, by_id, run)
        if subject.failures:
            files["failures.md"] = _encoded(_failures(subject, run))
        if subject.traces:
            for path in _trajectories(subject, folder):
                files[f"trajectories/{path.name}"] = _encoded(
                    _cut(_without_paths(path.read_text("utf-8", "replace"), run), MAX_TRAJECTORY)
                )
    for shown in ([subject] if subject else []) + latest:
        path = _folder(shown, by_id, run) / "stderr.log"
        if shown.outcome not in (Outcome.OK, Outcome.DUPLICATE) and path.is_file():
            tail = path.read_text("utf-8", "replace")[-MAX_STDERR:]
            if tail.strip():
                files[f"{shown.candidate.id}-stderr.txt"] = _encoded(_without_paths(tail, run))
    return files


def _kept(history: Sequence[Shown], metric: Metric) -> list[Shown]:
    """Those that get a row: a third of the rows for the best, the others for the latest."""
    if len(history) <= MAX_ROWS:
        return list(history)
    scored = [shown for shown in history if shown.score is not None]
    sign = -1 if metric.direction == "maximize" else 1
    scored.sort(key=lambda shown: sign * (shown.score or 0.0))
    kept = {shown.candidate.id for shown in scored[: MAX_ROWS // 3]}
    for shown in reversed(history):
        if len(kept) >= MAX_ROWS:
            break
        kept.add(shown.candidate.id)
    return [shown for shown in history if shown.candidate.id in kept]


def _scores(shown: Shown, run: Path) -> dict[str, Any]:
    return {
        "candidate": shown.candidate.id,
        "outcome": shown.outcome,
        "reason": _without_paths(shown.reason, run),
        "score": shown.score,
        "metrics": shown.metrics,
        "symptoms": shown.symptoms,
        "breakdown": shown.breakdown,
    }


def _failures(shown: Shown, run: Path) -> str:
    lines = [
        "# Dev items that were not answered right",
        "",
        f"A sample, of {shown.candidate.id}: few of each wrong answer, always drawn from the same "
        "part of the dev items. Look the items up by id in `data/`. What is right is not told.",
        "",
        "| item | answer | score of the item |",
        "| --- | --- | --- |",
    ]
    for failure in shown.failures:
        answer = failure.answer or "(no usable answer)"
        lines.append(f"| {_cell(failure.item, run)} | {_cell(answer, run)} | {failure.score:g} |")
    return "\n".join(lines) + "\n"


def _trajectories(shown: Shown, folder: Path) -> list[Path]:
    """Files of the items of the sample; where their names are no ids, the first few."""
    found = folder / TRAJECTORIES
    names = {path.name: path for path in found.glob("*.json")}
    by_item = [f"execution_q{failure.item}.json" for failure in shown.failures]
    chosen = [names[name] for name in by_item if name in names]
    if not chosen:
        chosen = [names[name] for name in sorted(names, key=lambda name: (len(name), name))]
        chosen.sort(key=lambda path: path.name != TRAJECTORY)
    return chosen[: shown.traces]


def _folder(shown: Shown, by_id: Mapping[str, Shown], run: Path) -> Path:
    """Where what a candidate left lies; for a duplicate, that of the one that ran."""
    candidate = shown.candidate
    if candidate.duplicate_of is not None and candidate.duplicate_of in by_id:
        candidate = by_id[candidate.duplicate_of].candidate
    return candidate_dir(run, candidate.generation, candidate.index)


def _cell(text: str, run: Path) -> str:
    one_line = " ".join(_without_paths(text, run).split()).replace("|", "\\|")
    return one_line if len(one_line) <= MAX_CELL else one_line[: MAX_CELL - 1] + "…"


def _without_paths(text: str, run: Path) -> str:
    """In `sandbox=process` a traceback names files by their places on this machine."""
    for path in {str(run), str(run.resolve())}:
        text = text.replace(path, "<run>")
    return text


def _cut(text: str, length: int) -> str:
    left_out = len(text) - length
    return text if left_out <= 0 else f"{text[:length]}\n… {left_out} more characters\n"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")
