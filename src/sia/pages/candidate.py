"""What lies in the folder of one candidate: harness, notes, trajectories, logs, update curves."""

import itertools
import json
import math
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sia.gateway.store import STORE_FILE, Exchange, open_reader, select
from sia.pages import code, talk
from sia.pages.files import Folder, NotThere, Piece
from sia.pages.run import RunReader, damaged_store
from sia.rundir import candidate_dir

MAX_FILE = 256 * 1024  # bytes shown of one file of a harness
MAX_FILES = 100  # of a harness
MAX_TRAJECTORY = 4 * 2**20  # bytes read of one trajectory
MAX_SEARCHED = 256 * 2**20  # bytes that one search reads
MAX_NOTE = 64 * 1024  # bytes of improvement.md and of a prompt
LOG_PIECE = 64 * 1024  # bytes of a log that one page shows
PAGE = 50  # trajectories or calls of one page
EXCERPT = 80  # characters on either side of what was found
_ITEM = re.compile(r"execution_q(.+)\.json")
_PROMPT = re.compile(r"prompt(-\d+)?\.md")


@dataclass(frozen=True, kw_only=True)
class FileDiff:
    """One file of a harness beside its parent's.

    Attributes:
        status: `added`, `removed`, `changed` or `same`.
    """

    name: str
    status: str
    rows: Sequence[code.Row] = ()


