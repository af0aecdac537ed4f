"""A run directory as MLflow shall show it: names, tags, params, metrics and files.

    RunView.parent()   the run itself
    RunView.closed()   its generations, each once, as the journal closes them
    RunView.exam()     the sealed test, once opened

Everything is derived from the run directory, times included (creation plus elapsed time of the
step), so a mirror that is written live and one that is rebuilt later are equal.
"""

import hashlib
import math
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from sia.errors import RunDirectoryError
from sia.records import (
    BEST,
    Attempt,
    Candidate,
    Decision,
    Evaluation,
    Generation,
    Lever,
    Outcome,
    Result,
    Update,
    from_data,
    from_json,
    to_json,
)
from sia.rundir import CONFIG_FILE, EXAM_FILE, JOURNAL_FILE, Line, arm, candidate_dir, read_info
from sia.tracking.artifacts import diff_page, shown_as_tables, tables
from sia.tracking.lineage import PolicyView, policy_view

FILTERED = (
    "task", "meta", "target", "weights", "search", "feedback", "sandbox", "seed", "generations",
)  # fmt: skip
MAX_VALUE = 500  # characters of a param; MLflow refuses more than 6,000
MAX_CHANGES = 50  # params made from a proposal; MLflow takes 100 at once
MAX_METRICS = 200  # per group of a generation; MLflow takes 1,000 at once
MAX_NOTE = 2000  # characters
LOG_TAIL = 64 * 1024  # bytes kept of a candidate's output

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DatasetView:
    """Data that went into a run: which, never what is in them.

    Attributes:
        context: What they are for: `feedback` or `evaluation`.
        n_items: 0 where that is not known.
    """

    name: str
    digest: str
    context: str
    n_items: int = 0


@dataclass(frozen=True, kw_only=True)
class ParentView:
    """The MLflow run that stands for a whole run."""

    experiment: str
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    files: dict[str, bytes]
    datasets: tuple[DatasetView, ...]
    started_ms: int


@dataclass(frozen=True, kw_only=True)
class GenerationView:
    """The MLflow run that stands for one generation, and what it adds to its parent.

    Attributes:
        failed: Nothing of this generation could be scored.
        totals: Metrics of the parent at the step `index`.
        policy: What an update of the weights made in this generation; None without one.
    """

    index: int
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    totals: dict[str, float]
    files: dict[str, bytes]
    datasets: tuple[DatasetView, ...]
    policy: PolicyView | None
    failed: bool
    started_ms: int
    ended_ms: int


