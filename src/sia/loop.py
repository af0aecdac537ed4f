"""The generation loop: a generator over Protocols, with no I/O of its own.

    for each generation:
        parents    = search.parents(results)      one for each candidate
        candidates = meta.propose(a copy of the parent's harness)
                     or, if that was decided, weights.update(the parent's policy), its harness as is
        attempts   = target.run(candidate)        side by side, and so are the updates
        evaluation = verifier.verify(submission)  on the dev labels
        incumbent  = best by dev score; a tie or a loss keeps it
        decision   = meta.decide(what feedback shows)

Every step goes through the journal: a resumed run walks the same path, reads the steps that
finished and makes only those that did not.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from sia import seeds
from sia.errors import BadProposal, BudgetExceeded
from sia.feedback import Feedback, Shown
from sia.meta import MetaBackend, Question, Request
from sia.records import (
    Attempt,
    Candidate,
    Decision,
    Ending,
    Evaluation,
    Generation,
    Lever,
    Outcome,
    Proposal,
    Result,
    Update,
)
from sia.rundir import Journal
from sia.search import Search, best
from sia.target import Target
from sia.tasks.task import Metric
from sia.verify import Verifier
from sia.weights.protocol import WeightUpdate
from sia.workspace import Workspaces

PROTOCOL = 2  # raise it when the meaning of the loop changes: records are compared within one only


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop is made of.

    Attributes:
        levers: What the Feedback-Agent may choose.
        references: Whether train items come with their answers.
        state: The meta backend's own folder.
    """

    metric: Metric
    meta: MetaBackend
    target: Target
    verifier: Verifier
    search: Search
    feedback: Feedback
    journal: Journal
    workspaces: Workspaces
    weights: WeightUpdate
    levers: tuple[Lever, ...]
    references: bool
    state: Path
    seed: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far the loop goes.

    Attributes:
        generations: At most so many, the first harness included.
        workers: Attempts, with the updates before them, that run side by side.
        attempt_s: Deadline of one attempt.
        update_s: Deadline of one update of the weights.
        wall_s: Budget of the whole run, earlier sessions included; None for no limit.
    """

    generations: int
    workers: int
    attempt_s: float
    update_s: float
    wall_s: float | None


@dataclass(frozen=True, kw_only=True)
class Started:
    """A generation begins.

    Attributes:
        parents: Of its candidates, each once, in their order; empty for the first harness.
    """

    generation: int
    decision: Decision
    parents: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """A candidate was written."""

    candidate: Candidate


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A candidate was tried, with or without success."""

    result: Result


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A generation is over."""

    generation: Generation
    incumbent: Result | None


Event = Started | Proposed | Scored | Closed | Ending


@dataclass(kw_only=True)
class _Memory:
    """What the loop knows so far; rebuilt step by step on a resume."""

    results: list[Result] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    by_digest: dict[tuple[str, str], Result] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    incumbent: Result | None = None


def generations(parts: Parts, limits: Limits) -> Generator[Event]:
    """Runs the loop; each event is yielded when its step is safely in the journal.

    The records are a function of the parts and the seed: neither `workers` nor an interruption
    changes them. Raises what a part cannot go on from (`MetaBackendError`, `TargetError`, …).
    """
    memory = _Memory()
    decision = Decision(lever=Lever.HARNESS, hypothesis="The first harness sets the baseline.")
    with ThreadPoolExecutor(limits.workers, thread_name_prefix="attempt") as pool:
        try:
            for index in range(limits.generations):
                if f"{index:04}/generation" not in parts.journal and _spent(parts, limits):
                    raise _time_is_over(limits)
                yield from _generation(parts, limits, pool, memory, index, decision)
                if index + 1 < limits.generations:
                    decision = parts.journal.step(
                        f"{index:04}/decision",
                        Decision,
                        lambda index=index: _decide(parts, memory, index),  # type: ignore[misc]
                    )
                    if decision.lever is Lever.STOP:
                        yield Ending(reason="stop", detail=decision.hypothesis)
                        return
        except BaseException as error:
            # Attempts and updates in progress must not outlive the loop, whatever ended it.
            pool.shutdown(wait=False, cancel_futures=True)
            parts.target.cancel()
            parts.weights.cancel()
            if not isinstance(error, BudgetExceeded):
                raise
            yield Ending(reason="budget", detail=str(error))
            return
    yield Ending(reason="generations", detail=f"all {limits.generations} generations are done")


def _generation(
    parts: Parts,
    limits: Limits,
    pool: ThreadPoolExecutor,
    memory: _Memory,
    index: int,
    decision: Decision,
) -> Iterator[Event]:
    parents = _parents(parts, memory, index)
    if retrains := decision.lever is Lever.WEIGHTS:
        parents = _to_retrain(parents)
    different = {parent.id: parent for parent in parents if parent}
    yield Started(generation=index, decision=decision, parents=tuple(different.values()))

    candidates: list[Candidate] = []
    for k, parent in enumerate(parents):
        candidate = parts.journal.step(
            f"{index:04}/{k}/candidate",
            Candidate,
            lambda k=k, parent=parent: (  # type: ignore[misc]
                _retrain(parts, index, k, decision, parent)
                if retrains
                else _propose(parts, memory, index, k, decision, parent, candidates)
            ),
        )
        candidates.append(candidate)
        yield Proposed(candidate=candidate)

    retrained = {
        one.candidate.generation for one in memory.results if one.candidate.lever is Lever.WEIGHTS
    }
    waiting: set[Future[Result]] = {
        pool.submit(_try, parts, limits, candidate, parent, len(retrained))
        for candidate, parent in zip(candidates, parents, strict=True)
        if candidate.duplicate_of is None
    }
    results: dict[str, Result] = {}
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for result in sorted((future.result() for future in done), key=lambda r: r.candidate.index):
            results[result.candidate.id] = result
            yield Scored(result=result)
    for candidate in candidates:
        if candidate.duplicate_of is not None:
            result = _reuse(candidate, memory, results)
            results[candidate.id] = result
            yield Scored(result=result)

    ordered = [results[candidate.id] for candidate in candidates]
    incumbent = memory.incumbent
    winner = best([*([incumbent] if incumbent else []), *ordered], parts.metric)
    generation = parts.journal.step(
        f"{index:04}/generation",
        Generation,
        lambda: _close(parts.metric, index, ordered, incumbent, winner),
    )
    _remember(parts, memory, ordered, winner)
    yield Closed(generation=generation, incumbent=memory.incumbent)


def _parents(parts: Parts, memory: _Memory, index: int) -> list[Candidate | None]:
    """What each candidate of a generation is made from; None is the first harness."""
    rng = seeds.stream(parts.seed, f"search/{index}")
    found = parts.search.parents(memory.results, parts.metric, rng)
    if not found:
        return [None] * (parts.search.candidates if index else 1)
    return [result.candidate for result in found]


def _to_retrain(parents: Sequence[Candidate | None]) -> list[Candidate | None]:
    """The first parent with each policy: another update of the same one differs by chance alone."""
    first: dict[str, Candidate | None] = {}
    for parent in parents:
        first.setdefault(parent.policy if parent else "", parent)
    return list(first.values())


def _decide(parts: Parts, memory: _Memory, index: int) -> Decision:
    question = Question(
        generation=index,
        parent=_parents(parts, memory, index + 1)[0],
        folder=parts.workspaces.decision(index),
        history=tuple(memory.shown),
        levers=parts.levers,
        recipes=parts.weights.menu,
        updates=tuple(memory.updates),
        references=parts.references,
        state=parts.state,
        metric=parts.metric,
        seed=seeds.stream_seed(parts.seed, f"decision/{index}"),
    )
    return parts.meta.decide(question)


def _propose(
    parts: Parts,
    memory: _Memory,
    index: int,
    k: int,
    decision: Decision,
    parent: Candidate | None,
    siblings: Sequence[Candidate],
) -> Candidate:
    """Asks for one harness; an unusable one becomes a candidate with a problem."""
    identity = f"g{index:03}-c{k}"
    workspace = parts.workspaces.open(index, k, parent)
    request = Request(
        generation=index,
        index=k,
        decision=decision,
        workspace=workspace,
        parent=parent,
        history=tuple(memory.shown),
        siblings=tuple(sibling.proposal for sibling in siblings),
        state=parts.state,
        metric=parts.metric,
        seed=seeds.stream_seed(parts.seed, f"meta/{index}/{k}"),
    )
    parent_id = parent.id if parent else None
    try:
        proposal = parts.meta.propose(request)
        digest = parts.workspaces.seal(workspace, parent, proposal)
    except BadProposal as problem:
        return Candidate(
            id=identity,
            generation=index,
            index=k,
            parent=parent_id,
            proposal=Proposal(hypothesis=""),
            problem=str(problem),
        )
    policy = parent.policy if parent else ""
    made_of = (digest, policy)
    same = next((one for one in siblings if (one.harness_sha256, one.policy) == made_of), None)
    earlier = memory.by_digest.get(made_of)
    twin = earlier.candidate.id if earlier else same.id if same else None
    return Candidate(
        id=identity,
        generation=index,
        index=k,
        parent=parent_id,
        proposal=proposal,
        harness_sha256=digest,
        policy=policy,
        duplicate_of=twin,
    )


def _retrain(
    parts: Parts, index: int, k: int, decision: Decision, parent: Candidate | None
) -> Candidate:
    """The parent's harness as it is, to be run with a policy that is updated first."""
    identity = f"g{index:03}-c{k}"
    proposal = Proposal(
        hypothesis=decision.hypothesis,
        evidence=decision.evidence,
        expected_effect=decision.expected_effect,
        source=f"weights:{decision.recipe}",
        changes={"recipe": decision.recipe, **decision.settings},
    )
    workspace = parts.workspaces.open(index, k, parent)
    return Candidate(
        id=identity,
        generation=index,
        index=k,
        parent=parent.id if parent else None,
        proposal=proposal,
        harness_sha256=parts.workspaces.seal(workspace, parent, proposal),
        lever=Lever.WEIGHTS,
        policy=identity,
    )


