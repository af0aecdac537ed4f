"""One run as a page shows it, from its directory: generations, candidates, what they cost.

    RunReader.page()              the run: generations, candidates, totals
    RunReader.evaluation(id)      what the verifier said about one candidate, items included

The journal is read once; after that only what was added to it.
"""

import re
import shlex
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sia import rundir
from sia.errors import RunDirectoryError
from sia.gateway.protocol import Role, Spend
from sia.gateway.store import STORE_FILE, read_scopes
from sia.pages.files import Folder, NotThere
from sia.records import (
    Attempt,
    Candidate,
    Decision,
    Ending,
    Evaluation,
    Exam,
    Generation,
    Lever,
    Outcome,
    RunResult,
    Update,
    from_json,
)
from sia.rundir import (
    CONFIG_FILE,
    EXAM_FILE,
    JOURNAL_FILE,
    LOCK_FILE,
    RESULT_FILE,
    RUN_FILE,
    RunInfo,
)
from sia.tasks import bundled_task
from sia.tasks.task import Metric
from sia.tracking.calls import generation_of

MAX_RECORD = 8 * 2**20  # bytes of run.json, result.json, exam.json and config.yaml
NO_FAILURE = (Outcome.OK, Outcome.DUPLICATE)
RUNNING, KILLED = "running", "killed"  # besides the words of `RunResult.status`

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CandidateView:
    """One candidate and what is known of it so far.

    Attributes:
        outcome: None while it is being tried.
        doing: What it waits for while it is being tried: `update`, `attempt` or `verifier`.
        accepted: It became the incumbent when its generation closed.
        wall_s: Of its attempt; None where none was made.
    """

    candidate: Candidate
    outcome: Outcome | None
    doing: str = ""
    reason: str = ""
    score: float | None = None
    n_items: int = 0
    n_answered: int = 0
    accepted: bool = False
    trajectories: int = 0
    wall_s: float | None = None
    update: Update | None = None

    @property
    def id(self) -> str:
        """`g003-c0`."""
        return self.candidate.id

    @property
    def failed(self) -> bool:
        """Whether it ended without a score of its own."""
        return self.outcome is not None and self.outcome not in NO_FAILURE


@dataclass(frozen=True, kw_only=True)
class GenerationView:
    """One generation.

    Attributes:
        decision: What led to it; None for the first.
        closed: None while it is open.
        wall_s: From the end of the generation before it to its own, or to the last step so far.
        spend: Of the model calls that count for it.
    """

    index: int
    candidates: tuple[CandidateView, ...]
    decision: Decision | None
    closed: Generation | None
    wall_s: float
    spend: Spend

    @property
    def lever(self) -> Lever:
        """What was decided; the first generation is a harness."""
        return self.decision.lever if self.decision else Lever.HARNESS


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """One run, as far as it is.

    Attributes:
        key: Its folder, relative to the folder of runs.
        path: The same for a command line, relative to the working directory where it lies in it.
        status: `running`, `finished`, `interrupted`, `failed`, or `killed`: no end is recorded and
            nobody works on it.
        arm: What it was allowed to choose, `harness`, `weights` or `both`.
        next_decision: What follows the last generation, already decided.
        spend: Of all model calls, by role.
        problem: Why not all of the run can be shown; empty when it can.
    """

    key: str
    path: str
    info: RunInfo
    metric: Metric
    status: str
    arm: str
    result: RunResult | None
    exam: Exam | None
    ending: Ending | None
    generations: tuple[GenerationView, ...]
    next_decision: Decision | None
    elapsed_s: float
    spend: dict[Role, Spend] = field(default_factory=dict)
    problem: str = ""

    @property
    def candidates(self) -> dict[str, CandidateView]:
        """All candidates by id, in the order in which they were made."""
        return {one.id: one for generation in self.generations for one in generation.candidates}

    @property
    def incumbent(self) -> str | None:
        """The best candidate so far by dev score."""
        closed = [one.closed for one in self.generations if one.closed]
        return closed[-1].incumbent if closed else None

    @property
    def best_score(self) -> float | None:
        """Its dev score."""
        closed = [one.closed for one in self.generations if one.closed]
        return closed[-1].best_score if closed else None

    @property
    def failures(self) -> dict[str, int]:
        """How many candidates ended in each outcome other than `ok`."""
        counts = Counter(
            one.outcome.value
            for one in self.candidates.values()
            if one.outcome not in (None, Outcome.OK)
        )
        return dict(sorted(counts.items()))