class RunView:
    """Reads a run directory, the journal piece by piece and never twice."""

    def __init__(self, run: Path) -> None:
        """Opens a run directory.

        Raises:
            RunDirectoryError: `run` holds no run.
        """
        self.path = run.absolute()
        self.info = read_info(run)
        self.ended = False
        self._created_ms = _milliseconds(self.info.created_at)
        self._offset = 0
        self._elapsed_s = 0.0
        self._closed_s = 0.0
        self._open: defaultdict[int, dict[str, Line]] = defaultdict(dict)
        self._levers = {0: Lever.HARNESS.value}
        self._outcomes: Counter[str] = Counter()
        self._policies: dict[str, str] = {}  # candidate -> the one whose update made its policy
        self._scores: dict[str, float | None] = {}
        text = _read(self.path / CONFIG_FILE)
        self._config = _config(text)
        self._arm = arm((text or b"").decode(errors="replace"))

    @property
    def ended_ms(self) -> int:
        """Time of the last step read."""
        return self._at(self._elapsed_s)

    @property
    def _public(self) -> DatasetView:
        """The data that candidates may read."""
        info = self.info
        found = _find(info.provenance, ("public_sha256", "public_digest", "data_sha256", "data"))
        digest = str(found or f"version-{info.task_version}")[:32]
        return DatasetView(name=f"{info.task}/public", digest=digest, context="feedback")

    @property
    def _about(self) -> dict[str, str]:
        """Tags that each MLflow run of this run has, to search and to group by."""
        info = self.info
        return {
            "sia.run_id": info.run_id,
            "sia.task": info.task,
            "sia.seed": str(info.seed),
            "sia.arm": self._arm,
            "sia.experiment": self._choice("experiment"),
            "sia.sweep": self._choice("sweep"),
        }

    def size(self) -> int:
        """Bytes in the journal now; cheap, for polling."""
        try:
            return os.stat(self.path / JOURNAL_FILE).st_size
        except FileNotFoundError:
            return 0

    def parent(self) -> ParentView:
        """The whole run."""
        info = self.info
        config = _read(self.path / CONFIG_FILE)
        known = {"task": info.task, "meta": info.meta, "target": info.target, "seed": info.seed}
        values = {**_choices(self._config), **known}
        note = (
            f"{info.meta} improves {info.target} on {info.task}, seed {info.seed}. The runs below "
            "are its generations. Metrics here have the generation as their step: `best/dev` is "
            "the incumbent's dev score, `score/dev` that of the generation, `score/test` the "
            "sealed test, once opened. Configuration: `config.yaml` among the artifacts.\n\n"
            f"Records: `{self.path}`"
        )
        return ParentView(
            experiment=f"sia/{info.task}",
            name=f"{info.task}-{info.meta}-{info.target}-s{info.seed}",
            tags={
                **self._about,
                "sia.git": str(info.provenance.get("git", "")),
                "sia.config_sha": info.config_sha256,
                "sia.task_version": str(info.task_version),
                "mlflow.note.content": note,
            },
            params={key: str(values[key])[:MAX_VALUE] for key in FILTERED if key in values},
            files={} if config is None else {CONFIG_FILE: config},
            datasets=(self._public,),
            started_ms=self._created_ms,
        )

    def closed(self, done: Collection[int] = ()) -> Iterator[GenerationView]:
        """Generations that were closed since the last call, in order; those in `done` left out.

        Raises:
            RunDirectoryError: A line of the journal is damaged.
        """
        for line in self._lines():
            place, *rest = line.key.split("/")
            self._elapsed_s = line.elapsed_s
            if line.kind == "Ending":
                self.ended = True
            elif line.kind == "Decision":
                self._levers[int(place) + 1] = from_data(line.data, Decision).lever.value
            elif line.kind != "Generation":
                self._open[int(place)]["/".join(rest)] = line
            else:
                view = self._close(from_data(line.data, Generation), int(place) in done)
                self._closed_s = line.elapsed_s
                if view is not None:
                    yield view

    def exam(self) -> dict[str, float]:
        """Metrics of the sealed test; empty as long as it is sealed."""
        data = _read(self.path / EXAM_FILE)
        if data is None:
            return {}
        metrics = {}
        for row in msgspec.json.decode(data).get("rows", []):
            name, score = str(row.get("name", "")), row.get("test")
            if _is_number(score):
                metrics[metric_name(f"exam/{name.replace(' ', '-')}")] = float(score)
                if name == BEST:
                    metrics["score/test"] = float(score)
        return metrics

    def _close(self, generation: Generation, known: bool) -> GenerationView | None:
        steps = self._open.pop(generation.index, {})
        lever = self._levers.pop(generation.index, "")
        results = _results(steps)
        self._outcomes.update(
            result.outcome.value for result in results if result.outcome is not Outcome.OK
        )
        for result in results:
            self._policies[result.candidate.id] = result.candidate.policy
            self._scores[result.candidate.id] = result.score
        if known:
            return None
        totals = {"wall_s": self._elapsed_s}
        totals |= {f"failures/{name}": float(n) for name, n in sorted(self._outcomes.items())}
        if generation.best_score is not None:
            totals["best/dev"] = generation.best_score
        index = generation.index
        tags = {
            **self._about,
            "sia.generation": str(index),
            "sia.lever": lever,
            "sia.accepted": str(generation.accepted).lower(),
        }
        best = max(results, key=_rank, default=None)
        view = GenerationView(
            index=index,
            name=f"gen-{index:03}",
            tags=tags,
            params={},
            metrics={},
            totals=totals,
            files={},
            datasets=(self._public,),
            policy=None,
            failed=True,
            started_ms=self._at(self._closed_s),
            ended_ms=self._at(self._elapsed_s),
        )
        return view if best is None else self._filled(view, best, results, steps)

    def _filled(
        self,
        view: GenerationView,
        best: Result,
        results: list[Result],
        steps: Mapping[str, Line],
    ) -> GenerationView:
        """The view of a generation with its best candidate."""
        candidate, evaluation = best.candidate, best.evaluation
        tags, totals, datasets = dict(view.tags), dict(view.totals), view.datasets
        if best.score is not None:
            totals["score/dev"] = best.score
        tags["sia.outcome"] = best.outcome.value
        if candidate.policy:
            tags["sia.policy"] = candidate.policy
        tags["mlflow.note.content"] = _note(best)
        folder = candidate_dir(self.path, view.index, candidate.index)
        metrics = _metrics(best, folder, steps.get(f"{candidate.index}/attempt"))
        if len(results) > 1:
            metrics |= {
                f"cand-{result.candidate.index}/score_dev": result.score
                for result in results
                if result.score is not None
            }
        files = _files(best, folder)
        if evaluation is not None:
            shown = tables(evaluation)
            files |= shown
            if shown:
                tags["mlflow.loggedArtifacts"] = shown_as_tables(shown)
            datasets = (*datasets, self._dev(evaluation))
        return replace(
            view,
            tags=tags,
            params=_params(best),
            metrics=metrics,
            totals=totals,
            files=files,
            datasets=datasets,
            policy=self._policy(best),
            failed=best.outcome not in (Outcome.OK, Outcome.DUPLICATE),
        )

    def _dev(self, evaluation: Evaluation) -> DatasetView:
        """The items that steer the search.

        The digest is of their ids: one of their labels could be confirmed by guessing.
        """
        ids = "\n".join(sorted(evaluation.items))
        digest = hashlib.sha256(ids.encode()).hexdigest() if ids else self._public.digest
        return DatasetView(
            name=f"{self.info.task}/dev",
            digest=digest[:32],
            context="evaluation",
            n_items=evaluation.n_items,
        )

    def _policy(self, result: Result) -> PolicyView | None:
        candidate, parent = result.candidate, result.candidate.parent or ""
        if result.update is None or candidate.policy != candidate.id:
            return None
        return policy_view(
            self.path,
            self.info,
            candidate,
            result.update,
            parent=self._policies.get(parent, ""),
            before=self._scores.get(parent),
            after=result.score,
        )

    def _choice(self, group: str) -> str:
        """The file that was chosen of a group of the configuration; empty for none."""
        choices = self.info.provenance.get("choices")
        return str(choices.get(group) or "") if isinstance(choices, dict) else ""

    def _lines(self) -> Iterator[Line]:
        try:
            file = (self.path / JOURNAL_FILE).open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                try:
                    line = from_json(raw, Line)
                except msgspec.MsgspecError as error:
                    raise RunDirectoryError(
                        f"{self.path / JOURNAL_FILE} is damaged after byte {self._offset} "
                        f"({error}). Restore it from a copy."
                    ) from error
                self._offset += len(raw)
                yield line

    def _at(self, elapsed_s: float) -> int:
        return self._created_ms + round(1000 * elapsed_s)


