"""What the entry points need of a tracker."""

from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """Mirrors a run directory while the run goes on. Never raises: a run is worth more."""

    def start(self, run: Path) -> None:
        """Begins to mirror `run`; returns at once."""
        ...

    def finish(self) -> str:
        """Waits until everything written so far is mirrored, within a deadline.

        Returns:
            What went wrong, for the user; empty when all is mirrored.
        """
        ...