def _try(
    parts: Parts, limits: Limits, candidate: Candidate, parent: Candidate | None, retrained: int
) -> Result:
    """Runs and scores one candidate; called in a worker thread."""
    if candidate.problem:
        attempt = Attempt(
            candidate=candidate.id, outcome=Outcome.BAD_PROPOSAL, reason=candidate.problem
        )
        return Result(candidate=candidate, attempt=attempt, evaluation=None)
    key = f"{candidate.generation:04}/{candidate.index}"
    folder = parts.workspaces.folder(candidate)
    update = None
    if candidate.lever is Lever.WEIGHTS:
        update = parts.journal.step(
            f"{key}/update", Update, lambda: _update(parts, limits, candidate, parent, retrained)
        )
        if update.problem:
            attempt = Attempt(
                candidate=candidate.id, outcome=Outcome.UPDATE_FAILED, reason=update.problem
            )
            return Result(candidate=candidate, attempt=attempt, evaluation=None, update=update)
    attempt = parts.journal.step(
        f"{key}/attempt", Attempt, lambda: _attempt(parts, limits, candidate)
    )
    if attempt.outcome is not Outcome.OK:
        return Result(candidate=candidate, attempt=attempt, evaluation=None, update=update)
    evaluation = parts.journal.step(
        f"{key}/evaluation",
        Evaluation,
        lambda: parts.verifier.verify(candidate.id, folder / "submission"),
    )
    return Result(candidate=candidate, attempt=attempt, evaluation=evaluation, update=update)