class _Step(msgspec.Struct):
    """A line of the journal whose record is not looked into yet."""

    key: str
    kind: str
    data: msgspec.Raw
    elapsed_s: float
    wall_s: float


class _Score(msgspec.Struct):
    """The part of an evaluation that a list needs; the scores of its items are skipped."""

    score: float | None
    n_items: int = 0
    n_answered: int = 0
    problem: str = ""
    outcome: Outcome = Outcome.OK


@dataclass
class _Place:
    """What the journal says about one candidate; `at` is where its evaluation is written."""

    candidate: Candidate
    attempt: Attempt | None = None
    attempt_s: float | None = None
    update: Update | None = None
    score: _Score | None = None
    at: tuple[int, int] = (0, 0)


class RunReader:
    """Reads one run directory. Not for several threads at once."""

    def __init__(self, folder: Folder, key: str) -> None:
        """Opens a run.

        Args:
            folder: Holds runs.
            key: The run's folder, relative to it.

        Raises:
            NotThere: There is no run of that name.
            RunDirectoryError: Its `run.json` is damaged.
        """
        self.folder = folder
        self.key = key
        self.info = read_info(folder, key)
        self.path = folder.root / key
        self._config = folder.text(f"{key}/{CONFIG_FILE}", limit=MAX_RECORD)
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._places: dict[str, _Place] = {}
        self._decisions: dict[int, Decision] = {}
        self._closed: dict[int, Generation] = {}
        self._ends: dict[int, float] = {}
        self._elapsed_s = 0.0
        self._ending: Ending | None = None
        self._spend: dict[tuple[str, Role], Spend] = {}
        self._store_state: tuple[Any, ...] = ()
        self._version: tuple[Any, ...] = ()
        self._page: RunPage | None = None

    def version(self) -> tuple[Any, ...]:
        """Differs when the page would; costs a few calls of the system."""
        names = (JOURNAL_FILE, RESULT_FILE, EXAM_FILE)
        return (
            is_locked(self.folder, self.key),
            *(_state(self.folder, self.key, n) for n in names),
        )

    def page(self) -> RunPage:
        """The run as it is now."""
        version = self.version()
        if self._page is None or version != self._version:
            self._page, self._version = self._read(), version
        return self._page

    def evaluation(self, candidate: str) -> Evaluation | None:
        """Of a candidate, or of the one whose evaluation it reuses; None where there is none."""
        place = self._places.get(candidate)
        if place is not None and place.candidate.duplicate_of is not None:
            place = self._places.get(place.candidate.duplicate_of)
        if place is None or place.score is None:
            return None
        start, size = place.at
        line = self.folder.read(f"{self.key}/{JOURNAL_FILE}", start=start, limit=size)
        step = msgspec.json.decode(line.data, type=_Step)
        return msgspec.json.decode(step.data, type=Evaluation)

    def _read(self) -> RunPage:
        problem = ""
        journal = self.folder.state(f"{self.key}/{JOURNAL_FILE}")
        if journal is None or journal.st_size < self._offset:  # another run took its place
            self._reset()
        try:
            self._take_steps()
            self._take_spend()
        except RunDirectoryError as error:
            problem = str(error)
        result = read_optional(self.folder, f"{self.key}/{RESULT_FILE}", RunResult)
        roles: dict[Role, Spend] = {}
        for (_, role), one in self._spend.items():
            roles[role] = roles.get(role, Spend()) + one
        return RunPage(
            key=self.key,
            path=_for_commands(self.path),
            info=self.info,
            metric=metric_of(self.info.task),
            status=status_of(result, is_locked(self.folder, self.key)),
            arm=rundir.arm(self._config),
            result=result,
            exam=read_optional(self.folder, f"{self.key}/{EXAM_FILE}", Exam),
            ending=self._ending,
            generations=tuple(self._generations()),
            next_decision=self._decisions.get(max(self._closed, default=-1) + 1),
            elapsed_s=self._elapsed_s,
            spend=roles,
            problem=problem,
        )

    def _take_steps(self) -> None:
        for raw in self.folder.lines(f"{self.key}/{JOURNAL_FILE}", self._offset):
            try:
                self._take(msgspec.json.decode(raw, type=_Step), len(raw))
            except (msgspec.MsgspecError, KeyError, ValueError) as error:
                raise RunDirectoryError(
                    f"{self.path / JOURNAL_FILE} is damaged after byte {self._offset}: {error}. "
                    "What comes after it is not shown. Restore the file from a copy."
                ) from error
            self._offset += len(raw)

    def _take(self, step: _Step, size: int) -> None:
        generation = int(step.key.partition("/")[0])
        if step.kind == "Candidate":
            candidate = msgspec.json.decode(step.data, type=Candidate)
            self._places[candidate.id] = _Place(candidate)
        elif step.kind == "Attempt":
            attempt = msgspec.json.decode(step.data, type=Attempt)
            place = self._places[attempt.candidate]
            place.attempt, place.attempt_s = attempt, step.wall_s
        elif step.kind == "Update":
            update = msgspec.json.decode(step.data, type=Update)
            self._places[update.candidate].update = update
        elif step.kind == "Evaluation":
            place = self._places[f"g{generation:03}-c{step.key.split('/')[1]}"]
            place.score = msgspec.json.decode(step.data, type=_Score)
            place.at = self._offset, size
        elif step.kind == "Decision":
            self._decisions[generation + 1] = msgspec.json.decode(step.data, type=Decision)
        elif step.kind == "Generation":
            self._closed[generation] = msgspec.json.decode(step.data, type=Generation)
            self._ends[generation] = step.elapsed_s
        elif step.kind == "Ending":
            self._ending = msgspec.json.decode(step.data, type=Ending)
        self._elapsed_s = step.elapsed_s

    def _take_spend(self) -> None:
        # With a write-ahead log the store itself may keep its size while calls are added.
        names = (STORE_FILE, f"{STORE_FILE}-wal")
        state = tuple(_state(self.folder, self.key, name) for name in names)
        if state[0] is not None and state != self._store_state:
            try:
                self._spend = read_scopes(self.path / STORE_FILE)
            except sqlite3.Error as error:
                raise damaged_store(self.path, error) from error
            self._store_state = state

    def _generations(self) -> Iterator[GenerationView]:
        spends: dict[int, Spend] = {}
        for (scope, _), one in self._spend.items():
            index = generation_of(scope)
            if index is not None:
                spends[index] = spends.get(index, Spend()) + one
        members: dict[int, list[_Place]] = {}
        for place in self._places.values():
            members.setdefault(place.candidate.generation, []).append(place)
        begun = 0.0
        for index in sorted(members):
            closed = self._closed.get(index)
            ended = self._ends.get(index, self._elapsed_s)
            places = sorted(members[index], key=lambda place: place.candidate.index)
            yield GenerationView(
                index=index,
                candidates=tuple(self._candidate(place, closed) for place in places),
                decision=self._decisions.get(index),
                closed=closed,
                wall_s=ended - begun,
                spend=spends.get(index, Spend()),
            )
            begun = ended

    def _candidate(self, place: _Place, closed: Generation | None) -> CandidateView:
        candidate, attempt, update, score = (
            place.candidate, place.attempt, place.update, place.score,
        )  # fmt: skip
        view = CandidateView(
            candidate=candidate,
            outcome=None,
            accepted=closed is not None and closed.accepted and closed.incumbent == candidate.id,
            trajectories=attempt.trajectories if attempt else 0,
            wall_s=place.attempt_s,
            update=update,
        )
        if candidate.problem:
            return replace(view, outcome=Outcome.BAD_PROPOSAL, reason=candidate.problem)
        if candidate.duplicate_of is not None:
            twin = self._places.get(candidate.duplicate_of)
            view = replace(view, reason=f"the harness of {candidate.duplicate_of}")
            if twin is None or (twin.attempt is None and closed is None):
                return replace(view, doing=f"result of {candidate.duplicate_of}")
            return _scored(view, Outcome.DUPLICATE, twin.score, view.reason)
        if update is not None and update.problem:
            return replace(view, outcome=Outcome.UPDATE_FAILED, reason=update.problem)
        if attempt is None:
            retrained = candidate.lever is Lever.WEIGHTS and update is None
            return replace(view, doing="update" if retrained else "attempt")
        if attempt.outcome is not Outcome.OK:
            return replace(view, outcome=attempt.outcome, reason=attempt.reason)
        if score is None:
            return replace(view, doing="verifier")
        return _scored(view, score.outcome, score, score.problem)


