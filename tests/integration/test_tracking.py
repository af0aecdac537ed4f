"""The mirror in MLflow: real MLflow on SQLite, followers as processes of their own."""

import importlib.util
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sia.provenance import tree_sha256
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
    RunResult,
    Update,
)
from sia.rundir import RunDir, RunInfo, candidate_dir, policy_dir
from sia.tracking import MlflowMirror, NoTracking, Tracker
from sia.tracking.__main__ import main

# MLflow 3.17 calls what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCORES = [0.25, 0.5, None, 0.75]


@pytest.fixture(autouse=True)
def _no_mlflow_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def database(fresh_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(fresh_database, tmp_path / "mlflow.db"))


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sia.tracking", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def sync(database: Path, run: Path) -> int:
    """In this process: importing MLflow again for each call would take most of the time."""
    return main(["sync", "--uri", f"sqlite:///{database}", str(run)])


def tracker(database: Path, *, drain_s: float = 60) -> MlflowMirror:
    return MlflowMirror(uri=f"sqlite:///{database}", artifacts=None, drain_s=drain_s)


def create(path: Path, run_id: str = "run-1") -> RunDir:
    info = RunInfo(
        run_id=run_id,
        task="toy/hard",
        task_version=2,
        meta="scripted",
        target="echo",
        seed=7,
        config_sha256="c0ffee",
        created_at="2026-01-02T03:04:05+00:00",
        protocol=1,
        provenance={"git": "abc123", "choices": {"experiment": "table1", "sweep": None}},
    )
    config = (
        "meta: {name: scripted}\nsearch: greedy\nloop: {generations: 4}\nseed: 7\n"
        "weights:\n  name: auto\nlevers:\n- harness\n- weights\n- stop\n"
    )
    return RunDir.create(path, info, config)


def turn(run: RunDir, index: int, score: float | None, *, trained: bool = False) -> None:
    """Writes one generation as the loop does; of one that was trained, the policy as well."""
    candidate = Candidate(
        id=f"g{index:03}-c0",
        generation=index,
        index=0,
        parent=f"g{index - 1:03}-c0" if index else None,
        lever=Lever.WEIGHTS if trained else Lever.HARNESS,
        policy=f"g{index:03}-c0" if trained else "",
        proposal=Proposal(
            hypothesis="Faster", source="move:1", changes={"k@1": 3, "a.py": "x" * 9999}
        ),
    )
    folder = candidate_dir(run.path, index, 0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "improvement.md").write_text("# Faster\n")
    (folder / "harness.diff").write_text("--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-a\n+b\n")
    (folder / "stdout.log").write_text("y" * 100_000 + "end")
    (folder / "usage.json").write_text(json.dumps({"wall_s": 1.5, "cpu_s": 1, "max_rss_mib": 64}))
    outcome = Outcome.CRASHED if score is None else Outcome.OK
    evaluation = Evaluation(
        candidate=candidate.id,
        split="dev",
        score=score,
        n_items=4,
        metrics={"pass@1": 0.5},
        symptoms={"empty": 0.1},
        breakdown={"recall": {"left": 0.5, "right": 0.25}},
        items={"i1": 1.0, "i2": 0.0},
    )
    attempt = Attempt(candidate=candidate.id, outcome=outcome, reason="" if score else "exit 1")
    closed = Generation(
        index=index,
        candidates=(candidate.id,),
        incumbent="g000-c0",
        best_score=max(known for known in SCORES[: index + 1] if known is not None),
        accepted=score is not None,
    )
    step = run.journal.step
    step(f"{index:04}/0/candidate", Candidate, lambda: candidate)
    if trained:
        record = {"policy": {"kind": "label"}, "base": "e5", "base_sha256": "b" * 64}
        policy = policy_dir(run.path, candidate.id)
        policy.mkdir()
        (policy / "update.json").write_text(json.dumps(record))
        (policy / "adapter_model.safetensors").write_bytes(bytes([index]))
        update = Update(candidate=candidate.id, recipe="sft", report={"steps": 40.0})
        step(f"{index:04}/0/update", Update, lambda: update)
    step(f"{index:04}/0/attempt", Attempt, lambda: attempt)
    if score is not None:
        step(f"{index:04}/0/evaluation", Evaluation, lambda: evaluation)
    step(f"{index:04}/generation", Generation, lambda: closed)
    decision = Decision(lever=Lever.HARNESS, hypothesis="More")
    step(f"{index:04}/decision", Decision, lambda: decision)


