"""The interpreter that tests of OpenHands run in."""

import functools
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints-openhands.txt"
BUILD_S = 900


@functools.cache
def openhands_python() -> str:
    """An interpreter with OpenHands: one that is named, the checkout's, or one built once."""
    if named := os.environ.get("SIA_OPENHANDS_PYTHON"):
        return named
    if (ours := ROOT / ".venv-openhands/bin/python").exists():
        return str(ours)
    build = ROOT / "scripts/openhands"
    digest = sha256(CONSTRAINTS.read_bytes() + build.read_bytes()).hexdigest()[:16]
    cache = Path(f"~/.cache/sia/test-openhands-{digest}").expanduser()
    (cache / "scripts").mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock", timeout=BUILD_S):
        shutil.copy(CONSTRAINTS, cache)
        shutil.copy(build, cache / "scripts")
        done = subprocess.run(
            ["scripts/openhands"], cwd=cache, capture_output=True, text=True, timeout=BUILD_S,
            check=False,
        )  # fmt: skip
    if "needs Python 3.12" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return str(cache / ".venv-openhands/bin/python")