def metric_name(name: str) -> str:
    """`name` in MLflow's alphabet, and without the path tricks that it refuses."""
    name = re.sub(r"[^\w\-./: ]", "_", name.replace("@", "_at_"))
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:250] or "_"


def _results(steps: Mapping[str, Line]) -> list[Result]:
    """The candidates of one generation of which it is known what became, by index."""
    results = []
    for key, line in sorted(steps.items()):
        place, _, kind = key.partition("/")
        if kind != "candidate":
            continue
        candidate = from_data(line.data, Candidate)
        attempt = _step(steps, f"{place}/attempt", Attempt)
        update = _step(steps, f"{place}/update", Update)
        if attempt is None:
            outcome, reason = Outcome.BAD_PROPOSAL, candidate.problem
            if update is not None:
                outcome, reason = Outcome.UPDATE_FAILED, update.problem
            if not reason:
                continue
            attempt = Attempt(candidate=candidate.id, outcome=outcome, reason=reason)
        evaluation = _step(steps, f"{place}/evaluation", Evaluation)
        results.append(
            Result(candidate=candidate, attempt=attempt, evaluation=evaluation, update=update)
        )
    return sorted(results, key=lambda result: result.candidate.index)


def _step(steps: Mapping[str, Line], key: str, kind: type[T]) -> T | None:
    line = steps.get(key)
    return None if line is None else from_data(line.data, kind)


def _rank(result: Result) -> float:
    return -math.inf if result.score is None else result.score