def finish(run: RunDir, status: str = "finished") -> None:
    if status == "finished":
        run.journal.step("ending", Ending, lambda: Ending(reason="generations"))
    run.finish(RunResult(status=status, reason="generations", elapsed_s=9.0))
    run.close()


def finished_run(path: Path, run_id: str = "run-1") -> Path:
    run = create(path, run_id)
    for index, score in enumerate(SCORES):
        turn(run, index, score)
    finish(run)
    return path


def contents(database: Path) -> dict[str, Any]:
    """Everything that tracking wrote, without the ids that MLflow draws."""
    with closing(sqlite3.connect(database)) as db:
        names = dict(db.execute("SELECT run_uuid, name FROM runs"))
        runs = {}
        for run_id, name, status, *times in db.execute(
            "SELECT run_uuid, name, status, start_time, end_time FROM runs"
        ):
            tags = dict(db.execute("SELECT key, value FROM tags WHERE run_uuid = ?", [run_id]))
            parent = names.get(tags.pop("mlflow.parentRunId", ""))
            key = f"{tags['sia.run_id']}/{name}"
            assert key not in runs, "two MLflow runs stand for one thing"
            runs[key] = {
                "status": status,
                "times": times,
                "parent": parent,
                "tags": tags,
                "params": dict(
                    db.execute("SELECT key, value FROM params WHERE run_uuid = ?", [run_id])
                ),
                "metrics": sorted(
                    db.execute(
                        "SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = ?",
                        [run_id],
                    )
                ),
                "inputs": sorted(
                    db.execute(
                        "SELECT d.name, t.value FROM inputs i JOIN datasets d"
                        " ON d.dataset_uuid = i.source_id JOIN input_tags t"
                        " ON t.input_uuid = i.input_uuid WHERE i.destination_id = ?",
                        [run_id],
                    )
                ),
                "versions": [
                    (model, dict(tags_of(db, model, version)))
                    for model, version in db.execute(
                        "SELECT name, version FROM model_versions WHERE run_id = ?"
                        " ORDER BY name, version",
                        [run_id],
                    )
                ],
            }
        return runs


def tags_of(db: sqlite3.Connection, model: str, version: int) -> list[tuple[str, str]]:
    query = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"
    return list(db.execute(query, [model, version]))


def experiment_tags(database: Path) -> dict[str, str]:
    with closing(sqlite3.connect(database)) as db:
        query = (
            "SELECT key, value FROM experiment_tags t JOIN experiments e"
            " ON e.experiment_id = t.experiment_id WHERE e.name = 'sia/toy/hard'"
        )
        return dict(db.execute(query))


def artifacts(database: Path, name: str) -> Path:
    with closing(sqlite3.connect(database)) as db:
        (uri,) = db.execute("SELECT artifact_uri FROM runs WHERE name = ?", [name]).fetchone()
    return Path(uri.removeprefix("file://"))


