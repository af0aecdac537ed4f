"""The embedded backend: a real optimiser over the space that the reference harness declares.

It needs no language model and imitates none. Every proposal is one of three kinds:

1. a *move*: an expert's answer to a symptom that the evaluation of the parent shows, declared in
   `space.yaml`, tried in the order given and at most once each;
2. the refused moves *together*, once, when no single one is left: steps that lose alone may pay
   together, and keeping the best of single steps would never find that out;
3. a *trial*: a few knobs of the parent turned to values that Optuna's tree-structured Parzen
   estimator suggests from all scored candidates.

The parent need not be the incumbent; a move that was used and that it lacks counts as refused.

A configuration that was tried before is recognised and never proposed again. The plateau rule:
stop when the last `patience` generations brought no gain of at least `min_gain` over the best
before them, or when the space around the parent that comes next is exhausted.

The study is told every scored candidate and lies in the run directory (`meta/study.log`, Optuna's
journal format). It is rebuilt from the records when a run is resumed, so that what is proposed is a
function of the records and the seed alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sia.errors import BadProposal
from sia.feedback import Shown
from sia.meta.knobs import Knob, Knobs, Space, load_space, read_knobs, settle, write_knobs
from sia.meta.protocol import Question, Request
from sia.records import Decision, Lever, Proposal
from sia.tasks.task import Metric

if TYPE_CHECKING:
    import optuna

MAX_ASKS = 200
MOSTLY_SILENT = 0.9  # share of groups whose rewards are all equal
TOGETHER = "moves:together"
EXHAUSTED = "every configuration within reach has been tried"


class OptunaBackend:
    """Moves first, then trials; see the module's docstring."""

    def __init__(
        self,
        *,
        patience: int = 8,
        min_gain: float = 0.0,
        knobs_per_trial: int = 3,
        startup_trials: int = 4,
        use_moves: bool = True,
        weights_after: int = 3,
        max_updates: int = 1,
    ) -> None:
        """Sets the rules.

        Args:
            patience: Generations without a gain before the run stops.
            min_gain: What counts as a gain, in units of the metric.
            knobs_per_trial: At most so many knobs are turned at once.
            startup_trials: Scored candidates below which values are drawn at random.
            use_moves: False leaves the moves out: the arm that tells what they are worth.
            weights_after: Generations without a gain before the weights are updated.
            max_updates: Of the weights, in one run.
        """
        self._patience = patience
        self._min_gain = min_gain
        self._knobs_per_trial = knobs_per_trial
        self._startup_trials = startup_trials
        self._use_moves = use_moves
        self._weights_after = weights_after
        self._max_updates = max_updates
        self._study: optuna.Study | None = None
        self._told: set[str] = set()

    def propose(self, request: Request) -> Proposal:
        """Turns knobs in the workspace's `harness.yaml`.

        Raises:
            BadProposal: Every configuration within reach has been tried.
        """
        space = load_space(request.workspace)
        base = read_knobs(request.workspace, space)
        if request.generation == 0:
            return Proposal(
                hypothesis="What a sensible newcomer writes first; gains are measured from here.",
                source="reference",
                knobs=base,
            )
        proposal = (
            self._move(request, space, base)
            or self._together(request, space, base)
            or self._trial(request, space, base)
        )
        write_knobs(request.workspace, proposal.changes)
        return proposal

    def decide(self, question: Question) -> Decision:
        """Applies the plateau rule."""
        history = question.history
        last, parent = history[-1], question.parent.id if question.parent else None
        exhausted = last.reason == EXHAUSTED and last.candidate.parent == parent
        best, since = _plateau(history, question.metric, self._min_gain)
        if update := self._update(question, best, since, exhausted=exhausted):
            return update
        if Lever.HARNESS not in question.levers:
            return Decision(lever=Lever.STOP, hypothesis="The updates that were allowed are made.")
        if exhausted:
            return Decision(lever=Lever.STOP, hypothesis=f"Nothing is left to try: {EXHAUSTED}.")
        if since >= self._patience:
            return Decision(
                lever=Lever.STOP,
                hypothesis="The search is on a plateau; more of the same would fit the dev items.",
                evidence=f"{since} generations without a gain of {self._min_gain:g} over {best}.",
            )
        return Decision(
            lever=Lever.HARNESS,
            hypothesis="The harness still has knobs that may pay.",
            evidence=f"{since} of {self._patience} generations without a gain.",
        )

    def _update(
        self, question: Question, best: str, since: int, *, exhausted: bool
    ) -> Decision | None:
        """Pulls the weights lever where the harness has stopped to pay, or is not to be touched."""
        waiting = Lever.HARNESS in question.levers and not exhausted
        if Lever.WEIGHTS not in question.levers or len(question.updates) >= self._max_updates:
            return None
        if waiting and since < self._weights_after:
            return None
        recipe, evidence = choose_recipe(question)
        return Decision(
            lever=Lever.WEIGHTS,
            recipe=recipe,
            hypothesis="What the harness cannot express, the policy may learn.",
            evidence=f"{since} generations without a gain over {best}; {evidence}",
            expected_effect="Items are won that no knob reached.",
        )

    def _move(self, request: Request, space: Space, base: Knobs) -> Proposal | None:
        if not self._use_moves:
            return None
        shown = _shown(request)
        symptoms = shown.symptoms if shown else {}
        used = {proposal.source for proposal in _made(request)}
        tried = _tried(request, space)
        for number, move in enumerate(space.moves):
            source = f"move:{number}"
            if source in used or not move.when.holds(symptoms):
                continue
            knobs = settle(space, {**base, **move.set}, base)
            if _key(knobs) in tried:
                continue
            return Proposal(
                hypothesis=move.hypothesis.strip(),
                evidence=move.when.describe(symptoms) + _worst(shown),
                expected_effect=move.expect,
                source=source,
                changes=_changes(base, knobs),
                knobs=knobs,
            )
        return None

    def _together(self, request: Request, space: Space, base: Knobs) -> Proposal | None:
        """All moves that were tried and refused, as one step."""
        used = {proposal.source for proposal in _made(request)}
        refused = {
            f"move:{number}": move
            for number, move in enumerate(space.moves)
            if f"move:{number}" in used and any(base[k] != value for k, value in move.set.items())
        }
        if not self._use_moves or TOGETHER in used or len(refused) < 2:
            return None
        knobs = dict(base)
        for move in refused.values():
            knobs |= move.set
        knobs = settle(space, knobs, base)
        if _key(knobs) in _tried(request, space):
            return None
        return Proposal(
            hypothesis="Moves that lost one by one may pay together: "
            + " ".join(move.hypothesis.strip() for move in refused.values()),
            evidence=f"refused alone: {', '.join(refused)}{_worst(_shown(request))}",
            expected_effect="; ".join(f"{name}: {move.expect}" for name, move in refused.items()),
            source=TOGETHER,
            changes=_changes(base, knobs),
            knobs=knobs,
        )

    def _trial(self, request: Request, space: Space, base: Knobs) -> Proposal:
        study = self._study_to_ask(request, space)
        rng = np.random.default_rng(request.seed)
        tried = _tried(request, space)
        for _ in range(MAX_ASKS):
            knobs = self._ask(study, space, base, rng)
            if _key(knobs) not in tried:
                break
        else:
            raise BadProposal(EXHAUSTED)
        changes = _changes(base, knobs)
        ideas = [space.knobs[name].idea for name in changes]
        return Proposal(
            hypothesis=" ".join(idea.strip().rstrip(".") + "." for idea in ideas),
            evidence=f"{len(self._told)} scored candidates{_worst(_shown(request))}",
            expected_effect=_expected(changes, request.history),
            source="tpe",
            changes=changes,
            knobs=knobs,
        )

    def _ask(
        self,
        study: "optuna.Study",
        space: Space,
        base: Knobs,
        rng: np.random.Generator,
    ) -> Knobs:
        """The parent with a few active knobs set to what the sampler suggests."""
        names = [name for name, knob in space.knobs.items() if knob.active(base)]
        turned = rng.permutation(len(names))[: int(rng.integers(1, self._knobs_per_trial + 1))]
        queue = [names[i] for i in sorted(turned)]
        trial = study.ask()
        knobs = dict(base)
        while queue:
            name = queue.pop(0)
            before = {other for other, knob in space.knobs.items() if knob.active(knobs)}
            knob = space.knobs[name]
            knobs[name] = _rounded(knob, _suggest(trial, name, knob))
            # A knob that has just been switched on brings its own settings with it.
            queue += [
                other
                for other, knob in space.knobs.items()
                if name in knob.needs and other not in before and knob.active(knobs)
            ]
        return settle(space, knobs, base)

    def _study_to_ask(self, request: Request, space: Space) -> "optuna.Study":
        """A study in memory with all that was told, and a sampler with this proposal's seed.

        Asking the one in the run directory would leave open trials there, and a kill between
        asking and scoring would change what comes after it.
        """
        import optuna

        told = self._tell(request, space)
        sampler = optuna.samplers.TPESampler(
            seed=request.seed, n_startup_trials=self._startup_trials
        )
        study = optuna.create_study(sampler=sampler, direction=told.direction)
        study.add_trials(told.get_trials(deepcopy=False))
        return study

    def _tell(self, request: Request, space: Space) -> "optuna.Study":
        """The study with every scored candidate of the history told."""
        import optuna
        from optuna.trial import create_trial

        if self._study is None:
            self._study = _open_study(request.state, request.metric)
        for past in request.history:
            knobs = past.candidate.proposal.knobs
            if past.score is None or past.candidate.id in self._told or not knobs:
                continue
            known = {name: value for name, value in knobs.items() if name in space.knobs}
            self._study.add_trial(
                create_trial(
                    state=optuna.trial.TrialState.COMPLETE,
                    value=past.score,
                    params=known,
                    distributions={name: _distribution(space.knobs[name]) for name in known},
                    user_attrs={"candidate": past.candidate.id},
                )
            )
            self._told.add(past.candidate.id)
        return self._study


