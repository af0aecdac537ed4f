"""The weights lever as the loop and the meta backend see it; imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sia.records import Choice, Update


class WeightUpdate(Protocol):
    """Trains the target's policy on train items. One failed update never raises."""

    @property
    def menu(self) -> Sequence[Choice]:
        """What may be chosen; empty where the lever is off."""
        ...

    def update(
        self,
        candidate: str,
        *,
        recipe: str,
        settings: Mapping[str, Any],
        parent: Path | None,
        out: Path,
        seed: int,
        deadline_s: float,
    ) -> Update:
        """Makes the policy of one candidate.

        Args:
            candidate: Its id.
            recipe: A name of the menu.
            settings: What differs from the recipe's own.
            parent: Folder of the policy to start from; None: the base.
            out: Folder of the new policy: made whole, or not at all.
            seed: Of everything random.
            deadline_s: Whatever the update has by then is what it gives.

        Raises:
            KeyboardInterrupt: `cancel` was called.
        """
        ...

    def cancel(self) -> None:
        """Makes every `update`, in progress or to come, kill its processes and raise."""
        ...
