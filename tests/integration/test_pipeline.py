"""The cells of a paper with the real DVC, in a copy of the project with a small paper."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sia import rundir
from sia.errors import ConfigError, RunDirectoryError
from sia.gateway.scripted import read_rules, serving
from sia.pipeline import fingerprint, prepare, write_tables
from sia.rundir import read_info, read_journal

ROOT = Path(__file__).resolve().parents[2]
PAPER = {
    "levers": {"task": ["toy"], "arm": ["harness"], "seed": [0]},
    "search": {"task": ["toy"], "arm": ["best_of_n"], "seed": [0, 1]},
}
CELLS = ("toy-harness-s0", "toy-best_of_n-s0", "toy-best_of_n-s1")


class Project:
    """A copy of the project in a repository of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("conf", "src", "tasks/toy"):
            shutil.copytree(
                ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "data")
            )
        for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, root / name)
        (root / "src/sia/conf").symlink_to(root / "conf")  # as the installed package has it
        self.params(paper=PAPER)
        self.edit("conf/config.yaml", "tracking: mlflow", "tracking: none")  # half of the time
        self.run("git", "init", "--quiet")
        self.dvc("init", "--quiet")
        self.run(sys.executable, "-m", "sia.tasks", "split", "toy", "--seed", "0")

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(self.root / "src"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
        }

    def run(
        self, *command: str, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.root, env=self.environment | variables, timeout=300,
            text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def dvc(self, *arguments: str, check: bool = True) -> str:
        done = self.run(sys.executable, "-m", "dvc", *arguments, check=check)
        return done.stdout + done.stderr

    def repro(self, *arguments: str) -> list[str]:
        """The stages that were run, without the matrix: `run_search@toy-best_of_n-0`."""
        lines = self.dvc("repro", *arguments).splitlines()
        return [line.split("'")[1] for line in lines if line.startswith("Running stage")]

    def params(self, **changes: object) -> None:
        path = self.root / "params.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.root / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def path(self, cell: str) -> Path:
        return self.root / "runs/paper" / cell


TARGETS = ("table_levers", "table_search")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("paper"))
    project.repro(*TARGETS)
    return project


def test_a_second_reproduction_does_nothing(finished: Project) -> None:
    assert finished.repro(*TARGETS) == []
    for cell in CELLS:
        exam = rundir.read_exam(finished.root / "build/exams" / cell)
        assert exam is not None
        assert exam.run_id == read_info(finished.path(cell)).run_id


def test_the_fingerprint_is_the_configuration_of_the_run(finished: Project) -> None:
    for cell in CELLS:
        wanted = yaml.safe_load((finished.root / f"build/config/{cell}.yaml").read_text())
        recorded = yaml.safe_load((finished.path(cell) / "config.yaml").read_text())
        del recorded["target"]["update_cache"]  # changes no record
        assert wanted["config"].items() <= recorded.items()
        assert recorded.keys() - wanted["config"].keys() <= {
            "tracking", "workers", "experiment", "debug", "sweep", "resume",
        }  # fmt: skip


def test_a_comment_runs_nothing_dear_and_a_value_its_own_cells(finished: Project) -> None:
    before = {cell: read_info(finished.path(cell)).run_id for cell in CELLS}
    name = "conf/experiment/toy_best_of_n.yaml"
    finished.edit(name, "# The cells", "# These are the cells")
    assert {stage.partition("@")[0] for stage in finished.repro(*TARGETS)} == {
        "config_levers", "config_search",
    }  # fmt: skip

    finished.edit(name, "generations: 3", "generations: 2")
    assert {stage for stage in finished.repro(*TARGETS) if not stage.startswith("config")} == {
        "run_search@toy-best_of_n-0", "exam_search@toy-best_of_n-0",
        "run_search@toy-best_of_n-1", "exam_search@toy-best_of_n-1", "table_levers", "table_search",
    }  # fmt: skip
    after = {cell: read_info(finished.path(cell)).run_id for cell in CELLS}
    assert [cell for cell in CELLS if before[cell] == after[cell]] == ["toy-harness-s0"]
    moved = [read_info(path).run_id for path in (finished.root / "runs/paper/replaced").iterdir()]
    assert sorted(moved) == sorted(before[cell] for cell in CELLS[1:])
    assert finished.repro(*TARGETS) == []


def test_a_killed_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.edit("conf/experiment/toy_harness.yaml", "generations: 3", "generations: 12")
    stage = ("repro", "run_levers@toy-harness-0")
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *stage], cwd=project.root, env=project.environment,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    run = project.path("toy-harness-s0")
    deadline = time.monotonic() + 120
    while not (run / "gen-003").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    known = read_info(run).run_id
    done = read_journal(run)
    assert rundir.read_result(run) is None

    project.dvc(*stage)
    assert read_info(run).run_id == known
    assert read_journal(run)[: len(done)] == done
    result = rundir.read_result(run)
    assert result is not None
    assert result.status == "finished"