def _update(
    parts: Parts, limits: Limits, candidate: Candidate, parent: Candidate | None, retrained: int
) -> Update:
    proposal = candidate.proposal
    settings = {name: value for name, value in proposal.changes.items() if name != "recipe"}
    # Whenever it comes, a run's first update is the same: runs of one seed can share it.
    stream = f"weights/{retrained + 1}"
    if candidate.index > 0:
        stream += f"/{candidate.index}"
    out = parts.workspaces.policy(candidate)
    assert out is not None  # it names its own
    begun = parts.journal.elapsed_s
    update = parts.weights.update(
        candidate.id,
        recipe=proposal.changes["recipe"],
        settings=settings,
        parent=parts.workspaces.policy(parent) if parent else None,
        out=out,
        seed=seeds.stream_seed(parts.seed, stream),
        deadline_s=_deadline(parts, limits, limits.update_s),
    )
    # As if it had been made here; a run that has waited for it has paid already.
    parts.journal.charge(max(0.0, update.taken_s - (parts.journal.elapsed_s - begun)))
    if _spent(parts, limits):
        raise _time_is_over(limits)
    return update


def _attempt(parts: Parts, limits: Limits, candidate: Candidate) -> Attempt:
    deadline_s = _deadline(parts, limits, limits.attempt_s)
    attempt = parts.target.run(
        candidate.id,
        harness=parts.workspaces.harness(candidate),
        out=parts.workspaces.folder(candidate),
        deadline_s=deadline_s,
        policy=parts.workspaces.policy(candidate),
    )
    if attempt.outcome is Outcome.TIMEOUT and deadline_s < limits.attempt_s:
        raise _time_is_over(limits)
    return attempt


