"""What every harness must be, whatever the task."""

import ast
from pathlib import Path

from sia.errors import BadProposal
from sia.tasks.task import ENTRY_POINT


def check_harness(harness: Path) -> None:
    """Finds what would make an attempt useless before it costs anything.

    Raises:
        BadProposal: The entry point is missing, empty, or not Python.
    """
    entry = harness / ENTRY_POINT
    if entry.is_symlink() or not entry.is_file():
        raise BadProposal(f"the harness has no file {ENTRY_POINT}")
    try:
        tree = ast.parse(entry.read_bytes(), filename=ENTRY_POINT)
    except (SyntaxError, ValueError) as error:
        raise BadProposal(f"{ENTRY_POINT} is not valid Python: {error}") from error
    if not tree.body:
        raise BadProposal(f"{ENTRY_POINT} is empty")
