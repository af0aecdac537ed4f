import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sia import rundir
from sia.errors import RunDirectoryError, RunDirectoryInUse
from sia.records import Decision, Lever, RunResult
from sia.rundir import Journal, RunDir, RunInfo

INFO = RunInfo(
    run_id="r",
    task="toy",
    task_version=1,
    meta="scripted",
    target="embedded",
    seed=0,
    config_sha256="",
    created_at="2026-01-01T00:00:00+00:00",
    protocol=1,
)


def decision(text: str) -> Callable[[], Decision]:
    return lambda: Decision(lever=Lever.HARNESS, hypothesis=text)


def never() -> Decision:
    raise AssertionError("a finished step was made again")


def test_a_finished_step_is_read_back_and_never_made_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    first = journal.step("0000/decision", Decision, decision("why"))
    assert journal.step("0000/decision", Decision, never) == first
    journal.close()
    again = Journal(tmp_path / "journal.jsonl")
    assert again.step("0000/decision", Decision, never) == first


@pytest.mark.parametrize("torn", [b"{", b'{"key": "0001/dec', b"\x00\xff"])
def test_a_line_torn_by_a_kill_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.step("0000/decision", Decision, decision("kept"))
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [line.key for line in rundir.read_journal(tmp_path)] == ["0000/decision"]
    again = Journal(path)
    again.step("0001/decision", Decision, decision("next"))
    again.close()
    assert path.read_bytes().startswith(whole)
    assert [line.key for line in rundir.read_journal(tmp_path)] == [
        "0000/decision",
        "0001/decision",
    ]


def test_a_damaged_line_in_the_middle_is_an_error_and_stays_untouched(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"{broken}\n")
    with pytest.raises(RunDirectoryError, match="line 1 is damaged"):
        Journal(path)
    assert path.read_bytes() == b"{broken}\n"


def test_time_used_by_earlier_sessions_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(
        '{"key": "0000/decision", "kind": "Decision", "elapsed_s": 100.0, "wall_s": 1.0,'
        ' "data": {"lever": "harness", "hypothesis": ""}}\n'
    )
    assert Journal(path).elapsed_s >= 100.0


def test_a_run_directory_is_made_once(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", INFO, "seed: 0\n").close()
    with pytest.raises(RunDirectoryInUse, match=r"python -m sia resume="):
        RunDir.create(tmp_path / "run", INFO, "seed: 1\n")
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"


def test_two_writers_cannot_hold_one_run_directory(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", INFO, "")
    with pytest.raises(RunDirectoryInUse, match="Another process"):
        RunDir.resume(tmp_path / "run")
    run.close()
    RunDir.resume(tmp_path / "run").close()


def test_an_examined_run_cannot_be_resumed(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", INFO, "").close()
    (tmp_path / "run" / "exam.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="its search is over"):
        RunDir.resume(tmp_path / "run")


def test_a_folder_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        RunDir.resume(tmp_path)


def test_results_are_read_back(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", INFO, "")
    assert rundir.read_result(run.path) is None
    run.finish(RunResult(status="finished", reason="stop", best="g000-c0", best_score=0.5))
    run.close()
    found = rundir.read_result(run.path)
    assert found is not None
    assert found.best_score == 0.5


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    rundir.write_atomic(path, b"old")
    with pytest.raises(RunDirectoryError, match="Cannot write"):
        rundir.write_atomic(tmp_path / "absent" / "result.json", b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_removing_a_folder_never_follows_a_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("")
    (tmp_path / "link").symlink_to(kept)
    rundir.remove_tree(tmp_path / "link")
    assert (kept / "file").exists()
    assert not (tmp_path / "link").exists()
    assert stat.S_ISDIR(os.stat(kept).st_mode)


@pytest.mark.parametrize(
    ("levers", "weights", "arm"),
    [
        (["harness", "weights", "stop"], "auto", "both"),
        (["harness", "weights", "stop"], "none", "harness"),
        (["weights", "stop"], "sft", "weights"),
        (["stop"], "auto", ""),
    ],
)
def test_the_arm_of_a_run_is_what_it_could_pull(levers: list[str], weights: str, arm: str) -> None:
    config = {"levers": levers, "seed": 0, "weights": {"_target_": "x", "name": weights}}
    assert rundir.arm(OmegaConf.to_yaml(OmegaConf.create(config))) == arm
    assert rundir.arm("") == ""