def _open_study(state: Path, metric: Metric) -> "optuna.Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    state.mkdir(parents=True, exist_ok=True)
    log = state / "study.log"
    log.unlink(missing_ok=True)
    # Optuna locks with a link beside the log; one left by a kill would hold us up for 30 s. The run
    # directory is ours alone.
    log.with_name("study.log.lock").unlink(missing_ok=True)
    return optuna.create_study(
        study_name="harness",
        storage=JournalStorage(JournalFileBackend(str(log))),
        direction=StudyDirection[metric.direction.upper()],
    )


def _distribution(knob: Knob) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if knob.values:
        return CategoricalDistribution(knob.values)
    assert knob.low is not None
    assert knob.high is not None
    if isinstance(knob.low, int) and isinstance(knob.high, int):
        return IntDistribution(knob.low, knob.high, log=knob.log)
    return FloatDistribution(knob.low, knob.high, log=knob.log)


def _suggest(trial: "optuna.Trial", name: str, knob: Knob) -> Any:
    if knob.values:
        return trial.suggest_categorical(name, knob.values)
    assert knob.low is not None
    assert knob.high is not None
    if isinstance(knob.low, int) and isinstance(knob.high, int):
        return trial.suggest_int(name, knob.low, knob.high, log=knob.log)
    return trial.suggest_float(name, knob.low, knob.high, log=knob.log)


