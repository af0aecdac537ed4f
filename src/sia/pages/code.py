"""Program text as HTML: syntax colours, and two versions side by side."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from markupsafe import Markup, escape

from sia.pages.text import clean

MAX_LINES = 4_000  # of a file that is compared
MAX_COLOURED = 100_000  # characters; longer files are shown without colours
CONTEXT = 3  # unchanged lines around a change
LEXERS = {  # a fixed choice: a lexer that a file name could pick may be slow on hostile text
    "py": "python", "pyi": "python", "sh": "bash", "json": "json", "yaml": "yaml", "yml": "yaml",
    "toml": "toml", "md": "markdown", "diff": "diff",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Side:
    """One line of one version; `number` is None where the other version has a line more."""

    number: int | None
    html: Markup


@dataclass(frozen=True, kw_only=True)
class Row:
    """Two lines side by side.

    Attributes:
        kind: `same`, `changed`, `added`, `removed`, or `gap` where unchanged lines are left out.
        skipped: How many those are.
    """

    kind: str
    left: Side
    right: Side
    skipped: int = 0


@lru_cache(maxsize=64)
def highlighted(name: str, text: str) -> tuple[Markup, ...]:
    """The lines of a file with classes of Pygments; `name` tells the language."""
    text = clean(text)
    lexer_name = LEXERS.get(name.rpartition(".")[2].lower())
    if lexer_name is None or len(text) > MAX_COLOURED:
        return tuple(escape(line) for line in text.splitlines())
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    lexer = get_lexer_by_name(lexer_name, stripnl=False, ensurenl=False)
    # The formatter closes and opens its elements at each end of a line, and escapes all text.
    html = highlight("\n".join(text.splitlines()), lexer, HtmlFormatter(nowrap=True))
    return tuple(Markup(line) for line in html.split("\n"))


def side_by_side(name: str, before: str, after: str) -> list[Row]:
    """Rows that show what changed, with a little of what did not; empty where nothing did."""
    old, new = before.splitlines()[:MAX_LINES], after.splitlines()[:MAX_LINES]
    left, right = highlighted(name, before), highlighted(name, after)
    rows: list[Row] = []
    done = 0
    for group in difflib.SequenceMatcher(None, old, new).get_grouped_opcodes(CONTEXT):
        if skipped := group[0][1] - done:
            rows.append(
                Row(kind="gap", left=_side(left, None), right=_side(right, None), skipped=skipped)
            )
        for tag, i1, i2, j1, j2 in group:
            kind = {"equal": "same", "replace": "changed", "delete": "removed", "insert": "added"}[
                tag
            ]
            for k in range(max(i2 - i1, j2 - j1)):
                i, j = i1 + k, j1 + k
                rows.append(
                    Row(
                        kind=kind,
                        left=_side(left, i if i < i2 else None),
                        right=_side(right, j if j < j2 else None),
                    )
                )
            done = i2
    return rows


def _side(lines: Sequence[Markup], index: int | None) -> Side:
    if index is None or index >= len(lines):
        return Side(number=None, html=Markup(""))
    return Side(number=index + 1, html=lines[index])