def _scored(
    view: CandidateView, outcome: Outcome, score: _Score | None, reason: str
) -> CandidateView:
    if score is None:
        return replace(view, outcome=outcome, reason=reason)
    return replace(
        view,
        outcome=outcome,
        reason=reason,
        score=score.score,
        n_items=score.n_items,
        n_answered=score.n_answered,
    )


def read_info(folder: Folder, key: str) -> RunInfo:
    """The `run.json` of a run.

    Raises:
        NotThere: There is none.
        RunDirectoryError: It is damaged.
    """
    data = folder.read(f"{key}/{RUN_FILE}", limit=MAX_RECORD).data
    try:
        return from_json(data, RunInfo)
    except msgspec.MsgspecError as error:
        raise RunDirectoryError(f"{folder.root / key / RUN_FILE} is damaged: {error}") from error


def read_optional(folder: Folder, name: str, kind: type[T]) -> T | None:
    """A record of its own file; None where there is none, or none that can be read.

    They are replaced as a whole, so one that cannot be read was never written by a run.
    """
    try:
        return from_json(folder.read(name, limit=MAX_RECORD).data, kind)
    except (NotThere, msgspec.MsgspecError):
        return None


def damaged_store(run: Path, error: sqlite3.Error) -> RunDirectoryError:
    """The message for a recording of model calls that SQLite refuses."""
    return RunDirectoryError(
        f"{run / STORE_FILE} cannot be read: {error}. What model calls have said and cost is not "
        "shown. Restore the file from a copy."
    )


def status_of(result: RunResult | None, locked: bool) -> str:
    """One word for how a run is doing."""
    if result is not None:
        return result.status
    return RUNNING if locked else KILLED


def is_locked(folder: Folder, key: str) -> bool:
    """Whether a process works on a run.

    The kernel's list of locks tells without touching the lock: whoever tries it, however briefly,
    may keep a run from being resumed. Numbers of devices differ between the list and the file on
    layered file systems, so the file's own number has to do.
    """
    state = folder.state(f"{key}/{LOCK_FILE}")
    return state is not None and state.st_ino in _locked_inodes()


def _locked_inodes() -> set[int]:
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    return {int(found[1]) for line in lines if (found := re.search(r"FLOCK .*:(\d+) 0 EOF", line))}


@lru_cache
def metric_of(task: str) -> Metric:
    """Of a task that is on this machine; a plain score, higher is better, of any other."""
    found = bundled_task(task)
    return found.metric if found else Metric(name="score")


def _for_commands(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if here in path.parents else path))


def _state(folder: Folder, key: str, name: str) -> tuple[int, int] | None:
    state = folder.state(f"{key}/{name}")
    return None if state is None else (state.st_size, state.st_mtime_ns)
