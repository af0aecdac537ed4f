"""`python -m sia.runs` on real runs of the toy task."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sia import rundir
from sia.runs import main

QUICK = ["task=toy", "meta=scripted", "tracking=none", "sandbox=process"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one generation, one of three, and one that was killed."""
    folder = tmp_path_factory.mktemp("made")
    for name, generations in (("short", 1), ("long", 3)):
        command = [sys.executable, "-m", "sia", *QUICK, f"generations={generations}"]
        subprocess.run(
            [*command, f"hydra.run.dir={name}"], cwd=folder, check=True, capture_output=True,
            timeout=120,
        )  # fmt: skip
    command = [sys.executable, "-m", "sia", *QUICK, "generations=12", "hydra.run.dir=dead"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        journal = folder / "dead" / rundir.JOURNAL_FILE
        while not journal.exists() or b"/generation" not in journal.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, object]]:
    assert main(["list", *words, "--json"]) == 0
    return {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.usefixtures("runs")
def test_every_run_is_listed_with_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    assert {name: row["status"] for name, row in found.items()} == {
        "dead": "killed", "long": "finished", "short": "finished",
    }  # fmt: skip
    assert [found[name]["generations"] for name in ("long", "short")] == [3, 1]
    assert found["dead"]["generations"] >= 1  # type: ignore[operator]
    assert found["dead"]["dev"] is not None
    one = found["long"]
    assert [one[k] for k in ("task", "meta", "target", "arm", "seed", "test", "cost_usd")] == [
        "toy", "scripted", "embedded", "harness", 0, None, None,
    ]  # fmt: skip
    assert listed(capsys, "task=toy", "status=killed").keys() == {"dead"}
    assert listed(capsys, "task=other") == {}


@pytest.mark.usefixtures("runs")
def test_the_table_is_not_broken_by_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["list", "runs"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "task", "meta"]
    assert [line.split()[:3] for line in lines] == [
        [f"runs/{name}", "toy", "scripted"] for name in ("dead", "long", "short")
    ]


def test_a_run_that_goes_on_is_running_and_is_not_resumed(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = rundir.RunDir.resume(runs / "dead")
    try:
        assert listed(capsys)["dead"]["status"] == "running"
        assert main(["resume", "runs"]) == 0
        assert capsys.readouterr().out == "nothing to resume: 1 running, 2 finished\n"
    finally:
        held.close()


def test_resume_goes_on_with_all_that_did_not_finish(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "dead", runs / "it's, dead=too")
    finished = (runs / "long" / rundir.JOURNAL_FILE).read_bytes()
    command = [sys.executable, "-m", "sia.runs", "resume", "runs", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "resumed 2: 2 finished"
    assert f"dead | run       {runs / 'dead'}\n" in done.stdout
    found = listed(capsys)
    assert {row["status"] for row in found.values()} == {"finished"}
    assert found["dead"]["generations"] == found["it's, dead=too"]["generations"] == 12
    assert rundir.records(runs / "dead") == rundir.records(runs / "it's, dead=too")
    assert (runs / "long" / rundir.JOURNAL_FILE).read_bytes() == finished


def test_a_run_that_cannot_go_on_is_named_and_the_others_do(runs: Path) -> None:
    shutil.copytree(runs / "dead", runs / "broken")
    (runs / "broken" / rundir.CONFIG_FILE).write_text("task: {}\n")
    command = [sys.executable, "-m", "sia.runs", "resume", "runs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == [
        "resumed 2: 1 finished, 1 killed", "  killed  runs/broken",
    ]  # fmt: skip


def test_compare_pairs_the_best_candidates_on_the_same_items(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exam = [sys.executable, "-m", "sia.exam", "--no-final-refit", "runs/short", "runs/long"]
    subprocess.run(exam, check=True, capture_output=True, timeout=200)
    assert main(["compare", "runs/short", "runs/long", "runs/dead"]) == 0
    header, first, second, third, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "best", "dev", "difference", "test", "difference"]
    examined = rundir.read_exam(runs / "short")
    assert examined is not None
    test = next(row.test for row in examined.rows if row.name == "best by dev")
    assert first.split() == ["runs/short", "g000-c0", *first.split()[2:3], f"{test:.4f}"]
    assert second.split().count("[+0.0000,") == 2  # the same candidate won in both
    assert third.split().count("[+0.0000,") == 1  # its test is closed


def test_runs_of_other_data_are_not_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "long" / rundir.RUN_FILE
    info = json.loads(path.read_bytes())
    info["provenance"]["public_sha256"] = "0" * 64
    path.write_text(json.dumps(info))
    assert main(["compare", "runs/short", "runs/long"]) == 2
    assert "cannot be paired" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "nowhere"], "nowhere holds no run"),
        (["list", "status=dead"], "status='dead' is none of running, finished,"),
        (["list", "seed=1"], "runs are chosen by task=, status= only"),
        (["resume", "runs", "--workers", "0"], "--workers=0 must be at least 1"),
        (["compare", "runs/short"], "Two runs are compared"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_a_mistake_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_thousand_runs_are_found_without_a_look_into_them(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    walk = os.scandir

    def watched(path: str) -> object:
        entered.append(Path(path).relative_to(runs))
        return walk(path)

    monkeypatch.setattr(os, "scandir", watched)
    assert [run.name for run in rundir.find_runs(runs)] == ["dead", "long", "short"]
    assert max(len(path.parts) for path in entered) == 1
