"""Tasks in the format of Harbor: those without a container run, the others say what they need."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from sia import rundir
from sia.errors import TargetError, TaskError
from sia.records import Evaluation, Outcome
from sia.sandbox import Bwrap
from sia.tasks import Task, checks
from sia.tasks.harbor import open_harbor, read_dockerfile
from sia.verify import TaskVerifier

TOML = """
schema_version = "1.1"
[task]
name = "demo/sums"
description = "Add up a column"
[agent]
timeout_sec = 60.0
[verifier]
timeout_sec = 30.0
[environment]
cpus = 1
memory_mb = 2048
"""
DOCKERFILE = """
FROM python:3.12-slim
LABEL maintainer=nobody
WORKDIR /app
ENV UNIT=grams \\
    OTHER="two words"
COPY numbers.txt ./
RUN mkdir -p /logs
"""
TEST_SH = """
#!/bin/bash
# apt-get is not needed here
mkdir -p /logs/verifier
if [ "$(cat /app/sum.txt)" = "$(cat /tests/expected.txt) $UNIT" ] && [ -f numbers.txt ]; then
  echo 1 > /logs/verifier/reward.txt
else
  echo 0 > /logs/verifier/reward.txt
fi
"""
TEST_PY = """
from pathlib import Path

def test_sum():
    assert Path("/app/sum.txt").read_text().split()[0] == Path("/tests/expected.txt").read_text().strip()
"""  # noqa: E501
SOLVE = 'echo "$(paste -sd+ numbers.txt | bc 2>/dev/null || echo 6) $UNIT" > /app/sum.txt\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "sums"
    for name, text in {
        "task.toml": TOML,
        "instruction.md": "Write the sum of /app/numbers.txt and $UNIT to /app/sum.txt.",
        "environment/Dockerfile": DOCKERFILE,
        "environment/numbers.txt": "1\n2\n3\n",
        "tests/test.sh": TEST_SH.lstrip(),
        "tests/expected.txt": "6\n",
        "solution/solve.sh": SOLVE,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def confined() -> None:
    try:
        Bwrap().check()
    except TargetError as error:
        pytest.skip(str(error))


def opened(folder: Path, tmp_path: Path) -> Task:
    return open_harbor(dir=str(folder), cache=str(tmp_path / "cache"))


Score = Callable[..., Evaluation]


@pytest.fixture
def score(tmp_path: Path) -> Score:
    def run(task: Task, **files: str) -> Evaluation:
        submission = tmp_path / "submission"
        shutil.rmtree(submission, ignore_errors=True)
        submission.mkdir()
        for name, text in files.items():
            (submission / name.replace("_", ".")).write_text(text)
        with closing(TaskVerifier(task=task, split="dev")) as verifier:
            return verifier.verify("g000-c0", submission)

    return run


def test_a_folder_is_staged_without_its_tests_on_the_public_side(
    folder: Path, tmp_path: Path
) -> None:
    task = opened(folder, tmp_path)
    public = {str(path.relative_to(task.public_dir)) for path in task.public_dir.rglob("*")}
    assert public == {"task.md", "environment", "environment/numbers.txt"}
    assert "Write the sum" in (task.root / "task.md").read_text()
    assert task.facts.title == "Add up a column"
    assert task.facts.limits.attempt_s == 60
    assert any("Nothing is sealed" in warning for warning in task.facts.warnings)


@pytest.mark.usefixtures("confined")
def test_the_solution_gets_the_reward_and_the_start_does_not(folder: Path, tmp_path: Path) -> None:
    assert list(checks.controls(opened(folder, tmp_path))) == []


@pytest.mark.usefixtures("confined")
def test_the_tests_see_what_was_left_where_they_expect_it(
    folder: Path, tmp_path: Path, score: Score
) -> None:
    task = opened(folder, tmp_path)
    assert score(task, sum_txt="6 grams\n").score == 1.0
    assert score(task, sum_txt="7 grams\n").score == 0.0
    (folder / "tests/test.sh").write_text("echo '{\"reward\": 0.25}' > /logs/verifier/reward.json")
    assert score(opened(folder, tmp_path)).score == 0.25
    (folder / "tests/test.sh").write_text("test -f /app/sum.txt")
    assert score(opened(folder, tmp_path)).score == 0.0
    assert score(opened(folder, tmp_path), sum_txt="").score == 1.0


@pytest.mark.usefixtures("confined")
def test_pytest_stands_in_for_a_script_that_fetches_it(
    folder: Path, tmp_path: Path, score: Score
) -> None:
    (folder / "tests/test.sh").write_text("apt-get install -y curl\nuvx pytest /tests\n")
    (folder / "tests/test_sum.py").write_text(TEST_PY)
    task = opened(folder, tmp_path)
    assert "run by pytest in its place" in task.facts.warnings[-1]
    assert score(task, sum_txt="6 grams\n").score == 1.0
    assert score(task, sum_txt="7 grams\n").score == 0.0


@pytest.mark.usefixtures("confined")
def test_tests_without_a_reward_are_the_tasks_fault_and_stay_private(
    folder: Path, tmp_path: Path, score: Score
) -> None:
    for script, message in (
        ("echo secret > /logs/verifier/reward.txt", "no number"),
        ("echo 7 > /logs/verifier/reward.txt", "not from 0 to 1"),
        ("echo secret; kill -9 $PPID", "could not be run"),
    ):
        (folder / "tests/test.sh").write_text(script)
        found = score(opened(folder, tmp_path))
        assert found.outcome is Outcome.VERIFIER_FAILED
        assert message in found.problem
        assert "secret" not in found.problem
    toml = (folder / "task.toml").read_text().replace("timeout_sec = 30.0", "timeout_sec = 0.5")
    (folder / "task.toml").write_text(toml)
    (folder / "tests/test.sh").write_text("sleep 60")
    assert "ran longer than 0.5 s" in score(opened(folder, tmp_path)).problem


@pytest.mark.usefixtures("confined")
def test_a_run_finds_the_program_that_gets_the_reward(folder: Path, tmp_path: Path) -> None:
    agent = """
