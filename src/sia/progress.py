"""What a person sees while a run goes on: a live view, or plain lines without a terminal."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sia import spend
from sia.gateway.protocol import Role, Spend
from sia.loop import Closed, Event, Proposed, Scored, Started
from sia.records import Ending, Lever, Outcome, Result
from sia.tasks.task import Metric

SHOWN_GENERATIONS = 12


class Clock(Protocol):
    """Seconds the run has used so far."""

    @property
    def elapsed_s(self) -> float:
        """Earlier sessions included."""
        ...


class Progress:
    """Shows the events of one run; use as a context manager.

    Args:
        console: Where; a live view if it is a terminal, plain lines if not.
        metric: What the scores mean.
        generations: At most so many.
        wall_s: The budget; None for no limit.
        clock: Of the run.
        spent: What model calls have cost so far, asked several times a second; None without a
            gateway.
    """

    def __init__(
        self,
        console: Console,
        *,
        metric: Metric,
        generations: int,
        wall_s: float | None,
        clock: Clock,
        spent: Callable[[], Mapping[Role, Spend]] | None = None,
    ) -> None:
        self._console = console
        self._metric = metric
        self._generations = generations
        self._wall_s = wall_s
        self._clock = clock
        self._spent = spent
        self._rows: list[tuple[str, ...]] = []
        self._now = "starting"
        self._since = time.monotonic()
        self._incumbent: Result | None = None
        self._lock = threading.Lock()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                console=console, get_renderable=self._render, refresh_per_second=4, transient=True
            )

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
            self._console.print(self._table(self._rows))

    def update(self, event: Event) -> None:
        """Takes in one event of the loop."""
        with self._lock:
            self._since = time.monotonic()
            if isinstance(event, Started):
                ids = ",".join(parent.id for parent in event.parents) or "the first harness"
                self._now = (
                    f"generation {event.generation}, {event.decision.lever} lever: from {ids}"
                )
                self._line(
                    f"generation {event.generation}  lever={event.decision.lever}  parent={ids}"
                )
            elif isinstance(event, Proposed):
                trains = event.candidate.lever is Lever.WEIGHTS
                doing = "updating the weights, then running" if trains else "running"
                self._now = f"{event.candidate.id}: {doing}"
            elif isinstance(event, Scored):
                self._scored(event.result)
            elif isinstance(event, Closed):
                self._incumbent = event.incumbent
                index = event.generation.index
                self._now = f"generation {index} closed, deciding"
                if paid := self._paid():
                    self._line(f"generation {index}  spent so far {paid}")
            elif isinstance(event, Ending):
                self._now = f"ended: {event.reason}"
                self._line(f"ended  {event.detail}")

    def _scored(self, result: Result) -> None:
        best = self._incumbent.score if self._incumbent else None
        score = result.score
        if score is None:
            mark, shown = "failed", "-"
        elif result.outcome is Outcome.DUPLICATE:
            mark, shown = "tried before", f"{score:.4f}"
        elif best is None or self._metric.better(score, best):
            mark, shown = "new best", f"{score:.4f}"
        else:
            mark, shown = "kept the incumbent", f"{score:.4f}"
        proposal = result.candidate.proposal
        note = _first(result.reason) or ", ".join(f"{k}={v}" for k, v in proposal.changes.items())
        if result.update is not None and result.update.taken_s:
            note += f" (policy taken over: {result.update.taken_s:.0f} s)"
        row = (
            str(result.candidate.generation), result.candidate.id, proposal.source or "-", shown,
            "-" if best is None else f"{best:.4f}", mark, note,
        )  # fmt: skip
        self._rows.append(row)
        self._line(
            f"{row[1]}  {self._metric.name}/dev={row[3]}  incumbent={row[4]}  {row[5]}  {row[6]}"
        )

    def _paid(self) -> str:
        return "" if self._spent is None else spend.line(self._spent())

    def _line(self, text: str) -> None:
        if self._live is None:
            self._console.print(
                f"[{self._clock.elapsed_s:7.1f} s] {text}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _render(self) -> RenderableType:
        with self._lock:
            left = "no limit"
            if self._wall_s is not None:
                left = f"{max(0.0, self._wall_s - self._clock.elapsed_s):.0f} s left"
            best = self._incumbent.score if self._incumbent else None
            paid = self._paid()
            status = Text(
                f"{self._now} ({time.monotonic() - self._since:.0f} s)   "
                f"elapsed {self._clock.elapsed_s:.0f} s, {left}   "
                f"best {'-' if best is None else f'{best:.4f}'}   "
                f"at most {self._generations} generations" + (f"   {paid}" if paid else "")
            )
            return Group(self._table(self._rows[-SHOWN_GENERATIONS:]), status)

    def _table(self, rows: Iterable[tuple[str, ...]]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, right in (
            ("gen", True), ("candidate", False), ("source", False),
            (f"{self._metric.name}/dev", True), ("incumbent", True),
            ("", False), ("changes", False),
        ):  # fmt: skip
            table.add_column(
                name, justify="right" if right else "left", overflow="ellipsis", no_wrap=True
            )
        for row in rows:
            # Notes may quote what a target printed: as text they cannot steer the terminal.
            table.add_row(*(Text(_printable(cell)) for cell in row))
        return table


def _first(text: str) -> str:
    return _printable(text.strip().splitlines()[0]) if text.strip() else ""


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "�" for char in text)
