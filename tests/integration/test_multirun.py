"""Grids of runs: real launchers, real processes, and runs that are killed."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sia import rundir

QUICK = ["task=toy", "meta=scripted", "tracking=none", "sandbox=process"]
LOCK = ".lock"


def start(folder: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sia", "-m", *QUICK, "hydra.sweep.dir=grid", *args],
        cwd=folder, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(grid: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = grid.communicate(timeout=300)
    return grid.returncode, out + err


def kill_the_process_of(run: Path) -> None:
    """kill -9, once the run has finished a step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        with suppress(rundir.RunDirectoryError):
            if rundir.read_journal(run):
                os.kill(holder(run / LOCK), signal.SIGKILL)
                return
        time.sleep(0.05)
    raise AssertionError(f"{run} never began")


def holder(file: Path) -> int:
    """The process that has the file open."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            if any(os.readlink(link) == str(file) for link in folder.iterdir()):
                return int(folder.parent.name)
    raise AssertionError(f"no process has {file} open")


def statuses(grid: Path) -> dict[str, str]:
    return {run.name: rundir.status(run) for run in rundir.find_runs(grid)}


@pytest.mark.parametrize(
    "launcher", [pytest.param("submitit_local", marks=pytest.mark.slow), "ray"]
)
def test_a_run_that_fails_and_one_that_is_killed_leave_six_results(
    launcher: str, tmp_path: Path
) -> None:
    pytest.importorskip(launcher.partition("_")[0])
    grid = start(tmp_path, f"hydra/launcher={launcher}", "generations=2,3,4,0,5,500,6,7")
    kill_the_process_of(tmp_path / "grid" / "5")
    code, said = ended(grid)
    assert code == 1, said
    assert statuses(tmp_path / "grid") == {
        **dict.fromkeys(("0", "1", "2", "4", "6", "7"), "finished"), "5": "killed",
    }  # fmt: skip
    assert "Traceback" not in said
    summary = said[said.index("sia: ") :]
    assert summary.startswith(f"sia: 2 of 8 runs did not finish; 6 did. {tmp_path / 'grid'}\n")
    assert re.search(r"run 3  generations=0\n +generations=0 must be at least 1", summary)
    assert re.search(r"run 5  generations=500\n +killed: ", summary)
    (again,) = re.findall(r"again: python -m sia (.*)", summary)
    assert "generations=0" in again
    assert "task=toy" in again
    assert "go on: python -m sia resume=grid/5\n" in f"{summary}\n"


@pytest.mark.slow
def test_ray_starts_a_killed_run_again_and_it_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    grid = start(
        tmp_path, "hydra/launcher=ray", "hydra.launcher.remote.max_retries=1", "generations=2,40"
    )
    run = tmp_path / "grid" / "1"
    kill_the_process_of(run)
    before = len(rundir.read_journal(run))
    code, said = ended(grid)
    assert code == 0, said
    assert statuses(tmp_path / "grid") == {"0": "finished", "1": "finished"}
    keys = [line.key for line in rundir.read_journal(run)]
    assert len(keys) == len(set(keys)) > before


def test_a_run_that_fails_in_the_grids_own_process_leaves_seven_results(tmp_path: Path) -> None:
    code, said = ended(start(tmp_path, "generations=2,3,4,0,5,1,6,7"))
    assert code == 1, said
    assert statuses(tmp_path / "grid") == dict.fromkeys("0124567", "finished")
    assert f"sia: 1 of 8 runs did not finish; 7 did. {tmp_path / 'grid'}\n" in said
    assert re.search(r"run 3  generations=0\n +generations=0 must be", said)


def test_joblib_gives_up_what_had_not_ended_and_the_summary_says_so(tmp_path: Path) -> None:
    grid = start(
        tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "generations=2,500,499,3"
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "grid" / "0" / rundir.RESULT_FILE).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_the_process_of(tmp_path / "grid" / "1")
    code, said = ended(grid)
    assert code == 1, said
    assert "sia: 3 of 4 runs did not finish; 1 did." in said
    assert re.search(r"run 1  generations=500\n +killed: ", said)
    assert re.search(r"run 3  generations=3\n +never began: ", said)
    assert rundir.status(tmp_path / "grid" / "0") == "finished"


def test_a_bug_in_one_run_shows_its_traceback_and_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "buggy.py").write_text(
        "class Broken(Exception):\n"
        "    def __init__(self, one, two):  # cannot be unpickled\n"
        "        super().__init__(f'{one} {two}')\n\n"
        "class Backend:\n"
        "    def __init__(self, **settings):\n"
        "        pass\n"
        "    def __getattr__(self, name):\n"
        "        raise Broken('lost', 'screw')\n"
    )
    grid = start(
        tmp_path, "hydra/launcher=submitit_local", "trusted_packages=[buggy]", "generations=1",
        "meta._target_=buggy.Backend,sia.meta.scripted.Scripted", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    code, said = ended(grid)
    assert code == 1, said
    assert statuses(tmp_path / "grid")["1"] == "finished"
    assert re.search(r"run 0  meta._target_=buggy.Backend\n +Broken: lost screw\n", said)
    (log,) = re.findall(r"it printed: (\S+)", said)
    assert "in __getattr__\n" in Path(log).read_text()


def test_a_grid_may_lie_in_a_folder_with_a_strange_name(tmp_path: Path) -> None:
    folder = tmp_path / "it's, a=grid"
    folder.mkdir()
    grid = start(folder, "hydra/launcher=submitit_local", "generations=1", "seed=0,1")
    assert ended(grid)[0] == 0
    assert statuses(folder / "grid") == {"0": "finished", "1": "finished"}