@dataclass(frozen=True, kw_only=True)
class TrajectoryLine:
    """One trajectory in the list.

    Attributes:
        item: Id of the item, where the file is named by it; else empty.
        score: Of that item on dev; None where the item is not of the dev split.
        excerpt: What was found in it, with a little around it.
    """

    name: str
    item: str
    score: float | None
    excerpt: str = ""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """One page of the trajectories that are asked for.

    Attributes:
        found: How many are asked for.
        total: How many there are.
        cut: A search that stopped before all was read.
    """

    lines: Sequence[TrajectoryLine]
    found: int
    total: int
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """One part of a breakdown: rows of a name and its number, or of several cells."""

    name: str
    rows: Sequence[Sequence[Any]]
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one update measured at its steps: name of the quantity -> (step, value)."""

    name: str
    series: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


class CandidateFolder:
    """Reads the folder of one candidate. Nothing in it is trusted."""

    def __init__(self, reader: RunReader, candidate: str) -> None:
        """Takes a candidate of a run that was read.

        Raises:
            NotThere: The run has no such candidate.
        """
        view = reader.page().candidates.get(candidate)
        if view is None:
            raise NotThere(candidate)
        self.view = view
        self.folder: Folder = reader.folder
        self._reader = reader
        self._name = self._folder_of(candidate)
        self._parent = view.candidate.parent

    def _folder_of(self, candidate: str) -> str:
        made = self._reader.page().candidates[candidate].candidate
        below = candidate_dir(self.folder.root / self._reader.key, made.generation, made.index)
        return below.relative_to(self.folder.root).as_posix()

    def notes(self) -> str:
        """`improvement.md`; empty where there is none."""
        return self.folder.text(f"{self._name}/improvement.md", limit=MAX_NOTE)

    def usage(self) -> dict[str, Any]:
        """What the attempt used: seconds and memory; empty where nothing was measured."""
        try:
            value = json.loads(self.folder.text(f"{self._name}/usage.json", limit=MAX_NOTE))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def prompts(self) -> dict[str, str]:
        """What the agent was told, by where it lies: first what led here, then this edit."""
        found = {}
        generation = self.view.candidate.generation
        decision = f"{self._reader.key}/gen-{generation - 1:03}/decision"
        for title, folder in (("decision", decision), ("edit", self._name)):
            for name in self.folder.names(folder):
                if _PROMPT.fullmatch(name):
                    text = self.folder.text(f"{folder}/{name}", limit=MAX_NOTE)
                    found[f"{title}: {name}"] = text
        return found

    def harness_files(self) -> list[str]:
        """Paths of its files."""
        return self.folder.tree(f"{self._name}/harness", limit=MAX_FILES)

    def harness_file(self, name: str) -> Piece:
        """One of them, as far as it is shown.

        Raises:
            NotThere: There is none of that name.
        """
        return self.folder.read(f"{self._name}/harness/{name}", limit=MAX_FILE)

    def diff(self) -> list[FileDiff]:
        """Its files beside those of its parent, the changed ones with their lines."""
        if self._parent is None:
            return []
        old = self._texts(f"{self._folder_of(self._parent)}/harness")
        new = self._texts(f"{self._name}/harness")
        files = []
        for name in sorted(old.keys() | new.keys()):
            before, after = old.get(name), new.get(name)
            if before == after:
                files.append(FileDiff(name=name, status="same"))
                continue
            status = "added" if before is None else "removed" if after is None else "changed"
            rows = code.side_by_side(name, before or "", after or "")
            files.append(FileDiff(name=name, status=status, rows=rows))
        return files

    def _texts(self, folder: str) -> dict[str, str]:
        names = self.folder.tree(folder, limit=MAX_FILES)
        return {name: self.folder.text(f"{folder}/{name}", limit=MAX_FILE) for name in names}

    def trajectories(self, *, text: str = "", which: str = "", page: int = 1) -> Trajectories:
        """Those in which a text occurs, whatever its case.

        Args:
            text: Empty for all.
            which: `right`, `wrong`, or empty for all; right has the full score of its item.
            page: From 1.
        """
        names = [
            name
            for name in self.folder.names(f"{self._name}/agent_execution")
            if name.endswith(".json")
        ]
        evaluation = self._reader.evaluation(self.view.id)
        items = evaluation.items if evaluation else {}
        lines = [_line(name, items) for name in names]
        if which:
            wanted = which == "right"
            lines = [
                line for line in lines if line.score is not None and (line.score >= 1) == wanted
            ]
        cut = False
        if text:
            lines, cut = self._search(lines, text)
        begin = PAGE * (max(1, page) - 1)
        shown = lines[begin : begin + PAGE]
        return Trajectories(lines=shown, found=len(lines), total=len(names), cut=cut)

    def _search(
        self, lines: Sequence[TrajectoryLine], text: str
    ) -> tuple[list[TrajectoryLine], bool]:
        # Files may hold the letters themselves or their JSON escapes.
        wanted = {text.lower(), json.dumps(text)[1:-1].lower()}
        found = []
        left = MAX_SEARCHED
        for line in lines:
            try:
                piece = self.folder.read(
                    f"{self._name}/agent_execution/{line.name}", limit=MAX_TRAJECTORY
                )
            except NotThere:
                continue
            left -= len(piece.data)
            said = piece.text
            low = said.lower()
            at = max(low.find(one) for one in wanted)
            if at >= 0:
                around = said[max(0, at - EXCERPT) : at + len(text) + EXCERPT]
                excerpt = _unescaped(around)
                found.append(
                    TrajectoryLine(
                        name=line.name, item=line.item, score=line.score, excerpt=excerpt
                    )
                )
            if left <= 0:
                return found, True
        return found, False

    def trajectory(self, name: str) -> talk.Talk:
        """One of them.

        Raises:
            NotThere: There is none of that name.
        """
        if "/" in name:
            raise NotThere(name)
        piece = self.folder.read(f"{self._name}/agent_execution/{name}", limit=MAX_TRAJECTORY)
        return talk.read(piece.data)

    def logs(self) -> dict[str, int]:
        """Its logs and those of the sessions that made it: path below its folder -> bytes."""
        folders = ["", *(name for name in self.folder.folders(self._name) if _has_logs(name))]
        found = {}
        for folder in folders:
            for name in self.folder.names(f"{self._name}/{folder}"):
                path = f"{folder}/{name}".lstrip("/")
                state = self.folder.state(f"{self._name}/{path}") if name.endswith(".log") else None
                if state is not None:
                    found[path] = state.st_size
        return found

    def log(self, name: str, *, start: int | None = None) -> Piece:
        """A piece of a log: from `start` on, else its end.

        Raises:
            NotThere: It is none of `logs()`.
        """
        if name not in self.logs():
            raise NotThere(name)
        begin = -LOG_PIECE if start is None else start
        return self.folder.read(f"{self._name}/{name}", start=begin, limit=LOG_PIECE)

    def curves(self) -> list[Curve]:
        """What its update measured, one for each adapter that it trained."""
        curves = []
        for name in self.folder.tree(f"{self._name}/policy", limit=500):
            if name.rpartition("/")[2] != "update.json":
                continue
            text = self.folder.text(f"{self._name}/policy/{name}", limit=MAX_TRAJECTORY)
            series = _series(text)
            if series:
                curves.append(Curve(name=name.rpartition("/")[0] or "adapter", series=series))
        return curves

    def scopes(self) -> dict[str, int]:
        """Its model calls: scope -> how many."""
        generation = self.view.candidate.generation
        wanted = (f"{self.view.id}/%", f"g{generation - 1:03}/%")
        with _store(self._reader) as db:
            if db is None:
                return {}
            rows = db.execute(
                "select scope, count(*) from exchanges where scope like ? or scope like ?"
                " group by scope order by min(id)",
                wanted,
            )
            return {str(scope): int(count) for scope, count in rows}

    def calls(self, scope: str, *, page: int = 1) -> list[Exchange]:
        """One page of the calls of a scope."""
        begin = PAGE * (max(1, page) - 1)
        with _store(self._reader) as db:
            if db is None:
                return []
            where = "scope = ? order by id limit ? offset ?"
            return select(db, where, scope, PAGE, begin)

    def call(self, scope: str, number: int) -> talk.Talk:
        """What was said up to one call of a scope, its reply included.

        Args:
            scope: One of `scopes()`.
            number: From 1; 0 means the last one.

        Raises:
            NotThere: There is no such call.
        """
        order = "id limit 1 offset ?" if number > 0 else "id desc limit 1 offset ?"
        with _store(self._reader) as db:
            where = f"scope = ? order by {order}"
            found = select(db, where, scope, max(0, number - 1)) if db is not None else []
        if not found:
            raise NotThere(scope)
        return talk.of_session(found[0])


class _store:
    """The recording of a run, open for a block; None where there is none."""

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> sqlite3.Connection | None:
        if self._reader.folder.state(f"{self._reader.key}/{STORE_FILE}") is not None:
            self._db = open_reader(self._reader.path / STORE_FILE)
        return self._db

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._db is not None:
            self._db.close()
        if isinstance(error, sqlite3.Error):
            raise damaged_store(self._reader.path, error) from error


def tables(breakdown: Mapping[str, Any], *, limit: int = 500) -> list[Table]:
    """The parts of a breakdown as tables, whatever a verifier put into it."""
    return list(
        itertools.chain.from_iterable(_tables(str(k), v, limit) for k, v in breakdown.items())
    )


def _tables(name: str, value: Any, limit: int, depth: int = 3) -> list[Table]:
    if isinstance(value, dict):
        rows: list[Sequence[Any]] = [
            (str(key), one) for key, one in value.items() if not isinstance(one, dict | list)
        ]
        made = (
            [Table(name=name, rows=rows[:limit], left_out=max(0, len(rows) - limit))]
            if rows
            else []
        )
        for key, one in value.items():
            if isinstance(one, dict | list):
                inner = f"{name} / {key}"
                made += _tables(inner, one, limit, depth - 1) if depth else []
        return made
    if isinstance(value, list):
        rows = [tuple(row) if isinstance(row, list) else (row,) for row in value]
        return (
            [Table(name=name, rows=rows[:limit], left_out=max(0, len(rows) - limit))]
            if rows
            else []
        )
    return [Table(name=name, rows=[("", value)])]


def _line(name: str, items: Mapping[str, float]) -> TrajectoryLine:
    found = _ITEM.fullmatch(name)
    item = found[1] if found else ""
    return TrajectoryLine(name=name, item=item, score=items.get(item))


def _unescaped(text: str) -> str:
    """Part of a JSON file as a reader wants it; a cut escape at either end is left as it is."""
    return re.sub(
        r"\\(?:u([0-9a-f]{4})|(.))",
        lambda found: (
            chr(int(found[1], 16)) if found[1] else {"n": " ", "t": " "}.get(found[2], found[2])
        ),
        text,
        flags=re.IGNORECASE,
    )


def _has_logs(name: str) -> bool:
    return name == "update" or name.startswith("session")


def _series(text: str) -> dict[str, list[tuple[float, float]]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    curve = value.get("curve") if isinstance(value, dict) else None
    series: dict[str, list[tuple[float, float]]] = {}
    for number, point in enumerate(curve if isinstance(curve, list) else [], start=1):
        if isinstance(point, dict):
            step = point.get("step", number)
            for name in point:
                at = point[name]
                if name != "step" and _is_number(at) and _is_number(step):
                    series.setdefault(str(name), []).append((float(step), float(at)))
    return series


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
