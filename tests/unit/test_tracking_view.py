"""What tracking makes of a run directory; no MLflow here."""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from sia.records import Attempt, Candidate, Evaluation, Generation, Outcome, Proposal
from sia.rundir import JOURNAL_FILE, RunDir, RunInfo, candidate_dir
from sia.tracking import TrackingError
from sia.tracking.location import locate
from sia.tracking.view import RunView, metric_name


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    info = RunInfo(
        run_id="r",
        task="toy",
        task_version=1,
        meta="scripted",
        target="echo",
        seed=0,
        config_sha256="",
        created_at="2026-01-01T00:00:00+00:00",
        protocol=1,
    )
    return RunDir.create(tmp_path / "run", info, "search: greedy\n")


def close_generation(run: RunDir, index: int, scores: list[float | None]) -> None:
    step = run.journal.step
    ids = tuple(f"g{index:03}-c{k}" for k in range(len(scores)))
    for k, score in enumerate(scores):
        candidate = Candidate(
            id=ids[k], generation=index, index=k, parent=None, proposal=Proposal(hypothesis="")
        )
        outcome = Outcome.TIMEOUT if score is None else Outcome.OK
        attempt = Attempt(candidate=ids[k], outcome=outcome)
        evaluation = Evaluation(candidate=ids[k], split="dev", score=score)
        step(f"{index:04}/{k}/candidate", Candidate, lambda c=candidate: c)
        step(f"{index:04}/{k}/attempt", Attempt, lambda a=attempt: a)
        if score is not None:
            step(f"{index:04}/{k}/evaluation", Evaluation, lambda e=evaluation: e)
    closed = Generation(index=index, candidates=ids, incumbent=None, best_score=0.5, accepted=False)
    step(f"{index:04}/generation", Generation, lambda: closed)


def test_each_generation_is_seen_once_and_only_when_closed(run: RunDir) -> None:
    view = RunView(run.path)
    assert list(view.closed()) == []
    close_generation(run, 0, [0.1])
    assert [generation.index for generation in view.closed()] == [0]
    close_generation(run, 1, [0.2])
    with (run.path / JOURNAL_FILE).open("ab") as journal:
        journal.write(b'{"key": "0002/generation", "torn')
    assert [generation.index for generation in view.closed()] == [1]
    assert list(view.closed()) == []


def test_generation_shows_its_best_candidate(run: RunDir) -> None:
    close_generation(run, 0, [0.1, None, 0.4])
    (generation,) = RunView(run.path).closed()
    scores = {name: value for name, value in generation.metrics.items() if "score" in name}
    assert scores == {"score/dev": 0.4, "cand-0/score_dev": 0.1, "cand-2/score_dev": 0.4}
    assert not generation.failed


def test_failures_are_counted_through_generations_that_are_left_out(run: RunDir) -> None:
    close_generation(run, 0, [None])
    close_generation(run, 1, [None, 0.1])
    (generation,) = RunView(run.path).closed(done={0})
    assert generation.totals["failures/timeout"] == 2


def test_generation_without_a_score_failed(run: RunDir) -> None:
    close_generation(run, 0, [None])
    (generation,) = RunView(run.path).closed()
    assert generation.failed
    assert "score/dev" not in generation.totals


def test_links_in_a_candidate_folder_are_not_followed(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = candidate_dir(run.path, 0, 0)
    folder.mkdir(parents=True)
    (folder / "stdout.log").symlink_to(tmp_path / "secret")
    (folder / "stderr.log").mkdir()
    close_generation(run, 0, [0.1])
    (generation,) = RunView(run.path).closed()
    assert list(generation.files) == ["evaluation.json"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pass@1", "pass_at_1"),
        ("acc%", "acc_"),
        ("a//../b", "a/b"),
        ("精确/率", "精确/率"),
        ("..", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_metric_names_are_put_into_mlflows_alphabet(name: str, expected: str) -> None:
    assert metric_name(name) == expected


def test_places_come_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert locate().uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert locate().artifacts == f"file://{tmp_path}/mlartifacts"
    assert locate(option="sqlite:///a/b.db").uri == f"sqlite:///{tmp_path}/a/b.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:secret@host")
    assert locate(option="sqlite:///a/b.db").uri == "http://u:secret@host"
    assert str(locate()) == "http://***@host"
    assert locate().artifacts is None
    assert locate(uri="sqlite:////x.db").uri == "sqlite:////x.db"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:x.db"])
def test_sqlite_needs_a_file(uri: str) -> None:
    with pytest.raises(TrackingError, match="names no file"):
        locate(uri=uri)


def test_a_models_words_stay_words(run: RunDir) -> None:
    text = "![x](http://elsewhere/x.png) [y](javascript:alert(1)) <img src=x> # big\n\n- list"
    step = run.journal.step
    candidate = Candidate(
        id="g000-c0", generation=0, index=0, parent=None, proposal=Proposal(hypothesis=text)
    )
    step("0000/0/candidate", Candidate, lambda: candidate)
    attempt = Attempt(candidate="g000-c0", outcome=Outcome.CRASHED, reason="`exit` 1")
    step("0000/0/attempt", Attempt, lambda: attempt)
    closed = Generation(
        index=0, candidates=("g000-c0",), incumbent=None, best_score=None, accepted=False
    )
    step("0000/generation", Generation, lambda: closed)
    (generation,) = RunView(run.path).closed()
    html = MarkdownIt("commonmark").render(generation.tags["mlflow.note.content"])
    assert not {"<img", "<a ", "<h1", "<ul", "<code"} & {tag for tag in re.findall(r"<\w+ ?", html)}
    assert "http://elsewhere/x.png" in html
    assert "exit" in html
