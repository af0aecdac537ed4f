"""The sealed test: opened once, after the run, and nothing before that can reach it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sia import exam, records, rundir
from sia.errors import RunDirectoryError, TaskError
from sia.records import Exam
from sia.tasks import Task

Make = Callable[..., Path]


@pytest.fixture
def make(toy: Task, tmp_path: Path) -> Make:
    """A finished run on a toy task of its own."""

    def run(*args: str, name: str = "run", code: int = 0) -> Path:
        done = subprocess.run(
            [
                sys.executable, "-m", "sia", "task=toy", f"task.dir={toy.root}", "tracking=none",
                "sandbox=process", f"hydra.run.dir={tmp_path / name}", *args,
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return tmp_path / name

    return run


def rows(found: Exam) -> dict[str, float | None]:
    return {row.name: row.test for row in found.rows}


def test_the_exam_examines_the_recorded_answers_of_the_chosen_candidate(
    make: Make, toy: Task
) -> None:
    run = make("generations=3")
    found = exam.examine(run)
    assert list(rows(found)) == ["reference harness", "best by dev", "final refit"]
    best = found.rows[1]
    assert best.candidate == "g001-c0"
    assert best.dev == 0.965
    assert best.test is not None
    assert best.low is not None
    assert best.high is not None
    assert best.low <= best.test <= best.high
    assert best.gain == pytest.approx(best.test - (found.rows[0].test or 0))
    assert found.rows[2].dev is None
    assert "dev labels added to train" in found.rows[2].note
    assert rundir.read_exam(run) == found
    assert not (run / "exam" / "public").exists()


def test_a_refit_that_fails_is_a_row_with_its_reason(make: Make, toy: Task) -> None:
    run = make("generations=1")
    # It works on the public data, and crashes on those with the dev labels.
    entry = run / "gen-000" / "cand-0" / "harness" / "target_agent.py"
    entry.write_text(
        entry.read_text().replace(
            "    args = parser.parse_args()\n",
            "    args = parser.parse_args()\n"
            "    assert len((args.dataset_dir / 'train.csv').read_text().splitlines()) == 201\n",
        )
    )
    refit = exam.examine(run).rows[-1]
    assert (refit.name, refit.candidate, refit.test) == ("final refit", "g000-c0", None)
    assert refit.note.startswith("crashed: exit code 1: AssertionError")


def test_a_first_harness_of_ones_own_is_measured_against_the_reference(
    make: Make, toy: Task, tmp_path: Path
) -> None:
    shutil.copytree(toy.reference_harness, tmp_path / "mine")
    (tmp_path / "mine" / "harness.yaml").write_text("threshold: 0.4\nturn: 0\n")
    run = make("generations=1", "target.harness=mine", "exam.final_refit=false")
    assert f"harness: {tmp_path / 'mine'}" in (run / "config.yaml").read_text()
    found = exam.examine(run)
    assert list(rows(found)) == ["reference harness", "best by dev"]


def test_the_exam_is_held_once_and_the_search_is_over(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make("generations=1", "exam.final_refit=false")
    assert exam.main([str(run)]) == 0
    content = (run / "exam.json").read_bytes()
    assert exam.main([str(run)]) == 0
    assert (run / "exam.json").read_bytes() == content
    assert "reference harness (g000-c0)" in capsys.readouterr().out
    with pytest.raises(RunDirectoryError, match="its search is over"):
        rundir.RunDir.resume(run)


def test_two_exams_of_one_record_say_the_same(make: Make) -> None:
    first = exam.examine(make("generations=2", name="a"), final_refit=False)
    second = exam.examine(make("generations=2", name="b"), final_refit=False)

    def timeless(found: Exam) -> list[dict[str, object]]:
        text = json.loads(records.to_json(found))
        return [{**row, "seconds": None} for row in text["rows"]]

    assert timeless(first) == timeless(second)


def test_a_run_that_has_not_finished_cannot_be_examined(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make("generations=2")
    (run / "result.json").unlink()
    assert exam.main([str(run)]) == 2
    assert "python -m sia resume=" in capsys.readouterr().err
    assert not (run / "exam.json").exists()
    assert exam.main([str(tmp_path / "absent")]) == 2


def test_other_data_than_those_of_the_run_are_refused(make: Make, toy: Task) -> None:
    run = make("generations=1")
    items = toy.public_dir / "items.csv"
    items.write_text(items.read_text() + "n9999,0.5\n")
    with pytest.raises(TaskError, match="not those of the run"):
        exam.examine(run)


def test_another_version_of_the_task_is_refused(make: Make, toy: Task) -> None:
    run = make("generations=1")
    path = toy.root / "task.yaml"
    path.write_text(path.read_text().replace("version: 1", "version: 2"))
    with pytest.raises(TaskError, match="version 1 of task 'toy', this is version 2"):
        exam.examine(run)


def test_a_baseline_that_fails_is_a_row_with_its_reason(make: Make, toy: Task) -> None:
    run = make("generations=1")
    folder = toy.root / "baselines" / "broken"
    folder.mkdir(parents=True)
    (folder / "target_agent.py").write_text("1 / 0\n")
    with (toy.root / "task.yaml").open("a") as file:
        file.write("baselines: {broken: baselines/broken}\n")
    found = exam.examine(run, final_refit=False)
    row = next(row for row in found.rows if row.name == "broken")
    assert row.test is None
    assert "ZeroDivisionError" in row.note


def test_the_run_itself_never_opens_the_test_labels(make: Make, toy: Task) -> None:
    """The loop works with the test side taken away from the machine altogether."""
    labels = toy.labels_dir("test") / "labels.csv"
    content = labels.read_bytes()
    labels.write_bytes(b"sealed")
    run = make("generations=3")
    labels.write_bytes(content)
    assert rows(exam.examine(run, final_refit=False))["best by dev"] == 0.955
