import io
from collections.abc import Callable

from rich.console import Console

from sia.gateway.protocol import Role, Spend
from sia.loop import Closed, Proposed, Scored, Started
from sia.progress import Progress
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
)
from sia.tasks.task import Metric


class Clock:
    elapsed_s = 12.5


def play(console: Console, *, spent: Callable[[], dict[Role, Spend]] | None = None) -> None:
    candidate = Candidate(
        id="g000-c0",
        generation=0,
        index=0,
        parent=None,
        proposal=Proposal(hypothesis="h", source="reference", changes={"a": 1}),
    )
    result = Result(
        candidate=candidate,
        attempt=Attempt(candidate="g000-c0", outcome=Outcome.OK),
        evaluation=Evaluation(candidate="g000-c0", split="dev", score=0.75),
    )
    crashed = Result(
        candidate=candidate,
        attempt=Attempt(
            candidate="g001-c0", outcome=Outcome.CRASHED, reason="exit code 1: \x1b[2J[bold]boo"
        ),
        evaluation=None,
    )
    closed = Generation(
        index=0, candidates=("g000-c0",), incumbent="g000-c0", best_score=0.75, accepted=True
    )
    view = Progress(
        console,
        metric=Metric(name="accuracy"),
        generations=3,
        wall_s=60.0,
        clock=Clock(),
        spent=spent,
    )
    with view:
        decision = Decision(lever=Lever.HARNESS, hypothesis="h")
        view.update(Started(generation=0, decision=decision, parents=()))
        view.update(Proposed(candidate=candidate))
        view.update(Scored(result=result))
        view.update(Closed(generation=closed, incumbent=result))
        view.update(Scored(result=crashed))
        view.update(Ending(reason="stop", detail="plateau"))


def test_without_a_terminal_there_are_plain_lines() -> None:
    file = io.StringIO()
    play(Console(file=file, force_terminal=False))
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("[   12.5 s] generation 0  lever=harness")
    assert "accuracy/dev=0.7500  incumbent=-  new best  a=1" in lines[1]
    assert "incumbent=0.7500  failed" in lines[2]
    assert lines[-1].endswith("ended  plateau")
    assert "spent" not in file.getvalue()


def test_what_model_calls_have_cost_runs_along() -> None:
    def spent() -> dict[Role, Spend]:
        return {Role.META: Spend(calls=1, input_tokens=1_200, cost_usd=0.25)}

    file = io.StringIO()
    play(Console(file=file, force_terminal=False), spent=spent)
    (line,) = [line for line in file.getvalue().splitlines() if "spent" in line]
    assert line.endswith("generation 0  spent so far $0.2500, 1.2k tokens")
    file = io.StringIO()
    play(Console(file=file, force_terminal=True, width=200), spent=spent)
    assert "$0.2500, 1.2k tokens" in file.getvalue()


def test_a_terminal_keeps_the_table_and_a_target_cannot_steer_it() -> None:
    file = io.StringIO()
    play(Console(file=file, force_terminal=True, width=160))
    text = file.getvalue()
    assert "g000-c0" in text
    assert "new best" in text
    assert "\x1b[2J" not in text
    assert "[bold]boo" in text
