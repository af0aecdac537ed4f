"""The main job on real data, as far as a test suite has time for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from sia import rundir
from sia.tasks import find_task_dir, load_task


def test_the_reference_harness_of_lawbench_learns_and_explains_its_worst_items(
    tmp_path: Path,
) -> None:
    if not load_task(find_task_dir("tasks/lawbench")).has_data():
        pytest.skip("no data: dvc repro split@lawbench")
    run = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, "-m", "sia", "generations=1", "tracking=none", f"hydra.run.dir={run}",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = rundir.read_result(run)
    assert found is not None
    assert found.best_score is not None
    assert found.best_score > 0.70
    records = rundir.records(run)
    assert records["0000/0/evaluation"]["n_answered"] == 800
    assert records["0000/0/attempt"]["trajectories"] > 0
    assert list((run / "gen-000" / "cand-0" / "agent_execution").glob("execution_q*.json"))
