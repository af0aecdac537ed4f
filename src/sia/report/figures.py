"""Figures of a paper, as PDF and PNG: the same runs give the same bytes."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sia import rundir
from sia.records import BEST, REFERENCE, Lever
from sia.report.examined import Examined, Step

if TYPE_CHECKING:
    from sia.report.arms import Arm

MAX_CLASSES = 24  # bars that can still be read
MARKERS = {Lever.HARNESS: "o", Lever.WEIGHTS: "^"}
# Times and versions would make other bytes of the same figure.
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "png": {"Software": None},
}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "pdf.fonttype": 42,
    "path.simplify": False,
}


def draw(arms: Sequence["Arm"], folder: Path) -> dict[str, str]:
    """Draws what the runs have data for; returns the name and the caption of each figure.

    Classes are numbered where the font has no glyphs for their names, and `classes.csv` names them.
    """
    searched = [arm for arm in arms if arm.row == BEST]
    drawn: dict[str, str] = {}
    with matplotlib.rc_context(_STYLE):
        for name, axis, place in (
            ("by_generation", "generation", lambda step: float(step.generation)),
            ("by_wall_time", "seconds", lambda step: step.elapsed_s),
            ("by_cost", "USD of model calls", lambda step: step.cost_usd),
        ):
            if (figure := _paths(searched, axis, place)) is not None:
                _save(figure, folder, name)
                drawn[name] = (
                    f"Best dev score by {axis}, a line per run. A circle is a better harness, a "
                    "triangle a better policy, a tick on the line any other candidate."
                )
        classes = _classes(searched)
        if classes:
            rundir.write_atomic(folder / "classes.csv", _classes_csv(classes, searched).encode())
            _save(_gains(classes, searched), folder, "by_class")
            shown = min(len(classes), MAX_CLASSES)
            drawn["by_class"] = (
                f"Gain over the reference on dev by class, mean over seeds; the {shown} classes of "
                f"{len(classes)} that changed the score most. All are in classes.csv."
            )
        if (figure := _scatter(searched)) is not None:
            _save(figure, folder, "dev_and_test")
            drawn["dev_and_test"] = (
                "Dev and sealed test, a point per run, a cross for its reference. Below the line, "
                "dev flatters."
            )
    return drawn


def _runs(arm: "Arm") -> Iterator[Examined]:
    for same in arm.runs.values():
        yield from same


def _paths(
    arms: Sequence["Arm"], axis: str, place: Callable[[Step], float | None]
) -> Figure | None:
    figure, axes = _axes(5.0, 3.2)
    some = False
    for number, arm in enumerate(arms):
        for first, run in enumerate(_runs(arm)):
            known = [(x, step) for step in run.steps if (x := place(step)) is not None]
            if not known:
                continue
            some = True
            xs, best = [x for x, _ in known], [step.best for _, step in known]
            axes.step(
                xs, best, where="post", color=f"C{number}", linewidth=1.0, alpha=0.8,
                label=arm.name if first == 0 else None,
            )  # fmt: skip
            axes.plot(xs, best, "|", color=f"C{number}", markersize=3)
            for lever, marker in MARKERS.items():
                better = [(x, s.best) for x, s in known if s.accepted and s.lever is lever]
                axes.plot(*_columns(better), marker, color=f"C{number}", markersize=4)
    if not some:
        return None
    if axis == "generation":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{next(_runs(arms[0])).metric}, best so far on dev")
    _legend(axes)
    return figure


def _scatter(arms: Sequence["Arm"]) -> Figure | None:
    figure, axes = _axes(3.6, 3.4)
    ends: list[float] = []
    for number, arm in enumerate(arms):
        for name, marker in ((REFERENCE, "x"), (BEST, "o")):
            points = [
                (row.dev, row.test)
                for run in _runs(arm)
                if (row := run.rows[name]).dev is not None and row.test is not None
            ]
            ends += [end for point in points for end in point if end is not None]
            axes.plot(
                *_columns(points), marker, color=f"C{number}", markersize=5,
                label=arm.name if name == BEST else None,
            )  # fmt: skip
    if not ends:
        return None
    line = min(ends), max(ends)
    axes.plot(line, line, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xlabel("dev")
    axes.set_ylabel("sealed test")
    _legend(axes)
    return figure


def _classes(arms: Sequence["Arm"]) -> dict[str, list[float | None]]:
    """Gain on dev by class and arm, mean over runs; what changed the score most comes first."""
    gains: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    sizes: dict[str, float] = {}
    for number, arm in enumerate(arms):
        for run in _runs(arm):
            before, after = run.classes.get(REFERENCE, {}), run.classes.get(BEST, {})
            for name in before.keys() & after.keys():
                gains[name][number].append(after[name].share - before[name].share)
                sizes[name] = after[name].items
    means = {
        name: [
            math.fsum(found[number]) / len(found[number]) if number in found else None
            for number in range(len(arms))
        ]
        for name, found in gains.items()
    }

    def change(name: str) -> float:
        return sizes[name] * max(abs(gain) for gain in means[name] if gain is not None)

    return {name: means[name] for name in sorted(means, key=lambda name: (-change(name), name))}


def _classes_csv(classes: dict[str, list[float | None]], arms: Sequence["Arm"]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["number", "class", *(arm.name for arm in arms)])
    for number, (name, gains) in enumerate(classes.items(), 1):
        writer.writerow([number, name, *("" if gain is None else gain for gain in gains)])
    return out.getvalue()


def _gains(classes: dict[str, list[float | None]], arms: Sequence["Arm"]) -> Figure:
    shown = list(classes.items())[:MAX_CLASSES]
    figure, axes = _axes(5.0, 1.0 + 0.22 * len(shown))
    height = 0.8 / len(arms)
    places = np.arange(len(shown))
    for number, arm in enumerate(arms):
        axes.barh(
            places + (number - (len(arms) - 1) / 2) * height,
            [gains[number] or 0.0 for _, gains in shown],
            height=height, color=f"C{number}", label=arm.name,
        )  # fmt: skip
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(places, [_label(number, name) for number, (name, _) in enumerate(shown, 1)])
    axes.invert_yaxis()
    axes.set_xlabel("gain over the reference on dev")
    _legend(axes)
    return figure


def _label(number: int, name: str) -> str:
    """The name of a class, or its number in `classes.csv` where the font lacks a character."""
    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    if len(name) <= 30 and all(ord(character) in glyphs for character in name):
        return name.replace("$", r"\$")
    return f"class {number}"


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _columns(points: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    found = list(points)
    return [x for x, _ in found], [y for _, y in found]


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8)


def _save(figure: Figure, folder: Path, name: str) -> None:
    for kind, metadata in _METADATA.items():
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=200, metadata=metadata)
        rundir.write_atomic(folder / f"{name}.{kind}", out.getvalue())
