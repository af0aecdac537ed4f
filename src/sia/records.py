"""What passes between the steps of a run and is written to its journal.

All records are frozen. `to_json` and `from_json` are exact inverses. Nothing here holds a time: the
journal keeps times beside the records, so that two runs of one seed can be compared byte by byte.
"""

import enum
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

# Rows of an exam that no baseline of a task is called.
REFERENCE = "reference harness"
FIRST_HARNESS = "first harness"  # of a Meta-Agent that wrote one of its own
BEST = "best by dev"
FINAL_REFIT = "final refit"


class Lever(enum.StrEnum):
    """What the Feedback-Agent may decide."""

    HARNESS = "harness"
    WEIGHTS = "weights"
    STOP = "stop"


class Outcome(enum.StrEnum):
    """How an attempt ended; everything but `OK` and `DUPLICATE` is a counted failure."""

    OK = "ok"
    DUPLICATE = "duplicate"  # the same harness was scored before; its evaluation is reused
    UPDATE_FAILED = "update_failed"  # the weights could not be updated; the policy is the parent's
    BAD_PROPOSAL = "bad_proposal"  # the meta backend delivered nothing usable
    CRASHED = "crashed"  # non-zero exit or killed by a signal
    TIMEOUT = "timeout"
    DISK_LIMIT = "disk_limit"  # wrote more than its allowance
    NO_SUBMISSION = "no_submission"
    BAD_SUBMISSION = "bad_submission"  # the verifier could not read it
    VERIFIER_FAILED = "verifier_failed"  # the verifier itself broke on it


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which lever comes next, and why.

    Attributes:
        recipe: For the lever `weights`: how they are updated.
        settings: What differs from the recipe's own.
    """

    lever: Lever
    hypothesis: str
    evidence: str = ""
    expected_effect: str = ""
    recipe: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What the meta backend says about an edit that it made.

    Attributes:
        knobs: The complete configuration the edit leads to, where the backend works with knobs.
        changes: What differs from the parent, knob or file -> new value, for the reader.
        source: Which rule made it, for example `reference`, `move:2` or `tpe`.
    """

    hypothesis: str
    evidence: str = ""
    expected_effect: str = ""
    source: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One harness with one policy that is being tried.

    Attributes:
        id: `g003-c0`: generation 3, first candidate of that generation.
        parent: The candidate whose harness was edited; None for the first harness.
        harness_sha256: Digest of the harness folder; empty when there is none.
        lever: What made it: an edit of the harness, or an update of the weights.
        policy: The candidate whose update made the policy in use; empty while there was none.
        duplicate_of: An earlier candidate with the same digest and policy, whose evaluation is
            reused.
        problem: Why the proposal is unusable; empty when it is usable.
    """

    id: str
    generation: int
    index: int
    parent: str | None
    proposal: Proposal
    harness_sha256: str = ""
    lever: Lever = Lever.HARNESS
    policy: str = ""
    duplicate_of: str | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One execution of a candidate on the task.

    Attributes:
        exit_code: Of the target's process; negative for a signal; None where none was started.
        trajectories: How many trajectory files were collected.
    """

    candidate: str
    outcome: Outcome
    reason: str = ""
    exit_code: int | None = None
    trajectories: int = 0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One dev item that was not answered right: what was said, never what is right.

    Attributes:
        answer: What the target said, cut; empty where it gave no usable answer.
        score: Of this item, as the verifier counts it.
    """

    item: str
    answer: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One recipe of the menu, for whoever decides."""

    name: str
    needs: str
    when: str


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update of the weights.

    Attributes:
        problem: Why there is no new policy; empty when there is one.
        report: What it did, in numbers that do not depend on the machine's speed.
        taken_s: Seconds that it took where it was made, if it was taken over from another run; the
            run's clock is charged with them.
    """

    candidate: str
    recipe: str
    problem: str = ""
    report: dict[str, float] = field(default_factory=dict)
    taken_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the verifier says about one submission on one split.

    Attributes:
        score: The task's metric, in its own units; None where the submission could not be scored.
        n_items: Fixed denominator: every item of the split, answered or not.
        metrics: Further aggregates.
        symptoms: Aggregates that a meta backend can react to.
        breakdown: Per-class and confusion tables, for people and for feedback.
        items: Score of each item by id; aligned between candidates, for paired statistics.
        failures: A bounded sample of what went wrong on the dev split; empty on any other.
    """

    candidate: str
    split: str
    score: float | None
    n_items: int = 0
    n_answered: int = 0
    problem: str = ""
    outcome: Outcome = Outcome.OK
    metrics: dict[str, float] = field(default_factory=dict)
    symptoms: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, Any] = field(default_factory=dict)
    items: dict[str, float] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """A candidate with what became of it.

    Attributes:
        evaluation: None where nothing could be scored.
        update: Of its weights; None where it needed none.
    """

    candidate: Candidate
    attempt: Attempt
    evaluation: Evaluation | None
    update: Update | None = None

    @property
    def score(self) -> float | None:
        """The dev score, or None."""
        return None if self.evaluation is None else self.evaluation.score

    @property
    def outcome(self) -> Outcome:
        """How it ended: the attempt's outcome, or the verifier's complaint about it."""
        if self.attempt.outcome is Outcome.OK and self.evaluation is not None:
            return self.evaluation.outcome
        return self.attempt.outcome

    @property
    def reason(self) -> str:
        """One line on a failure; empty for a scored result."""
        problem = "" if self.evaluation is None else self.evaluation.problem
        return self.attempt.reason or problem


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One turn of the loop, closed.

    Attributes:
        incumbent: The best candidate so far by dev score alone, after this generation.
        accepted: Whether the incumbent changed in this generation.
        gain: How much the incumbent's score improved over the previous incumbent; None for the
            first score and for generations that changed nothing.
    """

    index: int
    candidates: tuple[str, ...]
    incumbent: str | None
    best_score: float | None
    accepted: bool
    gain: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Why the loop ended: `reason` is `generations`, `stop`, or `budget`."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The end of a run, written to `result.json`.

    Attributes:
        status: `finished`, `interrupted` or `failed`.
        failures: How many candidates ended in each outcome other than `ok`.
        spend: What model calls have cost: role -> the numbers of `sia.gateway.protocol.Spend`;
            empty without any.
        tracking: What went wrong in the tracker; empty when nothing did.
    """

    status: str
    reason: str
    best: str | None = None
    best_score: float | None = None
    generations: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    spend: dict[str, dict[str, int | float]] = field(default_factory=dict)
    tracking: str = ""