def test_the_tables_are_made_from_records_alone(finished: Project, tmp_path: Path) -> None:
    """What `dvc pull` of the exams gives is enough: no run, no data."""
    records = finished.root / "build/exams"
    assert sorted(path.name for path in records.iterdir()) == sorted(CELLS)
    for cell in CELLS:
        names = {path.name for path in (records / cell).iterdir()}
        assert names == {"run.json", "config.yaml", "journal.jsonl", "result.json", "exam.json"}
    made = finished.root / "reports/paper/search/toy"
    table = (made / "arms.md").read_text()
    for cell in CELLS[1:]:
        assert read_info(finished.path(cell)).run_id in table
    assert "| reference |" in table

    elsewhere = shutil.copytree(records, tmp_path / "exams")
    shutil.copytree(elsewhere / CELLS[0], elsewhere / "toy-dropped-s0")  # of an arm that is no more
    write_tables(elsewhere, tmp_path / "out", ["toy"], ["best_of_n"], ["0", "1"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/toy").iterdir()} == {
        path.name: path.read_bytes() for path in made.iterdir()
    }


def test_a_missing_cell_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="toy-harness-s0"):
        write_tables(tmp_path, tmp_path / "out", ["toy"], ["harness"], ["0"])


def test_a_recorded_run_of_a_language_model_is_repeated_without_it(tmp_path: Path) -> None:
    pytest.importorskip("pydantic_ai")
    project = Project(tmp_path)
    asks = ["task=toy", "meta=pydantic_ai", "meta.model=scripted-1", "provider=scripted"]
    with serving(read_rules(ROOT / "docs" / "rehearsal.yaml")) as scripted:
        project.run(
            sys.executable, "-m", "sia", *asks, "generations=2", "hydra.run.dir=recordings/toy",
            SIA_SCRIPTED_URL=scripted.url,
        )  # fmt: skip
    (project.root / "conf/experiment/toy_recorded.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - override /task: toy\n"
        "  - override /provider: scripted\n"
        "  - override /meta: pydantic_ai\n"
        "meta: {model: scripted-1}\n"
        "generations: 2\n"
        "gateway: {mode: replay, recording: recordings/toy}\n"
    )
    cells = {"task": ["toy"], "arm": ["recorded"], "seed": [0]}
    project.params(paper={"levers": PAPER["levers"], "search": cells})
    project.repro("exam_search")
    run = project.path("toy-recorded-s0")
    assert rundir.records(run) == rundir.records(project.root / "recordings/toy")
    elsewhere = project.run(
        sys.executable, "-m", "sia.pipeline", "run", "runs/paper/toy-recorded-s0",
        "experiment=toy_recorded", "seed=0", SIA_SCRIPTED_URL="http://127.0.0.1:1",
    )  # fmt: skip
    assert elsewhere.stdout.startswith("finished")


def without(run: Path, key: str) -> None:
    path = run / "config.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != key})
    )


def test_an_option_that_came_after_the_run_is_no_other_meaning_at_its_default(
    finished: Project, tmp_path: Path
) -> None:
    cell = ["experiment=toy_best_of_n", "seed=1", "generations=2"]
    run = shutil.copytree(finished.path("toy-best_of_n-s1"), tmp_path / "run")
    without(run, "levers")
    assert prepare(run, cell) is None
    without(run, "seed")  # 1 is not its default
    assert prepare(run, cell) == [*cell, f"hydra.run.dir={run}"]
    assert not run.exists()
    assert len(list((tmp_path / "replaced").iterdir())) == 1


def test_a_paid_cell_needs_a_cap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cell = ["task=toy", "meta=claude", "provider=anthropic"]
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-key")
    monkeypatch.delenv("SIA_MAX_COST_USD", raising=False)
    with pytest.raises(ConfigError, match="SIA_MAX_COST_USD=5 dvc repro"):
        prepare(tmp_path / "run", cell)
    monkeypatch.setenv("SIA_MAX_COST_USD", "much")
    with pytest.raises(ConfigError, match="'much'"):
        prepare(tmp_path / "run", cell)
    monkeypatch.setenv("SIA_MAX_COST_USD", "2.5")
    assert "budget.usd=2.5" in (prepare(tmp_path / "run", cell) or [])
    assert "budget.usd=2.5" not in (prepare(tmp_path / "run", [*cell, "budget.usd=1"]) or [])
    monkeypatch.delenv("SIA_MAX_COST_USD")
    assert prepare(tmp_path / "run", [*cell, "budget.usd=1"]) is not None


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        prepare(tmp_path, ["task=toy"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_changes_no_record_is_not_in_the_fingerprint() -> None:
    plain = fingerprint(["task=toy"])
    assert fingerprint(["task=toy", "workers=2", "tracking=none"]) == plain
    assert fingerprint(["task=toy", "seed=1"]) != plain
