"""The embedded backend against a landscape whose answer is known."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sia.errors import BadProposal
from sia.feedback import Shown
from sia.meta import Question, Request
from sia.meta.optuna import EXHAUSTED, OptunaBackend, choose_recipe
from sia.records import Candidate, Choice, Decision, Lever, Outcome, Proposal, Update
from sia.tasks.task import Metric

UP = Metric(name="accuracy")
HARNESS = "a: 0.1\nb: x\nc: {use: false, depth: 1}\n"
SPACE = """\
knobs:
  a: {low: 0.0, high: 1.0, idea: A real number}
  b: {values: [x, y, z], idea: A name}
  c.use: {values: [false, true], idea: A switch}
  c.depth: {low: 1, high: 4, needs: {c.use: true}, idea: A depth}
moves:
  - {when: {symptom: absent, above: 0.0}, set: {b: z}, hypothesis: never, expect: nothing}
  - {when: {symptom: ill, above: 0.5}, set: {c.use: true, c.depth: 2}, hypothesis: h, expect: much}
"""


def landscape(knobs: dict[str, object]) -> float:
    """Best at a=0.7, b=y, c.use; at most 1."""
    assert isinstance(knobs["a"], float)
    return (
        1.0 - abs(knobs["a"] - 0.7) - 0.2 * (knobs["b"] != "y") - 0.2 * (knobs["c.use"] is not True)
    )


GO_ON = Decision(lever=Lever.HARNESS, hypothesis="")


def question(
    history: Sequence[Shown],
    *,
    levers: Sequence[Lever] = (Lever.HARNESS, Lever.STOP),
    recipes: Sequence[str] = (),
    updates: Sequence[Update] = (),
    references: bool = False,
) -> Question:
    return Question(
        generation=history[-1].candidate.generation,
        parent=None,
        folder=Path(),
        history=history,
        levers=levers,
        recipes=[Choice(name=name, needs="", when="") for name in recipes],
        updates=updates,
        references=references,
        state=Path(),
        metric=UP,
        seed=0,
    )


class Search:
    """Plays the loop around a backend: keep-best over the landscape."""

    def __init__(self, folder: Path, backend: OptunaBackend) -> None:
        self.folder = folder
        self.backend = backend
        self.history: list[Shown] = []
        self.reference = folder / "reference"
        self.reference.mkdir(parents=True, exist_ok=True)
        (self.reference / "harness.yaml").write_text(HARNESS)
        (self.reference / "space.yaml").write_text(SPACE)

    def incumbent(self) -> Shown | None:
        return max(self.history, key=lambda past: past.score or 0.0, default=None)

    def request(self, siblings: tuple[Proposal, ...] = ()) -> Request:
        generation, best = len(self.history), self.incumbent()
        workspace = self.folder / f"gen-{generation}"
        shutil.rmtree(workspace, ignore_errors=True)
        source = self.folder / f"gen-{best.candidate.generation}" if best else self.reference
        shutil.copytree(source, workspace)
        return Request(
            generation=generation,
            index=len(siblings),
            decision=GO_ON,
            workspace=workspace,
            parent=best.candidate if best else None,
            history=tuple(self.history),
            siblings=siblings,
            state=self.folder / "meta",
            metric=UP,
            seed=1000 + generation,
        )

    def turn(self) -> Proposal:
        proposal = self.backend.propose(self.request())
        generation = len(self.history)
        candidate = Candidate(
            id=f"g{generation:03}-c0",
            generation=generation,
            index=0,
            parent=None,
            proposal=proposal,
        )
        self.history.append(
            Shown(
                candidate=candidate,
                outcome=Outcome.OK,
                reason="",
                score=landscape(proposal.knobs),
                symptoms={"ill": 0.9 if not proposal.knobs["c.use"] else 0.0},
            )
        )
        return proposal


def test_the_first_proposal_is_the_reference_unchanged(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend())
    proposal = search.turn()
    assert proposal.source == "reference"
    assert proposal.knobs == {"a": 0.1, "b": "x", "c.use": False, "c.depth": 1}
    assert (tmp_path / "gen-0" / "harness.yaml").read_text() == HARNESS


def test_a_symptom_brings_its_move_once_and_states_the_evidence(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend())
    search.turn()
    proposal = search.turn()
    assert proposal.source == "move:1"
    assert proposal.changes == {"c.use": True, "c.depth": 2}
    assert proposal.evidence.startswith("ill = 0.900 (> 0.5)")
    assert proposal.expected_effect == "much"
    assert [search.turn().source for _ in range(5)] == ["tpe"] * 5


def test_moves_that_were_refused_alone_are_tried_together_once(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend())
    (search.reference / "space.yaml").write_text(
        SPACE.split("moves:")[0]
        + "moves:\n"
        + "  - {set: {a: 0.0}, hypothesis: One., expect: p}\n"
        + "  - {set: {b: z, c.use: false}, hypothesis: Two., expect: q}\n"
        + "  - {set: {b: y}, hypothesis: Three., expect: r}\n"
    )
    search.turn()
    assert [search.turn().source for _ in range(3)] == ["move:0", "move:1", "move:2"]
    together = search.turn()
    assert together.source == "moves:together"
    assert together.changes == {"a": 0.0, "b": "z"}
    assert together.hypothesis.endswith("One. Two.")
    assert [search.turn().source for _ in range(3)] == ["tpe"] * 3


def test_without_moves_every_proposal_is_a_trial(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend(use_moves=False))
    search.turn()
    assert search.turn().source == "tpe"


def test_the_optimum_is_approached_and_nothing_is_proposed_twice(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend())
    for _ in range(40):
        search.turn()
    seen = [repr(sorted(past.candidate.proposal.knobs.items())) for past in search.history]
    assert len(set(seen)) == len(seen)
    best = search.incumbent()
    assert best is not None
    assert best.score is not None
    assert best.score > 0.9
    assert best.candidate.proposal.knobs["b"] == "y"


def test_a_resumed_backend_proposes_what_the_unbroken_one_proposed(tmp_path: Path) -> None:
    unbroken = Search(tmp_path / "unbroken", OptunaBackend())
    resumed = Search(tmp_path / "resumed", OptunaBackend())
    for _ in range(12):
        expected = unbroken.turn()
        resumed.backend = OptunaBackend()
        assert resumed.turn() == expected


def test_the_study_in_the_run_directory_holds_every_scored_candidate(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend())
    for _ in range(6):
        search.turn()
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "meta" / "study.log")))
    study = optuna.load_study(study_name="harness", storage=storage)
    told = {trial.user_attrs["candidate"]: trial.value for trial in study.trials}
    assert told == {past.candidate.id: past.score for past in search.history[:5]}


def test_a_lock_left_by_a_kill_holds_nobody_up(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend(use_moves=False))
    search.turn()
    lock = tmp_path / "meta" / "study.log.lock"
    lock.parent.mkdir()
    lock.symlink_to(tmp_path / "meta" / "study.log")
    before = time.monotonic()
    search.turn()
    assert time.monotonic() - before < 20  # Optuna itself waits 30 s
    assert not lock.is_symlink()


def test_an_exhausted_space_is_a_bad_proposal_and_then_a_stop(tmp_path: Path) -> None:
    search = Search(tmp_path, OptunaBackend())
    (search.reference / "harness.yaml").write_text("b: x\n")
    (search.reference / "space.yaml").write_text("knobs: {b: {values: [x, y], idea: i}}")
    backend = search.backend
    first = backend.propose(search.request())
    candidate = Candidate(id="g000-c0", generation=0, index=0, parent=None, proposal=first)
    search.history.append(Shown(candidate=candidate, outcome=Outcome.OK, reason="", score=0.5))
    second = backend.propose(search.request())
    assert second.changes == {"b": "y"}
    with pytest.raises(BadProposal, match=EXHAUSTED):
        backend.propose(search.request(siblings=(second,)))
    failed = Shown(candidate=candidate, outcome=Outcome.BAD_PROPOSAL, reason=EXHAUSTED, score=None)
    assert backend.decide(question([*search.history, failed])).lever is Lever.STOP


def test_what_is_exhausted_is_the_neighbourhood_of_one_parent() -> None:
    """A search may go on from another one, from where something is left to try."""
    history = scored([0.5, 0.4])
    parents = [past.candidate for past in history]
    failed = Candidate(
        id="g002-c0", generation=2, index=0, parent="g001-c0", proposal=Proposal(hypothesis="")
    )
    history.append(
        Shown(candidate=failed, outcome=Outcome.BAD_PROPOSAL, reason=EXHAUSTED, score=None)
    )
    levers = [
        OptunaBackend().decide(replace(question(history), parent=parent)).lever
        for parent in parents
    ]
    assert levers == [Lever.HARNESS, Lever.STOP]


def scored(scores: Sequence[float]) -> list[Shown]:
    return [
        Shown(
            candidate=Candidate(
                id=f"g{generation:03}-c0",
                generation=generation,
                index=0,
                parent=None,
                proposal=Proposal(hypothesis=""),
            ),
            outcome=Outcome.OK,
            reason="",
            score=score,
        )
        for generation, score in enumerate(scores)
    ]


def test_the_plateau_rule_counts_generations_without_a_gain() -> None:
    history = scored([0.5, 0.6, 0.6, 0.55, 0.6])
    backend = OptunaBackend(patience=3)
    assert backend.decide(question(history[:4])).lever is Lever.HARNESS
    stop = backend.decide(question(history))
    assert stop.lever is Lever.STOP
    assert stop.evidence == "3 generations without a gain of 0 over g001-c0."
    picky = OptunaBackend(patience=4, min_gain=0.2)
    assert picky.decide(question(history)).lever is Lever.STOP


ALL = (Lever.HARNESS, Lever.WEIGHTS, Lever.STOP)
MENU = ("sft", "best_of_n", "grpo")


def test_the_weights_are_updated_when_the_harness_has_stopped_to_pay() -> None:
    history = scored([0.5, 0.6, 0.6, 0.55])
    backend = OptunaBackend(patience=5, weights_after=2)
    asked = dict(levers=ALL, recipes=MENU, references=True)
    assert backend.decide(question(history[:3], **asked)).lever is Lever.HARNESS
    update = backend.decide(question(history, **asked))
    assert (update.lever, update.recipe) == (Lever.WEIGHTS, "sft")
    assert "2 generations without a gain over g001-c0" in update.evidence
    made = [Update(candidate="g004-c0", recipe="sft")]
    assert backend.decide(question(history, **asked, updates=made)).lever is Lever.HARNESS


def test_without_the_harness_lever_the_weights_are_updated_at_once() -> None:
    backend = OptunaBackend(max_updates=2)
    asked = dict(levers=(Lever.WEIGHTS, Lever.STOP), recipes=MENU)
    assert backend.decide(question(scored([0.5]), **asked)).lever is Lever.WEIGHTS
    made = [Update(candidate=f"g00{k}-c0", recipe="grpo") for k in (1, 2)]
    stop = backend.decide(question(scored([0.5, 0.6, 0.6]), **asked, updates=made))
    assert stop.lever is Lever.STOP
    assert stop.hypothesis == "The updates that were allowed are made."


@pytest.mark.parametrize(
    ("references", "updates", "recipe"),
    [
        (True, [], "sft"),
        (True, [Update(candidate="c", recipe="sft", problem="disk")], "sft"),
        (True, [Update(candidate="c", recipe="sft")], "grpo"),
        (False, [], "grpo"),
        (False, [Update(candidate="c", recipe="grpo", report={"reward_after": 0.0})], "best_of_n"),
        (False, [Update(candidate="c", recipe="grpo", report={"silent_share": 0.95})], "best_of_n"),
        (False, [Update(candidate="c", recipe="grpo", report={"silent_share": 0.5})], "grpo"),
    ],
)
def test_the_recipe_follows_from_what_was_observed(
    references: bool, updates: Sequence[Update], recipe: str
) -> None:
    asked = question(
        scored([0.5]), levers=ALL, recipes=MENU, updates=updates, references=references
    )
    assert choose_recipe(asked)[0] == recipe


def test_a_menu_of_one_recipe_leaves_no_choice() -> None:
    asked = question(scored([0.5]), levers=ALL, recipes=["dpo"], references=True)
    assert choose_recipe(asked) == ("dpo", "of dpo it is the first on the menu")
