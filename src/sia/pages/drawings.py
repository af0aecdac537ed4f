"""The charts of the pages: which numbers of a run are drawn, and how they are marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from sia.pages import chart
from sia.pages.candidate import Curve
from sia.pages.links import Links
from sia.pages.run import CandidateView, RunPage

if TYPE_CHECKING:
    from sia.pages.compare import Compared  # loads numpy


def scores(page: RunPage, links: Links) -> Markup:
    """Dev score of every candidate by generation, above the line of the incumbent."""
    points = [
        chart.Point(
            x=generation.index,
            y=one.score,
            mark=_mark(one),
            title=_title(one),
            href=links.candidate(page.key, one.id),
        )
        for generation in page.generations
        for one in generation.candidates
        if one.outcome is not None
    ]
    return chart.plot(
        label=f"{page.metric.name} on dev by generation",
        x_label="generation",
        y_label=f"{page.metric.name} / dev",
        lines=[best_line(page)],
        points=points,
    )


def best_line(page: RunPage, name: str = "incumbent") -> chart.Line:
    """The incumbent's score, held until it is beaten."""
    closed = [one.closed for one in page.generations if one.closed]
    known = [(float(one.index), one.best_score) for one in closed if one.best_score is not None]
    return chart.Line(name=name, points=known, steps=True)


def seconds(page: RunPage) -> Markup:
    """Wall time of each generation."""
    return chart.bars(
        label="Seconds by generation",
        x_label="generation",
        y_label="seconds",
        values={one.index: one.wall_s for one in page.generations},
    )


def cost(page: RunPage) -> Markup:
    """What the model calls of each generation have cost; empty where nothing has."""
    return chart.bars(
        label="Dollars by generation",
        x_label="generation",
        y_label="USD",
        values={one.index: one.spend.cost_usd for one in page.generations},
    )


def curves(curve: Curve) -> list[tuple[str, Markup]]:
    """One chart for each quantity that an update measured."""
    return [
        (
            name,
            chart.plot(
                label=f"{name} by step",
                x_label="step",
                y_label=name,
                lines=[chart.Line(name=name, points=values)],
            ),
        )
        for name, values in curve.series.items()
        if len(values) > 1
    ]


def comparison(runs: Sequence[Compared]) -> Markup:
    """The incumbents of several runs by generation; empty unless all have one metric."""
    metrics = {one.page.metric.name for one in runs}
    if len(metrics) != 1:
        return Markup("")
    (metric,) = metrics
    return chart.plot(
        label=f"Best {metric} on dev by generation, of each run",
        x_label="generation",
        y_label=f"best {metric} / dev",
        lines=[best_line(one.page, one.page.key) for one in runs],
    )


def _mark(one: CandidateView) -> str:
    kind = "failed" if one.score is None else one.candidate.lever.value
    return f"{kind} accepted" if one.accepted else kind


def _title(one: CandidateView) -> str:
    if one.score is None:
        return f"{one.id}: {one.outcome}"
    state = "new best" if one.accepted else "refused"
    return f"{one.id}, {one.candidate.lever}: {chart.number(one.score)}, {state}"
