"""What is put in front of a sandboxed program, and cleared away after it."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sia.errors import TargetError

# Listings are part of what a model is told, and a repeated run must tell it the same.
STAGED_AT = 946_684_800  # 2000-01-01


def copy_read_only(source: Path, target: Path, *, follow_links: bool) -> Path:
    """A copy of a folder whose files are read-only. Returns `target`."""

    def copy_file(file: str, copy: str) -> None:
        shutil.copyfile(file, copy, follow_symlinks=follow_links)
        if not os.path.islink(copy):
            os.chmod(copy, 0o444)

    shutil.copytree(source, target, symlinks=not follow_links, copy_function=copy_file)
    return target


def hand_over(work: Path, owner: int | None, *, executable: Path | None = None) -> None:
    """Makes everything in a folder the sandboxed program's own, whatever our umask, and of one age.

    Args:
        work: The folder.
        owner: User id; None where it is ours.
        executable: The one file that may be run.
    """
    for folder, folders, files in os.walk(work):
        for path in (*(Path(folder, name) for name in (*folders, *files)), Path(folder)):
            if path.is_symlink():
                continue
            path.chmod(0o755 if path.is_dir() or path == executable else 0o644)
            if owner is not None:
                os.chown(path, owner, owner)
            os.utime(path, (STAGED_AT, STAGED_AT))


def write_logs(out: Path, *, stdout: str, stderr: str, usage: Mapping[str, object]) -> None:
    """Writes what a program printed and used: `stdout.log`, `stderr.log`, `usage.json`."""
    (out / "stdout.log").write_text(stdout, encoding="utf-8")
    (out / "stderr.log").write_text(stderr, encoding="utf-8")
    (out / "usage.json").write_text(json.dumps(usage, indent=1) + "\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Removes a file or a folder, whatever a program has done to it.

    Raises:
        TargetError: It cannot be removed.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except (OSError, RecursionError):
        # Folders closed to us, or nested deeper than Python can follow.
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", str(path)], capture_output=True, check=False)
        if os.path.lexists(path):
            raise TargetError(f"{path} cannot be removed. Try: rm -rf {path}") from None
