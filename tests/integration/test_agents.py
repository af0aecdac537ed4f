"""Real SDKs in a real sandbox, a real gateway, and an endpoint that speaks the vendors' formats."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile.stage import SANDBOXES, Remembering, why_not
from rehearsal.stage import LIMITS, Stage

from sia.errors import BudgetExceeded, MetaBackendError
from sia.gateway import Budget, ModelGateway, Provider, Role, Route
from sia.gateway.scripted import serving
from sia.meta.agent import AgentBackend
from sia.meta.agents import Agent, Claude, PydanticAI
from sia.meta.session import Sessions
from sia.records import Lever

AGENTS: dict[str, type[Agent]] = {"claude": Claude, "pydantic_ai": PydanticAI}
FORMATS = {"claude": "messages", "pydantic_ai": "chat"}
WROTE = "print('written by a model')"
EDITS = [
    {"when": {"text": "# Improve the harness", "turn": 0},
     "bash": f"echo \"{WROTE}\" > harness/target_agent.py && ls data"},
    {"when": {"last": "train.csv", "turn": 1},
     "bash": "printf '{\"hypothesis\": \"It writes.\"}' > proposal.json"},
    {"when": {"text": "# Improve the harness", "turn": 2}, "say": "Done."},
    {"when": {"text": "# Decide what comes next", "turn": 0},
     "bash": "printf '{\"lever\": \"stop\", \"hypothesis\": \"Enough.\"}' > decision.json"},
    {"when": {"text": "# Decide what comes next", "turn": 1}, "say": "Done."},
]  # fmt: skip


@pytest.fixture(params=list(AGENTS))
def kind(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(AGENTS[request.param].package) is None:
        pytest.skip(AGENTS[request.param].install)
    return request.param


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    if reason := why_not("bwrap"):
        pytest.skip(reason)
    return Stage(root=tmp_path / "one", sandbox=Remembering(SANDBOXES["bwrap"]()))


@contextmanager
def backend(
    stage: Stage,
    kind: str,
    url: str,
    *,
    max_turns: int = 10,
    budget: Budget | None = None,
    **gateway: Any,
) -> Iterator[AgentBackend]:
    provider = Provider(
        name="scripted", base_url=f"{url}/v1", anthropic_url=url, formats=(FORMATS[kind],)
    )
    route = Route(provider=provider, model="model-1")
    with ModelGateway(
        store=stage.run / "gateway.sqlite",
        routes={Role.META: route, Role.FEEDBACK: route},
        budget=budget,
        call_s=20,
        backoff_s=0.01,
        **gateway,
    ) as door:
        yield AgentBackend(
            sessions=Sessions(
                agent=AGENTS[kind](model="model-1", max_turns=max_turns, session_s=90),
                sandbox=stage.sandbox,
                gateway=door,
                data=stage.task.public_dir,
            ),
            task=stage.task,
            run=stage.run,
            attempt_s=20,
            limits=LIMITS,
            target_model=False,
        )


def played(stage: Stage, kind: str, rules: Sequence[dict[str, Any]], **options: Any) -> Any:
    """One proposal for generation 1, and what it made of the harness."""
    parent = stage.history[-1].candidate if stage.history else stage.scored()
    with serving(list(rules)) as server, backend(stage, kind, server.url, **options) as meta:
        request = stage.request(1, parent)
        return meta.propose(request), (request.workspace / "target_agent.py").read_text()


def test_an_agent_edits_and_decides(stage: Stage, kind: str) -> None:
    parent = stage.scored()
    with serving(EDITS) as server, backend(stage, kind, server.url) as meta:
        request = stage.request(1, parent)
        proposal = meta.propose(request)
        assert (request.workspace / "target_agent.py").read_text() == f"{WROTE}\n"
        assert (proposal.hypothesis, proposal.source) == ("It writes.", kind)
        assert proposal.evidence == ""  # it ended as it should
        decision = meta.decide(stage.question(0, parent))
        assert (decision.lever, decision.hypothesis) == (Lever.STOP, "Enough.")
    assert not stage.sandbox.alive()


def test_a_recorded_proposal_is_repeated_elsewhere_without_a_provider(
    stage: Stage, kind: str, tmp_path: Path
) -> None:
    first = played(stage, kind, EDITS)
    other = Stage(root=tmp_path / "another" / "and-deeper", sandbox=stage.sandbox)
    again = played(other, kind, [], mode="replay", recording=stage.run)
    assert again == first


def test_turns_end_a_session_and_what_it_wrote_is_used(stage: Stage, kind: str) -> None:
    forever = [EDITS[0], {"when": {"text": "# Improve"}, "bash": "true"}]
    proposal, harness = played(stage, kind, forever, max_turns=3)
    assert harness == f"{WROTE}\n"
    assert "the session ended: turns" in proposal.evidence


def test_a_provider_that_refuses_ends_the_run_with_its_words(stage: Stage, kind: str) -> None:
    refuses = [{"when": {"text": ""}, "fault": "status", "status": 401}]
    with pytest.raises(MetaBackendError, match=r"could not work, twice in a row: .*401"):
        played(stage, kind, refuses)


def test_a_spent_budget_ends_the_step(stage: Stage, kind: str) -> None:
    with pytest.raises(BudgetExceeded, match=r"budget\.requests=1"):
        played(stage, kind, EDITS, budget=Budget(requests=1))


def test_a_step_that_an_outage_ended_goes_on_when_it_is_over(stage: Stage, kind: str) -> None:
    down = [{"when": {"text": ""}, "fault": "status", "status": 403}]
    with pytest.raises(MetaBackendError, match="resume="):
        played(stage, kind, down)
    proposal, harness = played(stage, kind, EDITS)
    assert harness == f"{WROTE}\n"
    assert proposal.evidence == ""
