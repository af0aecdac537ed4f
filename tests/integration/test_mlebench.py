"""Competitions of MLE-bench as tasks, with a stand-in for the package and for Kaggle."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from sia import rundir
from sia.tasks.mlebench import table_settings

STAND_IN = Path(__file__).parent / "mlebench_stand_in"
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has all that this one has, and the stand-in."""
    root = tmp_path_factory.mktemp("venv")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=60
    )
    (packages,) = root.glob("lib/python*/site-packages")
    # A .pth file of the parent is not read through a .pth file: site adds its folder with them.
    lines = [f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})", str(STAND_IN)]
    (packages / "stand_in.pth").write_text("\n".join(lines))
    return root / "bin" / "python"


@pytest.fixture
def python(interpreter: Path, tmp_path: Path) -> Python:
    def run(
        *args: str, program: Path = interpreter, **env: str
    ) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if "KAGGLE" not in name}
        return subprocess.run(
            [str(program), "-m", *args],
            cwd=tmp_path, env={**clean, "HOME": str(tmp_path), **env}, capture_output=True,
            text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    return run


def test_without_the_package_the_steps_are_named(python: Python) -> None:
    done = python("sia.tasks.mlebench", "spaceship-titanic", program=Path(sys.executable))
    assert done.returncode == 2
    for step in ("pip install", "kaggle.json", "accept the rules", "sia.tasks.mlebench spaceship"):
        assert step in done.stderr


def test_a_competition_becomes_a_task_that_improves(python: Python, tmp_path: Path) -> None:
    token = {"KAGGLE_USERNAME": "somebody", "KAGGLE_KEY": "something"}
    done = python("sia.tasks.mlebench", "flower-colours", **token)
    assert done.returncode == 0, done.stderr
    assert "accuracy, maximize, {'dev': 50, 'test': 50}" in done.stdout
    root = tmp_path / "tasks" / "mlebench-flower-colours"
    public = {path.name for path in (root / "data" / "public").iterdir()}
    assert public == {"train.csv", "test.csv", "sample_submission.csv", "task.md"}
    assert "Which colour does a flower have?" in (root / "task.md").read_text()

    done = python("sia.tasks", "check", "tasks/mlebench-flower-colours")
    assert (done.returncode, done.stdout) == (0, "mlebench-flower-colours: 0 faults\n")
    run = ["task=folder", "task.dir=tasks/mlebench-flower-colours", "sandbox=process"]
    done = python("sia", *run, "generations=2", "tracking=none", "hydra.run.dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert python("sia.exam", "run").returncode == 0
    exam = rundir.read_exam(tmp_path / "run")
    assert exam is not None
    first, best = exam.rows
    assert (first.test or 1) < 0.7
    assert (best.test or 0) > 0.9
    assert best.low is not None  # the items are known, so there is an interval

    again = python("sia.tasks.mlebench", "flower-colours")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    # What mlebench has prepared once needs no token.
    assert python("sia.tasks.mlebench", "flower-colours", "--out", "other").returncode == 0


def test_missing_credentials_rules_and_names_are_told(python: Python, tmp_path: Path) -> None:
    done = python("sia.tasks.mlebench", "flower-colors")
    assert "Did you mean 'flower-colours'?" in done.stderr
    done = python("sia.tasks.mlebench", "flower-heights")
    assert "Make a token" in done.stderr
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle" / "kaggle.json").write_text("{}")
    done = python("sia.tasks.mlebench", "flower-heights")
    assert "must accept the competition rules" in done.stderr
    assert "mlebench prepare -c flower-heights" in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize(
    ("train", "sample", "metric", "answer"),
    [
        ("id,x,y\n1,2,a\n", "id,y\n3,a\n", "accuracy", "class"),
        ("id,x,y\n1,2,0\n2,2,1\n", "id,y\n3,0.5\n", "auc_roc", "chance"),
        ("id,x,y\n1,2,0\n2,2,1\n", "id,y\n3,0\n", "accuracy", "class"),
        ("id,x,y\n" + "".join(f"{k},0,{k}\n" for k in range(30)), "id,y\n3,0\n", "rmse", "number"),
        ("x,y\n1,2\n", "id,y\n3,0\n", "rmse", None),
        ("id,x,y\n1,2,0\n", "id,y,z\n3,0,0\n", "log_loss", None),
    ],
)
def test_what_the_reference_target_answers_follows_from_the_files(
    tmp_path: Path, train: str, sample: str, metric: str, answer: str | None
) -> None:
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "test.csv").write_text("id,x\n3,1\n")
    (tmp_path / "sample_submission.csv").write_text(sample)
    found = table_settings(tmp_path, metric)
    assert (found["answer"] if found else None) == answer
