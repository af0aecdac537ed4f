"""What a person sees of an update that runs in a terminal."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepProgress(Callback):
    """A bar over the optimiser steps with loss and mean reward, on stderr; silent elsewhere."""

    def __init__(self, *, total: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("update"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("update", total=total, state="")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Shows the bar."""
        self._progress.update(self._bar, completed=len(pl_module.curve))
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        last = pl_module.curve[-1]
        reward = "" if last["reward"] is None else f"  reward {last['reward']:.3f}"
        state = f"loss {last['loss']:+.4f}{reward}"
        self._progress.update(self._bar, completed=last["step"], state=state)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Takes the bar away, also after a failure."""
        self._progress.stop()
