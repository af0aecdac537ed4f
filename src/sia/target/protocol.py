"""The target as the loop sees it."""

from pathlib import Path
from typing import Protocol

from sia.records import Attempt


class Target(Protocol):
    """Runs candidates. One bad candidate never raises: its attempt says what went wrong."""

    def run(
        self,
        candidate: str,
        *,
        harness: Path,
        out: Path,
        deadline_s: float,
        policy: Path | None = None,
    ) -> Attempt:
        """Executes one candidate on the public side of the task, with its policy if it has one.

        Leaves in `out`: `submission/`, `agent_execution/`, `stdout.log`, `stderr.log`,
        `usage.json`.
        Called from several threads. Kills every process of the attempt before it returns.

        Raises:
            TargetError: No attempt can be started at all (sandbox or environment broken).
            KeyboardInterrupt: `cancel` was called.
        """
        ...

    def cancel(self) -> None:
        """Makes every `run`, in progress or to come, kill its processes and raise."""
        ...