def _params(result: Result) -> dict[str, str]:
    proposal = result.candidate.proposal
    changes = sorted(proposal.changes.items())[:MAX_CHANGES]
    params = {metric_name(f"change/{name}"): _text(value) for name, value in changes}
    return {"source": proposal.source[:MAX_VALUE], **params}


def _metrics(result: Result, folder: Path, attempt: Line | None) -> dict[str, float]:
    metrics = {} if attempt is None else {"wall_s": attempt.wall_s}
    usage = _read(folder / "usage.json")
    if usage is not None:
        values = msgspec.json.decode(usage)
        for name in ("wall_s", "cpu_s", "max_rss_mib"):
            if _is_number(values.get(name)):
                metrics[name] = float(values[name])
    evaluation = result.evaluation
    if evaluation is not None:
        for group, numbers in (("dev", evaluation.metrics), ("symptom", evaluation.symptoms)):
            for name, value in sorted(numbers.items())[:MAX_METRICS]:
                metrics[metric_name(f"{group}/{name}")] = value
        if evaluation.score is not None:
            metrics["score/dev"] = evaluation.score
    if result.update is not None:
        for name, value in sorted(result.update.report.items()):
            metrics[metric_name(f"update/{name}")] = value
    return metrics


def _note(result: Result) -> str:
    """What was tried and what became of it; a model's words stay words, not Markdown."""
    proposal = result.candidate.proposal
    told = {
        "Hypothesis": proposal.hypothesis,
        "Evidence": proposal.evidence,
        "Expected": proposal.expected_effect,
        "Failure": result.reason,
    }
    parts = [f"**{name}.** {_plain(text)}" for name, text in told.items() if text]
    return "\n\n".join(parts)[:MAX_NOTE]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no links, pictures or HTML of its own."""
    return re.sub(r"([\\`*_{}\[\]()<>#+.!|~:&-])", r"\\\1", " ".join(text.split()))


def _files(result: Result, folder: Path) -> dict[str, bytes]:
    diff = _read(folder / "harness.diff")
    title = f"{result.candidate.id}: changes to the harness of {result.candidate.parent}"
    files = {
        "improvement.md": _read(folder / "improvement.md"),
        "harness.diff": diff,
        "harness.html": diff and diff_page(diff.decode("utf-8", "replace"), title).encode(),
        "stdout.log": _read(folder / "stdout.log", tail=LOG_TAIL),
        "stderr.log": _read(folder / "stderr.log", tail=LOG_TAIL),
    }
    if result.update is not None:
        files["update.json"] = msgspec.json.format(to_json(result.update))
    if result.evaluation is not None:
        files["evaluation.json"] = msgspec.json.format(to_json(result.evaluation))
    return {name: data for name, data in files.items() if data}


def _read(path: Path, *, tail: int | None = None) -> bytes | None:
    """A regular file, or its last `tail` bytes; None where there is none. Follows no link."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    state = os.fstat(file)
    if not stat.S_ISREG(state.st_mode):
        os.close(file)
        return None
    with open(file, "rb") as stream:
        if tail is not None:
            stream.seek(max(0, state.st_size - tail))
        return stream.read()


def _config(data: bytes | None) -> dict[str, Any]:
    """The resolved configuration; empty where it cannot be read."""
    try:
        content = yaml.safe_load(data or b"")
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _choices(content: Mapping[str, Any]) -> dict[str, str]:
    """What the configuration says about the params people filter on."""
    sections = [content, *(value for value in content.values() if isinstance(value, dict))]
    chosen: dict[str, str] = {}
    for name in FILTERED:
        for section in sections:
            value = _name(section.get(name))
            if value is not None and value != "" and not isinstance(value, list):
                chosen[name] = str(value)
                break
    return chosen


def _name(value: Any) -> Any:
    """Of a group of the configuration: its name, or that of its class; else the value itself."""
    if isinstance(value, dict):
        return value.get("name") or str(value.get("_target_", "")).rpartition(".")[2]
    return value


def _find(data: Mapping[str, Any], names: Collection[str]) -> str | None:
    return next((data[name] for name in names if isinstance(data.get(name), str)), None)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _milliseconds(moment: str) -> int:
    return round(1000 * datetime.fromisoformat(moment).timestamp())
