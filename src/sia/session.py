"""One run from its configuration to `result.json`: directory, parts, loop, progress, ending."""

import hashlib
import os
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sia import build, loop, provenance, rundir, spend
from sia.config import Config
from sia.errors import ConfigError, NoScoredAttempt, SiaError
from sia.gateway.protocol import Gateway, Role, Spend
from sia.progress import Progress
from sia.records import Ending, Outcome, Result, RunResult
from sia.rundir import CONFIG_FILE, RunDir, RunInfo
from sia.tasks import data
from sia.tracking import Tracker

WIDTH = 200  # of the table of spending; a narrow terminal breaks its lines, not its numbers
# What may differ between a run and its continuation: how far it goes, not what it is.
EXTENDABLE = ("generations", "workers", "budget", "tracking", "web", "resume")
# Of how a run is watched or taken up, not of the run: left out of its recorded configuration.
UNRECORDED = ("resume", "web")


def run(
    node: DictConfig, *, path: Path, choices: Mapping[str, str], overrides: Sequence[str]
) -> RunResult:
    """Runs, or resumes, one run in the directory `path`.

    Args:
        node: The composed configuration.
        path: The run directory.
        choices: The chosen option of each group, for `run.json`.
        overrides: What was given on the command line; a resumed run may not contradict its record.

    Raises:
        SiaError: The user can mend it.
        NoScoredAttempt: The loop ended and nothing was scored.
    """
    console = Console(stderr=False)
    resumed = node.resume is not None
    if resumed:
        node = _recorded(Path(node.resume), node, overrides)
        choices = {**choices, **_recorded_choices(Path(path))}
    watched = OmegaConf.select(node, "web", default=False)  # the record of a run has none
    cfg = cast(Config, node)
    checked = build.check(cfg)
    data.ensure(checked.task, ask=sys.stdin.isatty() and console.is_terminal)
    checked.check_machine()
    gateway = build.gateway(cfg, path)
    build.place_harness(cfg, checked)
    text = OmegaConf.to_yaml(_recordable(node), resolve=True)
    if resumed:
        run_dir = RunDir.resume(path)
    else:
        run_dir = RunDir.create(path, _info(cfg, checked, choices, text), text)
    info = run_dir.info
    try:
        _say(console, f"run       {path}")
        _say(console, f"task      {info.task} v{info.task_version}: {checked.task.facts.title}")
        for warning in checked.task.facts.warnings:
            _say(console, f"warning   {warning}")
        _say(console, f"sandbox   {checked.sandbox.protects}")
        if watched:
            from sia.web import child

            _say(console, f"page      {child.start(path)}")
        with gateway as models:
            return _play(cfg, checked, run_dir, models, console)
    finally:
        run_dir.close()


@dataclass
class _Tally:
    """What the events of the loop add up to."""

    failures: Counter[str] = field(default_factory=Counter)
    generations: int = 0
    incumbent: Result | None = None
    ending: Ending | None = None

    def add(self, event: loop.Event) -> None:
        if isinstance(event, loop.Scored) and event.result.outcome is not Outcome.OK:
            self.failures[event.result.outcome] += 1
        elif isinstance(event, loop.Closed):
            self.generations += 1
            self.incumbent = event.incumbent
        elif isinstance(event, Ending):
            self.ending = event

    def counts(self) -> str:
        return ", ".join(f"{name}: {count}" for name, count in sorted(self.failures.items()))


def _play(
    cfg: Config,
    checked: build.Checked,
    run_dir: RunDir,
    gateway: Gateway | None,
    console: Console,
) -> RunResult:
    """Plays the loop to its end, whatever that is, and writes it down."""
    (run_dir.path / rundir.RESULT_FILE).unlink(missing_ok=True)
    checked.tracker.start(run_dir.path)
    parts = build.parts(cfg, checked, run_dir, gateway)
    progress = Progress(
        console,
        metric=parts.metric,
        generations=cfg.generations,
        wall_s=cfg.budget.wall_s,
        clock=run_dir.journal,
        spent=gateway.spend if gateway else None,
    )
    tally = _Tally()
    status, reason = "failed", ""
    error: BaseException | None = None
    try:
        turns = loop.generations(parts, build.limits(cfg, checked.task))
        with _one_interrupt(), progress, closing(turns):
            for event in turns:
                progress.update(event)
                tally.add(event)
        status, reason = "finished", tally.ending.detail if tally.ending else ""
        if tally.incumbent is None:
            raise NoScoredAttempt(_nothing_scored(tally, run_dir.path))
    except KeyboardInterrupt:
        status, reason = "interrupted", "Ctrl-C"
    except OSError as problem:
        error = problem
        if problem.errno in rundir.DISK_ERRORS:
            error = rundir.write_error(Path(problem.filename or run_dir.path), problem)
    except BaseException as problem:
        error = problem  # raised again below, when the run directory says how it ended
    parts.verifier.close()
    if error is not None:
        status, reason = "failed", str(error) or type(error).__name__
    best = tally.incumbent
    paid: Mapping[Role, Spend] = {}
    unanswered: Sequence[str] = ()
    try:
        paid, unanswered = spend.of_run(run_dir.path), spend.unanswered(run_dir.path)
    except SiaError as problem:
        error = error or problem
    result = RunResult(
        status=status,
        reason=reason,
        best=best.candidate.id if best else None,
        best_score=best.score if best else None,
        generations=tally.generations,
        failures=dict(tally.failures),
        elapsed_s=round(run_dir.journal.elapsed_s, 3),
        spend=spend.as_record(paid),
    )
    try:
        result = _finish(run_dir, result, checked.tracker)
    except SiaError as problem:
        error = error or problem  # a full disk has its message already
    if paid:
        Console(file=console.file, width=WIDTH).print(spend.table(paid))
    if unanswered:
        _say(
            console,
            f"replay    {len(unanswered)} requests have no recorded answer. {unanswered[0]}",
        )
    if error is not None:
        raise error
    _report(console, result, tally, run_dir.path, checked.task.metric.name)
    return result