def _deadline(parts: Parts, limits: Limits, own_s: float) -> float:
    """Of a step: its own, or the end of the run's time where that comes first."""
    if limits.wall_s is None:
        return own_s
    return max(0.1, min(own_s, limits.wall_s - parts.journal.elapsed_s))


def _time_is_over(limits: Limits) -> BudgetExceeded:
    """Raised between steps, or in the middle of one, which then counts for nothing."""
    return BudgetExceeded(f"budget.wall_s={limits.wall_s:g} is used up")


def _reuse(candidate: Candidate, memory: _Memory, results: dict[str, Result]) -> Result:
    """The result of the earlier candidate with the same harness."""
    assert candidate.duplicate_of is not None
    known = {result.candidate.id: result for result in memory.results} | results
    evaluation = known[candidate.duplicate_of].evaluation
    attempt = Attempt(
        candidate=candidate.id,
        outcome=Outcome.DUPLICATE,
        reason=f"the harness of {candidate.duplicate_of}",
    )
    return Result(candidate=candidate, attempt=attempt, evaluation=evaluation)


def _close(
    metric: Metric,
    index: int,
    results: Sequence[Result],
    incumbent: Result | None,
    winner: Result | None,
) -> Generation:
    accepted = winner is not None and winner is not incumbent
    gain = None
    if (
        accepted
        and incumbent
        and incumbent.score is not None
        and winner
        and winner.score is not None
    ):
        gain = metric.gain(winner.score, incumbent.score)
    return Generation(
        index=index,
        candidates=tuple(result.candidate.id for result in results),
        incumbent=winner.candidate.id if winner else None,
        best_score=winner.score if winner else None,
        accepted=accepted,
        gain=gain,
    )


def _remember(
    parts: Parts, memory: _Memory, results: Sequence[Result], winner: Result | None
) -> None:
    for result in results:
        memory.results.append(result)
        memory.shown.append(parts.feedback.show(result))
        if result.candidate.harness_sha256 and result.candidate.duplicate_of is None:
            made_of = (result.candidate.harness_sha256, result.candidate.policy)
            memory.by_digest.setdefault(made_of, result)
        if result.update is not None:
            memory.updates.append(result.update)
    memory.incumbent = winner


def _spent(parts: Parts, limits: Limits) -> bool:
    return limits.wall_s is not None and parts.journal.elapsed_s >= limits.wall_s