import sys, pathlib
data, work = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[4])
numbers = (data / "environment" / "numbers.txt").read_text().split()
(work / "sum.txt").write_text(f"{sum(map(int, numbers))} grams\\n")
(work / "link").symlink_to("/etc/hostname")
"""
    script = [{"files": {"target_agent.py": agent}}]
    (tmp_path / "script.yaml").write_text(yaml.safe_dump(script))
    done = subprocess.run(
        [
            sys.executable, "-m", "sia", "task=harbor", f"task.dir={folder}", "meta=scripted",
            "meta.script=script.yaml", "generations=2", "tracking=none", "hydra.run.dir=run",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        check=False, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = rundir.read_result(tmp_path / "run")
    assert result is not None
    assert (result.best, result.best_score) == ("g001-c0", 1.0)
    submission = tmp_path / "run" / "gen-001" / "cand-0" / "submission"
    assert [path.name for path in submission.iterdir()] == ["sum.txt"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("environment/Dockerfile", "FROM python:3\nRUN apt-get install -y git", "apt-get install"),
        ("environment/Dockerfile", "FROM node:22", "FROM node:22"),
        ("environment/Dockerfile", "FROM python:3\nCOPY a /etc/a", "outside /app"),
        ("environment/Dockerfile", "FROM python:3\nCOPY --from=x a b", "COPY --from=x"),
        ("environment/docker-compose.yaml", "services: {}", "services beside"),
        ("task.toml", '[environment]\ndocker_image = "x/y"', "docker_image = 'x/y'"),
        ("task.toml", "[environment]\ngpus = 1", "gpus = 1"),
        ("task.toml", '[verifier.env]\nKEY = "${OPENAI_API_KEY}"', "ask a service"),
        ("task.toml", '[verifier]\nenvironment_mode = "separate"', "'separate'"),
        ("task.toml", '[[steps]]\nname = "one"', "several steps"),
        ("tests/test.sh", "pip install pytest", "fetches what it needs: 'pip install pytest'"),
    ],
)
def test_what_needs_a_container_is_said(
    folder: Path, tmp_path: Path, name: str, text: str, reason: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(TaskError, match="needs a container") as error:
        opened(folder, tmp_path)
    assert reason in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("task.toml", None, r"it has no task\.toml"),
        ("task.toml", "x = ", "cannot be read"),
        ("environment/numbers.txt", None, r"environment/numbers\.txt is not there"),
        ("tests/test.sh", None, r"neither test\.sh nor a test_\*\.py"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    (folder / name).unlink()
    if text:
        (folder / name).write_text(text)
    with pytest.raises(TaskError, match=message):
        opened(folder, tmp_path)


def test_a_dockerfile_is_read_as_far_as_files_and_variables_go(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        "FROM ubuntu:24.04\nWORKDIR /work\nWORKDIR sub\nENV A 1 2\nENV B=x C='y z'\n"
        'COPY . .\nCOPY ["a.txt", "b/"]\nADD c.txt d.txt e/\nCMD ["bash"]\n'
    )
    image = read_dockerfile(tmp_path)
    assert image.workdir == "/work/sub"
    assert image.env == {"A": "1 2", "B": "x", "C": "y z"}
    assert image.copies == (
        (".", "."),
        ("a.txt", "b/a.txt"),
        ("c.txt", "e/c.txt"),
        ("d.txt", "e/d.txt"),
    )
    assert image.obstacles == ()
