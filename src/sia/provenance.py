"""What a run depended on: code revision, packages, interpreter, hardware."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = (
    "dvc", "hydra-core", "jieba", "mlflow", "numpy", "omegaconf", "optuna", "scikit-learn", "scipy",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """A snapshot for `run.json`; a few milliseconds, no network, no secret."""
    import sia

    return {
        "sia": sia.__version__,
        "git": git_revision(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": _versions(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_mib": _memory_mib(),
    }


def git_revision(folder: Path) -> str:
    """Commit of the checkout that holds `folder`, with `+changes` if files differ; else empty."""
    try:
        git = ["git", "-C", str(folder)]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 5}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=False, **options)
        if commit.returncode != 0:
            return ""
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], check=False, **options
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"{commit.stdout.strip()}{'+changes' if changes.stdout.strip() else ''}"


def tree_sha256(folder: Path) -> str:
    """Digest of all regular files below `folder`: names, executable bits and contents.

    Symbolic links count by their target text; byte-code caches are left out.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if "__pycache__" in name.parts or (path.is_dir() and not path.is_symlink()):
            continue
        link = path.is_symlink()
        content = b"link:" + os.readlink(path).encode() if link else path.read_bytes()
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