@dataclass(frozen=True, kw_only=True)
class ExamRow:
    """One line of the result table of an exam.

    Attributes:
        candidate: Of the run; None for baselines, which no search touched.
        dev: Score that the search saw; None where there is none.
        test: Sealed score with its 95 % interval over items, `low` to `high`.
        gain: Paired difference to the reference harness on the same test items, with interval.
        seconds: Wall time of the attempt.
        items: Test score of each item, for statistics over several runs.
    """

    name: str
    candidate: str | None = None
    dev: float | None = None
    test: float | None = None
    low: float | None = None
    high: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    items: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The sealed test of one run, opened: `exam.json`.

    Attributes:
        n_items: Of the sealed test; 0 where nobody knows them.
        warnings: What the task cannot promise.
    """

    run_id: str
    task: str
    metric: str
    n_items: int
    opened_at: str
    sandbox: str
    rows: tuple[ExamRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> ExamRow | None:
        """The row of the candidate that was chosen by dev score."""
        return next((row for row in self.rows if row.name == BEST), None)


def to_json(record: Any, *, pretty: bool = False) -> bytes:
    """A record as JSON; keys are sorted, so that equal records are equal bytes.

    Args:
        record: A dataclass instance.
        pretty: Several indented lines for people, instead of one.
    """
    # Not msgspec alone: it leaves out a field that was filled by its default when it was decoded.
    line = msgspec.json.encode(asdict(record), order="sorted")
    return msgspec.json.format(line) + b"\n" if pretty else line


def from_json(data: bytes | str, kind: type[T]) -> T:
    """Inverse of `to_json`.

    Raises:
        msgspec.ValidationError: `data` does not have the shape of `kind`.
    """
    return msgspec.json.decode(data, type=kind)


def to_data(record: Any) -> Any:
    """The record as plain dictionaries, lists and scalars."""
    return msgspec.to_builtins(asdict(record), order="sorted")


def from_data(data: Any, kind: type[T]) -> T:
    """Inverse of `to_data`."""
    return msgspec.convert(data, type=kind)
