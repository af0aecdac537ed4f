"""Model calls in MLflow: traces and costs from a real recording, on a real SQLite database."""

import json
import shutil
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sia.gateway.protocol import Role
from sia.gateway.scripted import formats
from sia.gateway.scripted.rules import Reply
from sia.gateway.store import STORE_FILE, Exchange, Store
from sia.records import Candidate, Decision, Ending, Generation, Lever, Proposal, RunResult
from sia.rundir import RunDir, RunInfo
from sia.tracking.__main__ import main
from sia.tracking.calls import MAX_SPANS

# MLflow 3.17 calls what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NOW = 1_767_323_045.0  # when the run was created


@pytest.fixture
def database(fresh_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Path(shutil.copy(fresh_database, tmp_path / "mlflow.db"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    info = RunInfo(
        run_id="run-1",
        task="toy",
        task_version=1,
        meta="claude",
        target="model",
        seed=0,
        config_sha256="",
        created_at="2026-01-02T03:04:05+00:00",
        protocol=1,
    )
    return RunDir.create(tmp_path / "run", info, "seed: 0\n")


class Calls:
    """Writes calls as the gateway does."""

    def __init__(self, run: RunDir) -> None:
        self.store = Store(run.path / STORE_FILE, mode="record", now=NOW)
        self.made = 0

    def make(
        self,
        scope: str,
        role: Role = Role.META,
        *,
        wire: str = "messages",
        stream: bool = True,
        failure: str = "",
        source: str = "",
        cost_usd: float | None = 0.25,
        counted: bool = True,
        say: str = "It is done.",
    ) -> None:
        self.made += 1
        body: dict[str, Any] = {"model": "m-1", "messages": [{"role": "user", "content": "Do it"}]}
        reply = Reply(text=say, calls=(), input_tokens=100, output_tokens=10, cached_tokens=40)
        answer = (
            b"".join(formats.stream(wire, body, reply, "id"))
            if stream
            else json.dumps(formats.whole(wire, body, reply, "id")).encode()
        )
        self.store.add(
            exchange(
                body, b"" if failure else answer, session=self.store.session, scope=scope,
                role=role, format=wire, failure=failure, stream=stream, source=source,
                cost_usd=cost_usd, counted=counted, started_at=NOW + self.made,
            )
        )  # fmt: skip


def exchange(body: object, answer: bytes, **given: Any) -> Exchange:
    """An exchange with what is the same in all of them here."""
    same = {
        "id": 0, "provider": "scripted", "requested_model": "m", "model": "m-1",
        "served_model": "m-1-20260101", "key": "k", "exact": "e", "occurrence": 0,
        "status": 502 if given["failure"] else 200, "headers": {}, "finish": "end_turn",
        "input_tokens": 100, "cached_tokens": 40, "cache_write_tokens": 0, "output_tokens": 10,
        "estimated": False, "attempts": 1, "wall_s": 0.5,
        "request_zlib": zlib.compress(json.dumps(body).encode()),
        "body_zlib": zlib.compress(answer),
    }  # fmt: skip
    return Exchange(**{**same, **given})


def close_generation(run: RunDir, index: int, *, decide: bool = True) -> None:
    step = run.journal.step
    name = f"g{index:03}-c0"
    candidate = Candidate(
        id=name, generation=index, index=0, parent=None, proposal=Proposal(hypothesis="")
    )
    closed = Generation(
        index=index, candidates=(name,), incumbent=None, best_score=None, accepted=False
    )
    step(f"{index:04}/0/candidate", Candidate, lambda: candidate)
    step(f"{index:04}/generation", Generation, lambda: closed)
    if decide:
        decision = Decision(lever=Lever.HARNESS, hypothesis="")
        step(f"{index:04}/decision", Decision, lambda: decision)


def finish(run: RunDir, status: str = "finished") -> None:
    run.journal.step("ending", Ending, lambda: Ending(reason="generations"))
    run.finish(RunResult(status=status, reason="generations"))
    run.close()


def sync(database: Path, run: RunDir) -> None:
    assert main(["sync", "--uri", f"sqlite:///{database}", str(run.path)]) == 0


def traces(database: Path) -> dict[str, Any]:
    """All traces by name, read with MLflow's own client."""
    from mlflow import MlflowClient

    from sia.tracking.location import locate
    from sia.tracking.mlflow import connected

    location = locate(uri=f"sqlite:///{database}")
    with connected(location):
        client = MlflowClient(tracking_uri=location.uri)
        experiment = client.get_experiment_by_name("sia/toy")
        assert experiment is not None
        found = client.search_traces(locations=[experiment.experiment_id], max_results=500)
        names = {
            r.info.run_id: r.info.run_name for r in client.search_runs([experiment.experiment_id])
        }
    named = {trace.info.tags["mlflow.traceName"]: trace for trace in found}
    assert len(named) == len(found), "two traces stand for one thing"
    for trace in found:
        trace.run = names[trace.info.trace_metadata["mlflow.sourceRun"]]
    return named


def contents(database: Path) -> list[Any]:
    """All that says something about calls, without the ids that MLflow draws."""
    with closing(sqlite3.connect(database)) as db:
        names = dict(db.execute("SELECT run_uuid, name FROM runs"))
        spans = db.execute("SELECT trace_id, span_id, content FROM spans ORDER BY 1, 2").fetchall()
        infos = db.execute(
            "SELECT request_id, timestamp_ms, execution_time_ms, status, request_preview,"
            " response_preview FROM trace_info ORDER BY 1"
        ).fetchall()
        tags = [
            row
            for row in db.execute("SELECT request_id, key, value FROM trace_tags ORDER BY 1, 2")
            if row[1] != "mlflow.artifactLocation"
        ]
        about = [
            (trace, key, names.get(value, value))
            for trace, key, value in db.execute(
                "SELECT request_id, key, value FROM trace_request_metadata ORDER BY 1, 2"
            )
        ]
        metrics = sorted(
            (names[run], key, step, value, moment)
            for run, key, step, value, moment in db.execute(
                "SELECT run_uuid, key, step, value, timestamp FROM metrics"
            )
        )
    return [spans, infos, tags, about, metrics]


def metrics(database: Path, name: str) -> dict[tuple[str, int], float]:
    with closing(sqlite3.connect(database)) as db:
        rows = db.execute(
            "SELECT key, step, value FROM metrics JOIN runs USING (run_uuid) WHERE name = ?", [name]
        )
        return {(key, step): value for key, step, value in rows}


PARENT = "toy-claude-model-s0"


def test_each_session_becomes_a_trace_of_its_generation(database: Path, run: RunDir) -> None:
    calls = Calls(run)
    calls.make("g000-c0/meta", say="First I look.")
    calls.make("g000-c0/meta", say="Then I write.")
    calls.make("g000-c0/target", Role.TARGET, wire="chat", stream=False)
    calls.make("g000-c0/target", Role.TARGET, wire="embeddings", stream=False)
    close_generation(run, 0)
    calls.make("g000/decision", Role.FEEDBACK, wire="responses")
    close_generation(run, 1, decide=False)
    finish(run)
    sync(database, run)

    found = traces(database)
    assert {name: trace.run for name, trace in found.items()} == {
        "g000-c0/meta": "gen-000",
        "g000-c0/target": "gen-000",
        "g000/decision": "gen-001",  # it led there
    }
    session = found["g000-c0/meta"]
    assert session.info.state == "OK"
    assert session.info.request_time == round(1000 * (NOW + 1))
    assert session.info.execution_duration == 1500
    assert session.info.request_preview == "Do it"
    assert session.info.response_preview == "Then I write."
    assert session.info.token_usage["total_tokens"] == 220
    assert session.info.cost["total_cost"] == pytest.approx(0.5)
    wanted = {
        "sia.run_id": "run-1", "sia.role": "meta", "sia.generation": "0", "sia.calls": "2",
        "sia.candidate": "g000-c0", "sia.scope": "g000-c0/meta",
    }  # fmt: skip
    assert wanted.items() <= session.info.tags.items()
    root, first, second = session.data.spans
    assert (root.parent_id, first.parent_id, second.parent_id) == (None, *[root.span_id] * 2)
    assert root.span_type == "AGENT"
    assert first.span_type == "CHAT_MODEL"
    assert first.start_time_ns == round(1e9 * (NOW + 1))
    assert first.end_time_ns == round(1e9 * (NOW + 1.5))
    assert first.inputs["messages"] == [{"role": "user", "content": "Do it"}]
    assert first.outputs["choices"][0]["message"]["content"] == "First I look."
    assert first.model_name == "m-1-20260101"
    assert first.llm_cost == {"total_cost": 0.25}
    usage = first.get_attribute("mlflow.chat.tokenUsage")
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (100, 40)
    kinds = [span.span_type for span in found["g000-c0/target"].data.spans]
    assert kinds == ["TASK", "CHAT_MODEL", "EMBEDDING"]


def test_tokens_and_cost_are_metrics_of_generations_and_of_the_run(
    database: Path, run: RunDir
) -> None:
    calls = Calls(run)
    calls.make("g000-c0/meta", cost_usd=1.0)
    calls.make("g000-c0/target", Role.TARGET, cost_usd=None)
    close_generation(run, 0)
    calls.make("g000/decision", Role.FEEDBACK, cost_usd=2.0)
    calls.make("g001-c0/target", Role.TARGET, cost_usd=4.0)
    calls.make("g001-c0/target", Role.TARGET, cost_usd=0.0, failure="the stream was cut off")
    calls.make("g001-c0/target", Role.TARGET, counted=False)
    close_generation(run, 1)
    calls.make("g001/decision", Role.FEEDBACK, cost_usd=8.0)
    finish(run)
    sync(database, run)

    child = {key: value for (key, _), value in metrics(database, "gen-001").items()}
    assert child["calls"] == 2
    assert child["calls/failed"] == 1
    assert (child["tokens/input"], child["tokens/cached"], child["tokens/output"]) == (300, 120, 30)
    assert child["cost_usd"] == 6.0
    assert (child["cost_usd/feedback"], child["cost_usd/target"]) == (2.0, 4.0)
    parent = metrics(database, PARENT)
    assert [parent["cost_usd", step] for step in range(3)] == [1.0, 7.0, 15.0]
    assert [parent["calls/unpriced", step] for step in range(2)] == [1, 1]
    assert parent["tokens/output", 2] == 60
    # The last decision led nowhere: its trace is the run's own.
    assert traces(database)["g001/decision"].run == PARENT


def test_failed_calls_are_errors_with_their_reason(database: Path, run: RunDir) -> None:
    calls = Calls(run)
    calls.make("g000-c0/meta")
    calls.make("g000-c0/meta", failure="429 for 600 s")
    calls.make("g000-c0/target", Role.TARGET, failure="the answer is empty")
    calls.make("g000-c0/target", Role.TARGET)
    close_generation(run, 0)
    finish(run)
    sync(database, run)
    found = traces(database)
    session = found["g000-c0/meta"]
    assert session.info.state == "ERROR"
    assert session.info.response_preview == "429 for 600 s"
    assert [span.status.description for span in session.data.spans] == [
        "429 for 600 s", "", "429 for 600 s",
    ]  # fmt: skip
    assert found["g000-c0/target"].info.state == "OK"
    assert found["g000-c0/target"].info.tags["sia.failed_calls"] == "1"


def test_a_target_with_many_calls_shows_the_first_and_counts_all(
    database: Path, run: RunDir
) -> None:
    calls = Calls(run)
    for number in range(MAX_SPANS + 20):
        calls.make("g000-c0/target", Role.TARGET, stream=False, say=f"answer {number}")
    close_generation(run, 0)
    finish(run)
    sync(database, run)
    (trace,) = traces(database).values()
    assert len(trace.data.spans) == 1 + MAX_SPANS
    assert trace.info.tags["sia.note"].startswith(f"The first {MAX_SPANS} of {MAX_SPANS + 20}")
    assert trace.info.response_preview == f"answer {MAX_SPANS + 19}"
    assert trace.info.token_usage["output_tokens"] == 10 * (MAX_SPANS + 20)


def test_second_sync_changes_nothing(database: Path, run: RunDir) -> None:
    calls = Calls(run)
    calls.make("g000-c0/meta")
    close_generation(run, 0)
    calls.make("g000/decision", Role.FEEDBACK)
    finish(run)
    sync(database, run)
    before = contents(database)
    assert before[0]
    sync(database, run)
    assert contents(database) == before


@pytest.mark.parametrize("lost", ["trace_tags", "spans", "run"])
def test_mirror_stopped_in_the_middle_of_a_trace_is_completed(
    database: Path, run: RunDir, lost: str
) -> None:
    calls = Calls(run)
    for _ in range(3):
        calls.make("g000-c0/meta")
    close_generation(run, 0)
    finish(run)
    sync(database, run)
    whole = contents(database)
    with closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE runs SET status='RUNNING', end_time=NULL WHERE name='gen-000'")
        db.execute("DELETE FROM trace_tags WHERE key LIKE 'sia.%'")
        if lost != "trace_tags":
            db.execute("DELETE FROM spans")
        if lost == "run":
            for table in ("metrics", "latest_metrics"):
                db.execute(f"DELETE FROM {table} WHERE key LIKE 'cost%' OR key LIKE 'tokens%'")
        db.commit()
    sync(database, run)
    assert contents(database) == whole


def test_live_mirror_and_rebuilt_mirror_are_equal(
    fresh_database: Path, database: Path, run: RunDir, tmp_path: Path
) -> None:
    from sia.tracking.location import locate
    from sia.tracking.mlflow import opened

    calls = Calls(run)
    with opened(run.path, locate(uri=f"sqlite:///{database}")) as mirror:
        mirror.reopen()
        for index in range(3):
            calls.make(f"g{index:03}-c0/meta")
            close_generation(run, index)
            mirror.update()
            calls.make(f"g{index:03}/decision", Role.FEEDBACK)
        calls.store.close()
        finish(run)
        mirror.update()
        mirror.close(ended=True)
    rebuilt = Path(shutil.copy(fresh_database, tmp_path / "rebuilt.db"))
    sync(rebuilt, run)
    assert contents(rebuilt) == contents(database)


def test_a_resumed_run_moves_the_trace_to_the_generation_that_closes(
    database: Path, run: RunDir
) -> None:
    calls = Calls(run)
    calls.make("g000-c0/meta", say="before")
    sync(database, run)  # interrupted in its first generation
    (trace,) = traces(database).values()
    assert trace.run == PARENT
    assert metrics(database, PARENT)["cost_usd", 0] == 0.25

    calls.store.close()
    calls = Calls(run)
    calls.make("g000-c0/meta", say="before", source="store")
    calls.make("g000-c0/meta", say="after")
    close_generation(run, 0)
    finish(run)
    sync(database, run)
    (trace,) = traces(database).values()
    assert trace.run == "gen-000"
    said = [span.outputs["choices"][0]["message"]["content"] for span in trace.data.spans[1:]]
    assert said == ["before", "after"]
    assert metrics(database, "gen-000")["calls/replayed", 0] == 1


def test_a_run_that_keeps_no_texts_still_has_its_numbers(database: Path, run: RunDir) -> None:
    store = Store(run.path / STORE_FILE, mode="live", now=NOW)
    bare = exchange(
        {}, b"", session=1, scope="g000-c0/meta", role=Role.META, format="chat", failure="",
        stream=False, source="", cost_usd=0.5, counted=True, started_at=NOW,
        request_zlib=None, body_zlib=None,
    )  # fmt: skip
    store.add(bare)
    close_generation(run, 0)
    finish(run)
    sync(database, run)
    (trace,) = traces(database).values()
    assert trace.data.spans[1].outputs == {}
    assert trace.info.cost["total_cost"] == 0.5


def test_what_the_gateway_records_is_what_a_trace_shows(database: Path, run: RunDir) -> None:
    import httpx2

    from sia.gateway import ModelGateway, Provider, Route
    from sia.gateway.provider import Price
    from sia.gateway.scripted import serving

    rules = [
        {"when": {"turn": 0}, "say": "I look.", "bash": "ls", "usage": {"input": 70, "output": 5}},
        {"when": {"text": "broken"}, "fault": "status", "status": 400},
    ]
    ask = [{"role": "user", "content": "Look"}]
    tool = {"name": "Bash", "input_schema": {"type": "object"}}
    with serving(rules) as server:
        provider = Provider(
            name="acme", base_url=f"{server.url}/v1", anthropic_url=server.url,
            formats=("chat", "messages"), prices={"m-1": Price(input=10.0, output=100.0)},
        )  # fmt: skip
        routes = dict.fromkeys(Role, Route(provider=provider, model="m-1"))
        with ModelGateway(store=run.path / STORE_FILE, routes=routes) as gateway:
            for role, scope in ((Role.META, "g000-c0/meta"), (Role.TARGET, "g000-c0/target")):
                with gateway.lease(role, scope) as lease:
                    url = f"http://127.0.0.1:{lease.endpoint.port}/v1"
                    key = lease.endpoint.key
                    body = {"model": "m-1", "messages": ask, "stream": True, "max_tokens": 9}
                    headers = {"authorization": f"Bearer {key}", "x-api-key": key}
                    with httpx2.Client(headers=headers, timeout=30) as client:
                        client.post(f"{url}/messages", json={**body, "tools": [tool]})
                        turns = [*ask, {"role": "assistant", "content": "broken"}]
                        client.post(f"{url}/chat/completions", json={**body, "messages": turns})
    close_generation(run, 0)
    finish(run)
    sync(database, run)
    for trace in traces(database).values():
        assert trace.run == "gen-000"
        _, first, second = trace.data.spans
        message = first.outputs["choices"][0]["message"]
        assert message["content"] == "I look."
        assert message["tool_calls"][0]["function"]["name"] == "Bash"
        assert first.get_attribute("mlflow.chat.tokenUsage")["input_tokens"] == 70
        assert first.llm_cost["total_cost"] == pytest.approx((70 * 10 + 5 * 100) / 1e6)
        assert second.status.status_code == "ERROR"
        assert "400" in second.status.description
        assert "the script answers with 400" in second.outputs["error"]["message"]
