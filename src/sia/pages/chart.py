"""Charts as SVG: drawn here, coloured by the style sheet, readable without a script."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 40  # margins
TICKS = 4
SERIES = 6  # colours that the style sheet knows


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mark.

    Attributes:
        y: None: nothing was measured; the mark is put at the lower edge.
        mark: Class of the style sheet that says what it is, for example `weights accepted`.
        title: What a reader sees who points at it.
        href: Where it leads; empty for nowhere.
    """

    x: float
    y: float | None
    mark: str = ""
    title: str = ""
    href: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Connected values; `steps` holds each value until the next one."""

    name: str
    points: Sequence[tuple[float, float]]
    steps: bool = False


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (value - self.low) / span * (self.end - self.start)


def plot(
    *,
    label: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line] = (),
    points: Sequence[Point] = (),
    from_zero: bool = False,
) -> Markup:
    """Lines and marks over a common pair of axes.

    Args:
        label: What the chart shows, for those who do not see it.
        x_label: Of the horizontal axis; its values are whole.
        y_label: Of the vertical axis.
        lines: Drawn in this order, in the colours of the style sheet.
        points: Drawn above the lines.
        from_zero: The vertical axis begins at 0.

    Returns:
        An `svg` element; empty where there is nothing finite to show.
    """
    lines = [_finite(line) for line in lines]
    points = [p for p in points if p.y is None or math.isfinite(p.y)]
    xs = [p.x for p in points] + [x for line in lines for x, _ in line.points]
    ys = [p.y for p in points if p.y is not None] + [y for line in lines for _, y in line.points]
    if not xs:
        return Markup("")
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    low = min(low, 0.0) if from_zero else low
    step = _step(max(high - low, abs(high) * 0.02, 1e-9))
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    if low == high:
        high = low + step
    x = _Scale(min(xs) - 0.5, max(xs) + 0.5, LEFT, WIDTH - RIGHT)
    y = _Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [
        _head(label, role="group" if any(p.href for p in points) else "img"),
        *_axes(x, y, step, x_label, y_label, whole=max(xs) - min(xs)),
    ]
    for number, line in enumerate(lines):
        parts.append(
            Markup('<path class="line s{}" d="{}"><title>{}</title></path>').format(
                number % SERIES, _path(line, x, y, max(xs)), line.name
            )
        )
    parts += [_mark(point, x, y) for point in points]
    return Markup("").join([*parts, Markup("</svg>")])


def bars(*, label: str, x_label: str, y_label: str, values: Mapping[int, float]) -> Markup:
    """One bar for each whole number; empty where all are 0."""
    known = {at: value for at, value in values.items() if math.isfinite(value) and value > 0}
    if not known:
        return Markup("")
    step = _step(max(known.values()))
    x = _Scale(min(values) - 0.5, max(values) + 0.5, LEFT, WIDTH - RIGHT)
    y = _Scale(0, math.ceil(max(known.values()) / step) * step, HEIGHT - BOTTOM, TOP)
    width = max(1.0, min(28.0, 0.7 * (x(1) - x(0))))
    parts = [
        _head(label, role="img"),
        *_axes(x, y, step, x_label, y_label, whole=max(values) - min(values)),
    ]
    for at, value in known.items():
        parts.append(
            Markup(
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                "<title>{} {}: {}</title></rect>"
            ).format(
                x(at) - width / 2, y(value), width, y(0) - y(value), x_label, at, number(value)
            )
        )
    return Markup("").join([*parts, Markup("</svg>")])


def number(value: float) -> str:
    """At most four significant digits: `0.9654`, `12.5`, `1,234`."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _head(label: str, *, role: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="{}" aria-label="{}">').format(
        WIDTH, HEIGHT, role, label
    )


def _axes(
    x: _Scale, y: _Scale, step: float, x_label: str, y_label: str, *, whole: float
) -> list[Markup]:
    parts = []
    for k in range(round((y.high - y.low) / step) + 1):
        value = y.low + k * step
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y(value), y(value), LEFT - 8, y(value) + 4, number(value))
        )
    every = max(1, round(_step(whole))) if whole else 1
    first = math.ceil(x.low / every) * every
    for k in range(int((x.high - first) // every) + 1):
        at = first + k * every
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x(at), HEIGHT - BOTTOM + 18, at
            )
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        Markup(
            '<text class="axis" x="{:.0f}" y="{}" text-anchor="middle">{}</text>'
            '<text class="axis" x="14" y="{:.0f}" text-anchor="middle"'
            ' transform="rotate(-90 14 {:.0f})">{}</text>'
        ).format(middle, HEIGHT - 4, x_label, HEIGHT / 2 - 12, HEIGHT / 2 - 12, y_label)
    )
    return parts


def _mark(point: Point, x: _Scale, y: _Scale) -> Markup:
    at, up = x(point.x), y(y.low) if point.y is None else y(point.y)
    if "failed" in point.mark:
        shape = Markup('<path d="M{0:.1f} {1:.1f}l8 8m0 -8l-8 8"/>').format(at - 4, up - 4)
    elif "weights" in point.mark:
        shape = Markup('<path d="M{:.1f} {:.1f}l7 7l-7 7l-7 -7z"/>').format(at, up - 7)
    else:
        shape = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5"/>').format(at, up)
    body = Markup('<g class="mark {}"><title>{}</title>{}</g>').format(
        point.mark, point.title, shape
    )
    if not point.href:
        return body
    # Not a stop of the tab key: a table beside the chart has the same links.
    return Markup('<a href="{}" aria-label="{}" tabindex="-1">{}</a>').format(
        point.href, point.title, body
    )


def _path(line: Line, x: _Scale, y: _Scale, last: float) -> str:
    drawn = ""
    for at, value in line.points:
        if not drawn:
            drawn = f"M{x(at):.1f} {y(value):.1f}"
        elif line.steps:
            drawn += f"H{x(at):.1f}V{y(value):.1f}"
        else:
            drawn += f"L{x(at):.1f} {y(value):.1f}"
    return drawn + (f"H{x(last):.1f}" if line.steps and drawn else "")


def _finite(line: Line) -> Line:
    kept = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    return Line(name=line.name, points=kept, steps=line.steps)


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten that divides `span` into about `TICKS` parts."""
    rough = max(span, 1e-12) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