def _rounded(knob: Knob, value: Any) -> Any:
    """Three significant digits are enough, and keep `harness.yaml` readable."""
    if not isinstance(value, float) or knob.values or knob.low is None or knob.high is None:
        return value
    return min(max(float(f"{value:.3g}"), float(knob.low)), float(knob.high))


def _shown(request: Request) -> Shown | None:
    """The parent as it was shown."""
    if request.parent is None:
        return None
    wanted = request.parent.id
    return next((past for past in request.history if past.candidate.id == wanted), None)


def _tried(request: Request, space: Space) -> set[str]:
    known = space.knobs.keys()
    return {_key(made.knobs) for made in _made(request) if made.knobs.keys() == known}


def _made(request: Request) -> list[Proposal]:
    """All proposals before this one, those of the same generation included."""
    return [*(past.candidate.proposal for past in request.history), *request.siblings]


def _key(knobs: Mapping[str, Any]) -> str:
    return repr(sorted(knobs.items()))


def _changes(base: Mapping[str, Any], knobs: Mapping[str, Any]) -> Knobs:
    return {name: value for name, value in knobs.items() if value != base[name]}


def _worst(shown: Shown | None) -> str:
    """The most frequent confusion of the parent, if the feedback shows it."""
    confusions = shown.breakdown.get("confusions") if shown else None
    if not confusions:
        return ""
    true, answered, count = confusions[0]
    return f"; most frequent confusion: {true} answered as {answered}, {count} times"


def _expected(changes: Mapping[str, Any], history: Sequence[Shown]) -> str:
    """How candidates that had these values fared so far beside those that had not."""
    parts = []
    for name, value in changes.items():
        scored = [past for past in history if past.score is not None]
        having = [past.score for past in scored if past.candidate.proposal.knobs.get(name) == value]
        others = [past.score for past in scored if past.candidate.proposal.knobs.get(name) != value]
        if having and others:
            difference = np.mean(np.array(having)) - np.mean(np.array(others))
            parts.append(f"{name}={value!r}: {difference:+.4f} in {len(having)} earlier candidates")
        else:
            parts.append(f"{name}={value!r}: no earlier candidate had it")
    return "; ".join(parts)


def choose_recipe(question: Question) -> tuple[str, str]:
    """The recipe for what was observed, and the observation.

    References first, as long as no update has used them; then what the last update saw of rewards:
    none at all asks for the best of many answers, a group that always agrees too; else the standing
    of an answer in its group says enough.
    """
    offered = [choice.name for choice in question.recipes]
    done = {update.recipe for update in question.updates if not update.problem}
    seen = question.updates[-1].report if question.updates else {}
    wanted = []
    if question.references and "sft" not in done:
        wanted.append(("sft", "train items come with their answers"))
    if seen.get("reward_after") == 0.0 or seen.get("silent_share", 0.0) > MOSTLY_SILENT:
        wanted.append(("best_of_n", "almost no group of answers had any spread of reward"))
    wanted.append(("grpo", "rewards differ inside the groups of answers"))
    for name, observed in wanted:
        if name in offered:
            return name, observed
    return offered[0], f"of {', '.join(offered)} it is the first on the menu"


def _plateau(history: Sequence[Shown], metric: Metric, min_gain: float) -> tuple[str, int]:
    """The candidate that brought the last gain, and how many generations ago that was."""
    best: Shown | None = None
    for past in history:
        if past.score is None:
            continue
        if (
            best is None
            or best.score is None
            or (
                metric.better(past.score, best.score)
                and (metric.gain(past.score, best.score) >= min_gain)
            )
        ):
            best = past
    latest = history[-1].candidate.generation
    if best is None:
        return "nothing", latest + 1
    return best.candidate.id, latest - best.candidate.generation
