"""One run as one HTML file: to be read offline, and handed to somebody else.

The file holds its style and its charts, runs no script and loads nothing. It is a function of the
run directory: the same records give the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from sia.errors import RunDirectoryError
from sia.pages import drawings
from sia.pages.candidate import CandidateFolder, FileDiff, Table, tables
from sia.pages.files import Folder, NotThere
from sia.pages.links import Links
from sia.pages.render import environment
from sia.pages.run import CandidateView, RunPage, RunReader
from sia.records import Evaluation
from sia.rundir import CONFIG_FILE

STYLE = "assets/style.css"
MAX_BYTES = 1_900_000  # of the file, nearly
MAX_DIFF_ROWS = 200  # of one candidate; rows beyond it are left out
MAX_CLASSES = 200  # rows of a table of the breakdown
MAX_CONFIG = 64 * 1024  # bytes of config.yaml


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """One candidate in the file.

    Attributes:
        changes: What differs from its parent, and the curves of its update; None where they are
            left out.
    """

    view: CandidateView
    changes: Markup | None


class _Places:
    """Links within the file; there is nothing outside it to lead to."""

    def runs(self, **query: str) -> str:
        """Not in the file."""
        return ""

    def run(self, key: str) -> str:
        """The top of the file."""
        return "#main"

    def candidate(self, key: str, candidate: str, view: str = "", **query: str | int) -> str:
        """The section of a candidate."""
        return f"#about-{candidate}"

    def compare(self, *keys: str) -> str:
        """Not in the file."""
        return ""


def document(run: Path) -> str:
    """The report of a run as HTML. Runs are taken as far as they are; an exam is not needed.

    Diffs of the oldest candidates are left out, and named as left out, where the file would
    become larger than `MAX_BYTES`.

    Raises:
        RunDirectoryError: `run` holds no run.
    """
    root = run.resolve()
    folder = Folder(root.parent)
    try:
        reader = RunReader(folder, root.name)
    except NotThere as error:
        raise RunDirectoryError(
            f"{run} holds no run (no run.json). List yours: find runs -name run.json"
        ) from error
    page = replace(reader.page(), key=str(run))  # as commands name it
    links: Links = _Places()
    templates = environment(links)
    best = page.incumbent
    evaluation = reader.evaluation(best) if best else None
    known: dict[str, Any] = {
        "page": page,
        "style": Markup(resources.files("sia.pages").joinpath(STYLE).read_text("utf-8")),
        "config": folder.text(f"{root.name}/{CONFIG_FILE}", limit=MAX_CONFIG),
        "provenance": list(_provenance(page)),
        "scores": drawings.scores(page, links),
        "seconds": drawings.seconds(page),
        "cost": drawings.cost(page),
        "evaluation": evaluation,
        "tables": _tables(evaluation),
    }
    template = templates.get_template("document.html")
    views = page.candidates.values()
    bare = template.render(**known, candidates=[_Shown(view=one, changes=None) for one in views])
    room = MAX_BYTES - len(bare.encode())
    shown = []
    for one in reversed(views):
        changes = _changes(reader, one, templates) if room > 0 else None
        room -= len(changes.encode()) if changes is not None else 0
        shown.append(_Shown(view=one, changes=changes if room > 0 else None))
    return template.render(**known, candidates=shown[::-1])


def _changes(reader: RunReader, one: CandidateView, templates: Environment) -> Markup:
    """What differs from the parent's harness, as far as it is shown, and curves of an update."""
    folder = CandidateFolder(reader, one.id)
    files: list[FileDiff] = []
    room, left_out = MAX_DIFF_ROWS, 0
    for file in folder.diff():
        if file.status != "same":
            rows = file.rows[:room]
            files.append(FileDiff(name=file.name, status=file.status, rows=rows))
            room -= len(rows)
            left_out += len(file.rows) - len(rows)
    module: Any = templates.get_template("_changes.html").module
    curves = [(curve.name, drawings.curves(curve)) for curve in folder.curves()]
    return Markup(module.changes(one, files, left_out, curves))


def _tables(evaluation: Evaluation | None) -> list[Table]:
    return tables(evaluation.breakdown, limit=MAX_CLASSES) if evaluation else []


def _provenance(page: RunPage) -> Iterator[tuple[str, str]]:
    """What the run depended on, flat; nested parts are named `part name`."""
    info = page.info
    yield "run", info.run_id
    yield "task", f"{info.task} v{info.task_version}"
    yield "meta", info.meta
    yield "target", info.target
    yield "seed", str(info.seed)
    yield "may change", page.arm or "unknown"
    yield "begun", info.created_at
    yield "configuration sha256", info.config_sha256
    for name, value in sorted(info.provenance.items()):
        if not isinstance(value, dict):
            yield name, str(value)
            continue
        for inner, text in sorted(value.items()):
            if text is not None and not inner.startswith("hydra/"):
                yield f"{name} {inner}", str(text)
