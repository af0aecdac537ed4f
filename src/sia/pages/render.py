"""Templates to HTML: everything that is printed is cleaned and escaped."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sia import spend
from sia.pages import chart, code
from sia.pages.links import Links
from sia.pages.text import clean, notes


def environment(links: Links) -> Environment:
    """The templates, with the filters that they use.

    Args:
        links: Known to all templates under that name.
    """
    made = Environment(
        loader=PackageLoader("sia.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.globals["links"] = links
    filters: dict[str, Callable[..., Any]] = {
        "bytes": size,
        "coloured": code.highlighted,
        "count": spend.count,
        "duration": duration,
        "gain": gain,
        "marked": marked,
        "notes": notes,
        "number": chart.number,
        "score": score,
        "usd": spend.usd,
        "when": when,
    }
    made.filters.update(filters)
    return made


def score(value: Any) -> str:
    """`0.9650`; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"


def gain(value: float | None) -> str:
    """`+0.0150`; a dash where there is none."""
    return "–" if value is None else f"{value:+.4f}"


def duration(seconds: float | None) -> str:
    """`0.3 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def when(text: str) -> str:
    """`2026-11-25 10:31 UTC` of a time in ISO 8601; any other text as it is."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return text


def size(number: int) -> str:
    """`512 bytes`, `64 KiB`, `50.0 MiB`."""
    if number < 1024:
        return f"{number} bytes"
    if number < 2**20:
        return f"{number / 1024:.0f} KiB"
    return f"{number / 2**20:.1f} MiB"


def marked(text: str, wanted: str) -> Markup:
    """The text with every place where `wanted` occurs marked, whatever its case."""
    text, wanted = clean(text), clean(wanted).lower()
    low = text.lower()
    if not wanted or len(low) != len(text):  # a letter of another length: places would be wrong
        return escape(text)
    parts, done = [], 0
    while (at := low.find(wanted, done)) >= 0:
        found = text[at : at + len(wanted)]
        parts.append(Markup("{}<mark>{}</mark>").format(text[done:at], found))
        done = at + len(wanted)
    return Markup("").join([*parts, escape(text[done:])])


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return clean(value)
