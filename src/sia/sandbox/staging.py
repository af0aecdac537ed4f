"""What is put in front of a sandboxed program, and cleared away after it."""

import os
import shutil
import subprocess
from pathlib import Path

from sia.errors import TargetError


def copy_read_only(source: Path, target: Path, *, follow_links: bool) -> Path:
    """A copy of a folder whose files are read-only. Returns `target`."""

    def copy_file(file: str, copy: str) -> None:
        shutil.copyfile(file, copy, follow_symlinks=follow_links)
        if not os.path.islink(copy):
            os.chmod(copy, 0o444)

    shutil.copytree(source, target, symlinks=not follow_links, copy_function=copy_file)
    return target


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