def _nothing_scored(tally: _Tally, path: Path) -> str:
    if tally.ending and tally.ending.reason == "budget":
        detail = tally.ending.detail
        return (
            f"Nothing was scored before the budget ended: {detail}. What was done is kept; raise "
            f"it and go on: python -m sia resume={path} {detail.partition('=')[0]}=..."
        )
    return (
        f"No attempt was scored in {tally.generations} generations ({tally.counts()}). "
        f"What the targets printed: {path}/gen-*/cand-*/stderr.log"
    )


def _finish(run_dir: RunDir, result: RunResult, tracker: Tracker) -> RunResult:
    """Writes `result.json` and waits for the tracker to show it."""
    run_dir.finish(result)
    if problem := tracker.finish():
        result = replace(result, tracking=problem)
        run_dir.finish(result)
    return result


def _report(console: Console, result: RunResult, tally: _Tally, path: Path, metric: str) -> None:
    if result.tracking:
        _say(console, f"tracking  {result.tracking}")
    if tally.failures:
        _say(console, f"not ok    {tally.counts()}")
    if result.status == "interrupted":
        _say(console, "stopped   everything finished is written")
        _say(console, f"next      go on: python -m sia resume={path}")
        return
    reason = result.reason
    if tally.ending and tally.ending.reason == "budget":
        _say(console, f"stopped   budget: {result.reason}")
        reason = "budget"
    _say(
        console,
        f"best      {result.best} with {metric}/dev = {result.best_score:.4f} after "
        f"{result.generations} generations in {result.elapsed_s:.0f} s ({reason})",
    )
    _say(console, f"next      open the sealed test: python -m sia.exam {path}")


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt; later ones do not disturb the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a launcher's thread gets no signals
        return

    def later(signum: int, frame: Any) -> None:
        os.write(2, b"sia: stopping, one moment\n")

    def first(signum: int, frame: Any) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, later)
        raise KeyboardInterrupt

    before = {name: signal.signal(name, first) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:  # else what follows is the ending
            for name, handler in before.items():
                signal.signal(name, handler)


def _info(cfg: Config, checked: build.Checked, choices: Mapping[str, str], text: str) -> RunInfo:
    now = datetime.now(UTC)
    task = checked.task
    return RunInfo(
        run_id=f"{task.name}-{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        task=task.name,
        task_version=task.facts.version,
        meta=choices.get("meta", ""),
        target=choices.get("target", ""),
        seed=cfg.seed,
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        created_at=now.isoformat(timespec="seconds"),
        protocol=loop.PROTOCOL,
        provenance={
            **provenance.collect(),
            "choices": dict(choices),
            "sandbox": checked.sandbox.name,
            "public_sha256": provenance.tree_sha256(task.public_dir),
        },
    )


def _recorded(path: Path, node: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the run at `path`, with what a continuation may change."""
    rundir.read_info(path)
    recorded = cast(DictConfig, OmegaConf.load(path / CONFIG_FILE))
    contradictions = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if key.split(".")[0] in EXTENDABLE:
            continue
        wanted, found = OmegaConf.select(node, key), OmegaConf.select(recorded, key)
        if key in node and _plain(wanted) != _plain(found):
            contradictions.append(
                f"{override} contradicts the record of {path} ({_plain(found)!r}). "
                "Leave it out, or start a new run."
            )
    if contradictions:
        raise ConfigError("\n".join(contradictions))
    given = {override.partition("=")[0].split(".")[0] for override in overrides}
    for key in EXTENDABLE:
        if key in given:
            recorded[key] = node[key]
    return recorded


def _recorded_choices(path: Path) -> dict[str, str]:
    choices: dict[str, str] = rundir.read_info(path).provenance.get("choices", {})
    return choices


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _recordable(node: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(node, [str(key) for key in node if key not in UNRECORDED])


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
