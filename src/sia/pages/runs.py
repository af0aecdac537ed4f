"""All runs of a folder: one line each, found and filtered without opening a journal that is over.

Runs.lines(chosen)    the lines that are asked for
Runs.open(key)       one of them as a whole
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sia import rundir, spend
from sia.errors import RunDirectoryError
from sia.gateway.protocol import Spend
from sia.pages.files import Folder, NotThere
from sia.pages.run import (
    MAX_RECORD,
    RunReader,
    is_locked,
    metric_of,
    read_info,
    read_optional,
    status_of,
)
from sia.records import Exam, RunResult
from sia.rundir import CONFIG_FILE, EXAM_FILE, JOURNAL_FILE, RESULT_FILE, RUN_FILE

MAX_RUNS = 20_000
MAX_DEPTH = 8  # folders between the folder of runs and a run
OPEN_RUNS = 8  # whose journals are kept in memory


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run in the list.

    Attributes:
        key: Its folder, relative to the folder of runs.
        best_score: On dev; None where nothing was scored.
        test: Sealed score of the best candidate; None while the test is sealed.
        problem: Why it cannot be read; all else is empty then.
    """

    key: str
    task: str = ""
    meta: str = ""
    target: str = ""
    arm: str = ""
    seed: int = 0
    status: str = ""
    created_at: str = ""
    metric: str = ""
    best: str | None = None
    best_score: float | None = None
    test: float | None = None
    generations: int = 0
    elapsed_s: float = 0.0
    spend: Spend = field(default_factory=Spend)
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which runs are asked for; an empty text means all.

    Attributes:
        text: Words that all occur in the key, the task, the meta backend, the target or the arm.
        order: `newest` or `best`.
    """

    task: str = ""
    status: str = ""
    meta: str = ""
    arm: str = ""
    text: str = ""
    order: str = "newest"

    def takes(self, line: RunLine) -> bool:
        """Whether a run is among them."""
        for name in ("task", "status", "meta", "arm"):
            wanted = getattr(self, name)
            if wanted and getattr(line, name) != wanted:
                return False
        said = " ".join((line.key, line.task, line.meta, line.target, line.arm)).lower()
        return all(word in said for word in self.text.lower().split())


class Runs:
    """The runs below a folder. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Takes a folder of runs, or one run, which is then the only one.

        Raises:
            RunDirectoryError: There is no such folder.
        """
        if not folder.is_dir():
            raise RunDirectoryError(
                f"There is no folder {str(folder)!r}. Make a run: python -m sia task=toy"
            )
        folder = folder.resolve()
        self._only = folder.name if (folder / RUN_FILE).is_file() else None
        self.folder = Folder(folder.parent if self._only else folder)
        self._known_lines: dict[str, tuple[tuple[Any, ...], RunLine]] = {}
        self._readers: OrderedDict[str, RunReader] = OrderedDict()

    def lines(self, chosen: Chosen) -> Sequence[RunLine]:
        """The runs that are asked for, in the order that is asked for."""
        taken = [line for line in self.all() if chosen.takes(line)]
        taken.sort(key=lambda line: (line.created_at, line.key), reverse=True)
        if chosen.order == "best":
            taken.sort(key=_rank)
        return taken

    def all(self) -> list[RunLine]:
        """All runs, in the order of their keys; what has not changed is not read again."""
        keys = self.keys()
        self._known_lines = {key: self._fresh(key) for key in keys}
        return [line for _, line in self._known_lines.values()]

    def known(self) -> Sequence[RunLine]:
        """All runs as they were when they were last looked at."""
        return [line for _, line in self._known_lines.values()]

    def keys(self) -> Sequence[str]:
        """The folders of all runs, relative to the folder of runs."""
        if self._only is not None:
            return [self._only]
        return sorted(self._find("", MAX_DEPTH))[:MAX_RUNS]

    def open(self, key: str) -> RunReader:
        """One run.

        Raises:
            NotThere: There is no run of that name.
            RunDirectoryError: Its `run.json` is damaged.
        """
        key = "/".join(part for part in key.split("/") if part not in ("", "."))
        if not key or (self._only is not None and key != self._only):
            raise NotThere(key)
        reader = self._readers.pop(key, None)
        if reader is None or read_info(self.folder, key) != reader.info:
            reader = RunReader(self.folder, key)
        self._readers[key] = reader
        while len(self._readers) > OPEN_RUNS:
            self._readers.popitem(last=False)
        return reader

    def _find(self, above: str, depth: int) -> Iterator[str]:
        try:
            with os.scandir(self.folder.root / above) as found:
                entries = [
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in found
                    if entry.name.isprintable()
                ]
        except OSError:
            return
        if above and (RUN_FILE, False) in entries:
            yield above
        elif depth:
            for name, is_folder in entries:
                if is_folder and not name.startswith("."):
                    yield from self._find(f"{above}/{name}" if above else name, depth - 1)

    def _fresh(self, key: str) -> tuple[tuple[Any, ...], RunLine]:
        # The journal counts only while no end is recorded: then it is what changes.
        files = (RUN_FILE, RESULT_FILE, EXAM_FILE)
        state: tuple[Any, ...] = tuple(self._stamp(key, name) for name in files)
        if state[1] is None:
            state = (*state, is_locked(self.folder, key), self._stamp(key, JOURNAL_FILE))
        known = self._known_lines.get(key)
        if known is not None and known[0] == state:
            return known
        return state, self._line(key)

    def _stamp(self, key: str, name: str) -> tuple[int, int] | None:
        state = self.folder.state(f"{key}/{name}")
        return None if state is None else (state.st_size, state.st_mtime_ns)

    def _line(self, key: str) -> RunLine:
        try:
            info = read_info(self.folder, key)
        except (RunDirectoryError, NotThere) as error:
            return RunLine(key=key, status="damaged", problem=str(error))
        result = read_optional(self.folder, f"{key}/{RESULT_FILE}", RunResult)
        exam = read_optional(self.folder, f"{key}/{EXAM_FILE}", Exam)
        best = exam.best if exam else None
        line = RunLine(
            key=key,
            task=info.task,
            meta=info.meta,
            target=info.target,
            seed=info.seed,
            created_at=info.created_at,
            metric=metric_of(info.task).name,
            test=best.test if best else None,
        )
        if result is None:
            page = self.open(key).page()
            return replace(
                line,
                arm=page.arm,
                status=page.status,
                best=page.incumbent,
                best_score=page.best_score,
                generations=sum(one.closed is not None for one in page.generations),
                elapsed_s=page.elapsed_s,
                spend=spend.total(page.spend),
            )
        config = self.folder.text(f"{key}/{CONFIG_FILE}", limit=MAX_RECORD)
        return replace(
            line,
            arm=rundir.arm(config),
            status=status_of(result, locked=False),
            best=result.best,
            best_score=result.best_score,
            generations=result.generations,
            elapsed_s=result.elapsed_s,
            spend=spend.total(spend.from_record(result.spend)),
        )


def _rank(line: RunLine) -> tuple[str, bool, float]:
    """By task, the best first; runs without a score last."""
    sign = -1.0 if metric_of(line.task).direction == "maximize" else 1.0
    return line.task, line.best_score is None, sign * (line.best_score or 0.0)