def files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def wait_for_generations(database: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with closing(sqlite3.connect(database)) as db:
            query = "SELECT count(*) FROM runs WHERE name LIKE 'gen-%' AND status != 'RUNNING'"
            if db.execute(query).fetchone()[0] >= count:
                return
        time.sleep(0.02)
    raise AssertionError("the follower wrote nothing")


PARENT = "run-1/toy/hard-scripted-echo-s7"


def test_run_becomes_a_parent_with_one_child_per_generation(database: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert sync(database, run) == 0

    runs = contents(database)
    assert sorted(runs) == [*(f"run-1/gen-{i:03}" for i in range(4)), PARENT]
    parent = runs[PARENT]
    assert parent["status"] == "FINISHED"
    assert parent["params"] == {
        "task": "toy/hard",
        "meta": "scripted",
        "target": "echo",
        "weights": "auto",
        "search": "greedy",
        "generations": "4",
        "seed": "7",
    }
    values = {(key, step): value for key, step, value, _ in parent["metrics"]}
    assert [values.get(("score/dev", step)) for step in range(4)] == SCORES
    assert [values[("best/dev", step)] for step in range(4)] == [0.25, 0.5, 0.5, 0.75]
    assert values[("failures/crashed", 3)] == 1
    child = runs["run-1/gen-001"]
    assert child["parent"] == PARENT.removeprefix("run-1/")
    assert child["tags"]["sia.lever"] == "harness"
    assert child["tags"]["sia.accepted"] == "true"
    assert child["params"]["source"] == "move:1"
    assert child["params"]["change/k_at_1"] == "3"
    assert len(child["params"]["change/a.py"]) == 500
    assert child["inputs"] == [("toy/hard/dev", "evaluation"), ("toy/hard/public", "feedback")]
    assert parent["inputs"] == [("toy/hard/public", "feedback")]
    for tags in (parent["tags"], child["tags"]):
        assert tags["sia.arm"] == "both"
        assert (tags["sia.task"], tags["sia.seed"]) == ("toy/hard", "7")
        assert tags["sia.experiment"] == "table1"
        assert "sia.sweep" not in tags
    scalars = {key: value for key, _, value, _ in child["metrics"]}
    assert scalars == {
        "score/dev": 0.5,
        "dev/pass_at_1": 0.5,
        "symptom/empty": 0.1,
        "wall_s": 1.5,
        "cpu_s": 1.0,
        "max_rss_mib": 64.0,
    }
    assert runs["run-1/gen-002"]["status"] == "FAILED"
    assert runs["run-1/gen-002"]["tags"]["sia.outcome"] == "crashed"
    folder = artifacts(database, "gen-001")
    assert folder.is_relative_to(database.parent / "mlartifacts" / "sia-toy-hard")
    assert sorted(path.name for path in folder.iterdir()) == [
        "dev",
        "evaluation.json",
        "harness.diff",
        "harness.html",
        "improvement.md",
        "stdout.log",
    ]
    assert len((folder / "stdout.log").read_bytes()) == 64 * 1024
    assert json.loads(child["tags"]["mlflow.loggedArtifacts"]) == [
        {"path": "dev/recall.json", "type": "table"}
    ]
    assert json.loads((folder / "dev/recall.json").read_text()) == {
        "columns": ["name", "value"],
        "data": [["left", 0.5], ["right", 0.25]],
    }
    assert (artifacts(database, PARENT.removeprefix("run-1/")) / "config.yaml").is_file()


def trained_run(path: Path, run_id: str = "run-1") -> Path:
    """The second and the third generation are updates of the weights."""
    run = create(path, run_id)
    for index, score in enumerate([0.25, 0.5, 0.75]):
        turn(run, index, score, trained=index > 0)
    finish(run)
    return path


def test_an_adapter_becomes_a_model_version_with_its_lineage(
    database: Path, tmp_path: Path
) -> None:
    run = trained_run(tmp_path / "run")
    sync(database, run)
    runs = contents(database)
    assert runs["run-1/gen-000"]["versions"] == []
    ((model, first),) = runs["run-1/gen-001"]["versions"]
    ((_, second),) = runs["run-1/gen-002"]["versions"]
    assert model == "sia-toy-hard-label"
    assert first["sia.sha256"] == tree_sha256(policy_dir(run, "g001-c0"))
    assert second["sia.parent_sha256"] == first["sia.sha256"]
    assert second["sia.parent"] == "g001-c0"
    assert "sia.parent" not in first
    assert (second["sia.dev_before"], second["sia.dev_after"]) == ("0.5", "0.75")
    assert (second["sia.base"], second["sia.base_sha256"]) == ("e5", "b" * 64)
    assert (second["sia.run_id"], second["sia.candidate"]) == ("run-1", "g002-c0")
    copied = artifacts(database, "gen-002") / "policy"
    assert (copied / "adapter_model.safetensors").read_bytes() == b"\x02"
    lineage = json.loads((copied / "lineage.json").read_text())
    assert lineage["report"] == {"steps": 40.0}
    assert lineage["adapters"][0]["base_sha256"] == "b" * 64

    assert sync(database, run) == 0
    assert contents(database) == runs


def test_a_version_is_not_entered_twice_after_a_kill(database: Path, tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run")
    sync(database, run)
    whole = contents(database)
    with closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE runs SET status='RUNNING', end_time=NULL WHERE name='gen-002'")
        db.commit()
    sync(database, run)
    assert contents(database) == whole


def test_a_large_adapter_is_named_by_path_and_digest(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sia.tracking.lineage.MAX_COPIED", 10)
    run = trained_run(tmp_path / "run")
    sync(database, run)
    copied = artifacts(database, "gen-001") / "policy"
    assert [path.name for path in copied.iterdir()] == ["lineage.json"]
    ((_, tags),) = contents(database)["run-1/gen-001"]["versions"]
    assert tags["sia.path"] == str(policy_dir(run, "g001-c0"))


def test_an_experiment_opens_on_its_scores_and_keeps_what_people_wrote(
    database: Path, tmp_path: Path
) -> None:
    sync(database, finished_run(tmp_path / "run"))
    tags = experiment_tags(database)
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "harness.html" in tags["mlflow.note.content"]
    view = json.loads(tags["mlflow.sharedViewState.sia"])
    assert [chart["metricKey"] for chart in json.loads(view["state"])["compareRunCharts"]][:2] == [
        "best/dev",
        "score/dev",
    ]
    changes = {
        "mlflow.note.content": "Ours.",
        "mlflow.sharedViewState.sia": "of an older release",
        "mlflow.experimentKind": "genai_development_inferred",  # MLflow's page writes this
    }
    with closing(sqlite3.connect(database)) as db:
        for key, value in changes.items():
            db.execute("UPDATE experiment_tags SET value=? WHERE key=?", [value, key])
        db.commit()
    sync(database, finished_run(tmp_path / "other", "run-2"))
    assert experiment_tags(database) == {**tags, "mlflow.note.content": "Ours."}


def test_second_sync_changes_nothing(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "run")
    sync(database, run)
    before = contents(database)
    sync(database, run)
    assert contents(database) == before
    lines = [f"{run}: {count} generations written" for count in (4, 0)]
    assert capsys.readouterr().out.splitlines() == lines


def test_live_mirror_and_rebuilt_mirror_are_equal(
    fresh_database: Path, database: Path, tmp_path: Path
) -> None:
    run = create(tmp_path / "run")
    live = tracker(database)
    live.start(run.path)
    for index, score in enumerate(SCORES):
        turn(run, index, score)
        if index == 1:
            wait_for_generations(database, 2)
    finish(run)
    before = files(run.path)
    assert live.finish() == ""
    assert before.pop("tracking.log") == b""
    assert files(run.path) == before

    rebuilt = Path(shutil.copy(fresh_database, tmp_path / "rebuilt.db"))
    assert sync(rebuilt, run.path) == 0
    assert contents(rebuilt) == contents(database)
    assert len(contents(database)) == 5


@pytest.mark.parametrize("generations", [0, 1, 2])
def test_sync_completes_what_a_killed_follower_left(
    fresh_database: Path, database: Path, tmp_path: Path, generations: int
) -> None:
    run = create(tmp_path / "run")
    command = [sys.executable, "-m", "sia.tracking", "follow", str(run.path)]
    command += ["--uri", f"sqlite:///{database}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as follower:
        for index, score in enumerate(SCORES):
            turn(run, index, score)
        wait_for_generations(database, generations)
        follower.send_signal(signal.SIGKILL)
    finish(run)
    assert sync(database, run.path) == 0
    whole = Path(shutil.copy(fresh_database, tmp_path / "whole.db"))
    sync(whole, run.path)
    assert contents(database) == contents(whole)


def test_mirror_stopped_between_any_two_writes_is_completed(
    fresh_database: Path, database: Path, tmp_path: Path
) -> None:
    """Undoes, step by step, what comes after a child's creation."""
    run = finished_run(tmp_path / "run")
    sync(database, run)
    whole = contents(database)
    with closing(sqlite3.connect(database)) as db:
        ids = {name: run_id for run_id, name in db.execute("SELECT run_uuid, name FROM runs")}
        parent = ids[PARENT.removeprefix("run-1/")]
        for name in ("gen-001", "gen-002", "gen-003"):
            db.execute(
                "UPDATE runs SET status='RUNNING', end_time=NULL WHERE run_uuid=?", [ids[name]]
            )
        for name in ("gen-002", "gen-003"):
            for table in ("metrics", "latest_metrics"):
                db.execute(f"DELETE FROM {table} WHERE run_uuid=?", [ids[name]])
        for table in ("metrics", "latest_metrics"):
            db.execute(f"DELETE FROM {table} WHERE run_uuid=? AND step=3", [parent])
        db.execute("DELETE FROM params WHERE run_uuid=?", [ids["gen-003"]])
        db.execute("DELETE FROM params WHERE run_uuid=?", [parent])
        db.commit()
    assert sync(database, run) == 0
    assert contents(database) == whole


def test_resumed_run_continues_its_parent(database: Path, tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    first = tracker(database)
    first.start(run.path)
    turn(run, 0, SCORES[0])
    finish(run, "interrupted")
    assert first.finish() == ""
    assert contents(database)[PARENT]["status"] == "KILLED"

    run = RunDir.resume(run.path)
    (run.path / "result.json").unlink()
    second = tracker(database)
    second.start(run.path)
    turn(run, 1, SCORES[1])
    wait_for_generations(database, 2)
    assert contents(database)[PARENT]["status"] == "RUNNING"
    finish(run)
    assert second.finish() == ""
    runs = contents(database)
    assert sorted(runs) == ["run-1/gen-000", "run-1/gen-001", PARENT]
    assert runs[PARENT]["status"] == "FINISHED"


def test_run_interrupted_twice_at_the_same_step_is_shown_as_killed(
    database: Path, tmp_path: Path
) -> None:
    from sia.tracking.location import locate
    from sia.tracking.mlflow import opened

    run = create(tmp_path / "run")
    finish(run, "interrupted")
    assert sync(database, run.path) == 0
    before = contents(database)
    assert before[PARENT]["status"] == "KILLED"
    with opened(run.path, locate(uri=f"sqlite:///{database}")) as mirror:
        mirror.reopen()
        assert contents(database)[PARENT]["status"] == "RUNNING"
        mirror.close(ended=True)
    assert contents(database) == before


def test_follower_ends_and_marks_the_run_when_its_process_is_killed(
    database: Path, tmp_path: Path
) -> None:
    run = create(tmp_path / "run")
    turn(run, 0, 0.25)
    run.close()
    program = (
        "import sys, time; from pathlib import Path; from sia.tracking import MlflowMirror\n"
        "mirror = MlflowMirror(uri=sys.argv[1], artifacts=None, drain_s=1)\n"
        "mirror.start(Path(sys.argv[2])); print('started', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", program, f"sqlite:///{database}", str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    wait_for_generations(database, 1)
    deadline = time.monotonic() + 30
    while contents(database)[PARENT]["status"] != "KILLED":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_may_start_at_once_on_a_database_that_is_not_there(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / f"run-{n}", f"run-{n}") for n in range(6)]
    database = tmp_path / "new" / "mlflow.db"
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda run: cli("sync", "--uri", f"sqlite:///{database}", run), runs))
    assert [d.returncode for d in done] == [0] * 6, [d.stderr for d in done]
    assert len(contents(database)) == 6 * 5
    left = {path.name for path in database.parent.iterdir()} - {"mlartifacts", "mlflow.db.lock"}
    assert left == {"mlflow.db"}


def test_interrupted_creation_of_the_database_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.new").write_bytes(b"half")
    (tmp_path / "mlflow.db").touch()
    done = cli("init", "--uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "mlflow.db") == {}


def test_two_runs_are_mirrored_side_by_side(database: Path, tmp_path: Path) -> None:
    runs = [create(tmp_path / f"run-{n}", f"run-{n}") for n in (1, 2)]
    trackers = [tracker(database) for _ in runs]
    for run, one in zip(runs, trackers, strict=True):
        one.start(run.path)
    for index, score in enumerate(SCORES):
        for run in runs:
            turn(run, index, score)
    for run in runs:
        finish(run)
    assert [one.finish() for one in trackers] == ["", ""]
    assert len(contents(database)) == 10


def test_sealed_test_is_added_later(database: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    sync(database, run)
    rows = [
        {"name": "reference", "candidate": None, "dev": None, "test": 0.2, "low": 0, "high": 1},
        {"name": "best by dev", "candidate": "g003-c0", "dev": 0.75, "test": 0.7, "n": 3},
    ]
    (run / "exam.json").write_text(json.dumps({"rows": rows, "best": {"new": 1}}))
    assert sync(database, run) == 0
    metrics = {key: value for key, _, value, _ in contents(database)[PARENT]["metrics"]}
    assert metrics["score/test"] == metrics["exam/best-by-dev"] == 0.7
    assert metrics["exam/reference"] == 0.2
    before = contents(database)
    sync(database, run)
    assert contents(database) == before


@pytest.fixture(params=["damaged", "not mlflow", "unwritable folder", "no server", "file store"])
def broken_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "broken.db"
    if request.param == "damaged":
        path.write_bytes(b"not a database, " * 1000)
    if request.param == "not mlflow":
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE mine (x)")
            db.commit()
    return {
        "unwritable folder": "sqlite:////proc/none/mlflow.db",
        "no server": "http://127.0.0.1:9",
        "file store": str(tmp_path / "mlruns"),
    }.get(request.param, f"sqlite:///{path}")


def test_broken_mirror_is_reported_and_leaves_the_run_alone(
    broken_uri: str, tmp_path: Path
) -> None:
    run = create(tmp_path / "run")
    mirror = MlflowMirror(uri=broken_uri, artifacts=None, drain_s=60)
    mirror.start(run.path)
    turn(run, 0, 0.25)
    finish(run)
    before = files(run.path)
    problem = mirror.finish()
    assert problem.endswith(f"python -m sia.tracking sync {run.path} --uri {broken_uri}")
    after = files(run.path)
    assert b"Traceback" in after["tracking.log"]
    assert {**after, "tracking.log": b""} == {**before, "tracking.log": b""}


def test_broken_mirror_is_one_line_for_sync(
    broken_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", "--uri", broken_uri, str(finished_run(tmp_path / "run"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sia: ")


def test_locked_database_is_reported_after_the_deadline(database: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with closing(sqlite3.connect(database)) as db:
        db.execute("BEGIN EXCLUSIVE")
        mirror = tracker(database, drain_s=3)
        mirror.start(run)
        problem = mirror.finish()
    assert "3 s after the end" in problem
    assert sync(database, run) == 0
    assert len(contents(database)) == 5


def test_wrong_run_is_one_line(tmp_path: Path) -> None:
    done = cli("sync", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith(f"sia: {tmp_path / 'none'} holds no run")
    assert done.stderr.count("\n") == 1


def test_environment_names_the_place_before_the_option(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    run = finished_run(tmp_path / "run")
    mirror = tracker(tmp_path / "other.db")
    mirror.start(run)
    assert mirror.finish() == ""
    assert len(contents(database)) == 5
    assert not (tmp_path / "other.db").exists()


def test_package_is_light_and_satisfies_the_protocol() -> None:
    trackers: list[Tracker] = [NoTracking(), MlflowMirror(uri=None, artifacts=None, drain_s=1)]
    assert [one.finish() for one in trackers] == ["", ""]
    program = "import sys, sia.tracking, sia.tracking.__main__; print('mlflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_the_page_opens_on_scores_by_generation_and_leaves_no_process(
    database: Path, tmp_path: Path
) -> None:
    sync(database, finished_run(tmp_path / "run"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = subprocess.Popen(
        [sys.executable, "-m", "sia.tracking", "ui", "--port", str(port)],
        cwd=database.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert page.stdout is not None
        assert page.stdout.readline().startswith(f"http://127.0.0.1:{port} ")
        name, _, address = page.stdout.readline().strip().partition(": scores by generation, ")
        assert name == "sia/toy/hard"
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                    assert reply.status == 200
                break
            except OSError:
                assert page.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        shows_our_view(address)
    finally:
        page.terminate()
        page.wait(timeout=30)
        page.stdout.close()
    deadline = time.monotonic() + 20
    session = ["pgrep", "-s", str(page.pid)]
    while subprocess.run(session, capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline, "processes of the page are left"
        time.sleep(0.2)


def test_runs_that_start_at_once_nest_their_own_generations(tmp_path: Path) -> None:
    """Six whole runs in processes of their own, on a database that is not there yet."""
    command = [sys.executable, "-m", "sia", "task=toy", "meta=scripted", "sandbox=process"]
    started = [
        subprocess.Popen(
            [*command, "generations=2", f"seed={seed}", f"hydra.run.dir=run-{seed}"],
            cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for seed in range(6)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 6, said
    assert not any("Tracking is incomplete" in one for one in said)
    runs = contents(tmp_path / "mlflow.db")
    expected = {}
    for seed in range(6):
        run_id = json.loads((tmp_path / f"run-{seed}" / "run.json").read_bytes())["run_id"]
        parent = f"toy-scripted-embedded-s{seed}"
        expected[f"{run_id}/{parent}"] = None
        expected |= {f"{run_id}/gen-{index:03}": parent for index in range(2)}
    assert {name: run["parent"] for name, run in runs.items()} == expected
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def shows_our_view(address: str) -> None:
    """In Chromium; without it, or without playwright, the address alone has to do."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        return
    from playwright.sync_api import expect, sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        opened = browser.new_page(viewport={"width": 1600, "height": 1000})
        opened.goto(address)
        for text in ("Scores by generation", "Self-improving agents on", "best/dev"):
            expect(opened.get_by_text(text).first).to_be_visible(timeout=90_000)
        expect(opened.locator(".js-plotly-plot").first).to_be_visible(timeout=90_000)
        browser.close()
