"""The first minute of a newcomer: what `make demo` and `make test` say where they cannot go on."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("scripts", "src", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for constraints in ROOT.glob("constraints*.txt"):
        shutil.copy(constraints, tmp_path)
    return tmp_path


def setup(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return call(checkout, "scripts/setup", "base", **env)


def call(checkout: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=checkout, env={**os.environ, **env}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_python_that_is_too_old_is_named(checkout: Path) -> None:
    tools = checkout / "tools"
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        program(tools, name, '[ "$1" = --version ] && echo "Python 3.9.2" || exit 1')
    done = setup(checkout, PATH=f"{tools}:/usr/bin:/bin", PYTHON="")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer, found Python 3.9.2" in done.stderr
    assert "PYTHON=/path/to/python3.11 make demo" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_disk_without_room_is_named_before_anything_is_written(checkout: Path) -> None:
    tools = checkout / "tools"
    program(tools, "df", 'echo "Filesystem 1M-blocks Used Available"; echo "disk 100 90 10 90% /"')
    done = setup(checkout, PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "needs 2048 MiB of free disk here, found 10 MiB" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_package_index_out_of_reach_is_named_and_the_next_call_tries_again(
    checkout: Path,
) -> None:
    away = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "scripts")}
    for _ in range(2):
        done = setup(checkout, **away)
        assert done.returncode == 2
        assert "the package index cannot be reached" in done.stderr
        assert "make demo" in done.stderr
    assert not list((checkout / ".venv").glob(".sia-*"))


def test_a_python_too_old_for_openhands_is_named(checkout: Path) -> None:
    tools = checkout / "tools"
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python"):
        program(tools, name, '[ "$1" = --version ] && echo "Python 3.11.7" || exit 1')
    done = call(
        checkout, "scripts/openhands", HOME=str(checkout), PATH=f"{tools}:/usr/bin:/bin",
        PYTHON="", PYENV_ROOT=str(checkout),
    )  # fmt: skip
    assert done.returncode == 2
    assert "needs Python 3.12 or newer, found Python 3.11.7" in done.stderr
    assert "PYTHON=/path/to/python3.12 scripts/openhands" in done.stderr
    assert not (checkout / ".venv-openhands").exists()
