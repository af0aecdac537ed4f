"""Files that MLflow shows as a page or as a table: the harness diff, what the verifier found."""

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import msgspec

from sia.records import Evaluation

MAX_TABLES = 20  # of one evaluation
MAX_ROWS = 1_000  # of a table
MAX_LINE = 500  # characters of a line of a diff that are shown
# MLflow shows pages in a frame of its own origin; even so, nothing in there may run or load.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 1rem; color: #1f2328; background: #fff }}
h2 {{ font-size: 1rem; margin: 1.2rem 0 .4rem }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed; border: 1px solid #d0d7de }}
col.n {{ width: 3.5rem }}
td {{ font: 12px/1.5 ui-monospace, monospace; padding: 0 .5rem; vertical-align: top;
     white-space: pre-wrap; overflow-wrap: anywhere }}
td.n {{ text-align: right; color: #59636e; user-select: none }}
tr.gap td {{ background: #f6f8fa; color: #59636e }}
td.old {{ background: #ffebe9 }} td.new {{ background: #dafbe1 }} td.none {{ background: #f6f8fa }}
</style></head><body>
"""
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")

Line = tuple[int, str] | None  # number and text; None where the other side has a line more


def diff_page(diff: str, title: str) -> str:
    """A unified diff as one page without scripts: old lines on the left, new ones on the right.

    Args:
        diff: As `sia.workspace.diff` writes it. Its text is not trusted.
        title: Of the page.
    """
    parts = [_HEAD.format(title=html.escape(title)), f"<h1>{html.escape(title)}</h1>\n"]
    open_table = False
    for kind, left, right in _side_by_side(diff.splitlines()):
        if kind == "file":
            parts += ["</table>\n" if open_table else "", f"<h2>{html.escape(str(left))}</h2>\n"]
            parts.append('<table><col class="n"><col><col class="n"><col>\n')
            open_table = True
        elif open_table and kind == "gap":
            parts.append(f'<tr class="gap"><td class="n"></td><td colspan="3">{left}</td></tr>\n')
        elif open_table:
            changed = kind == "changed"
            cells = f"{_cells(left, 'old', changed)}{_cells(right, 'new', changed)}"
            parts.append(f"<tr>{cells}</tr>\n")
    parts.append("</table>\n" if open_table else "<p>No file was changed.</p>\n")
    return "".join([*parts, "</body></html>\n"])


def tables(evaluation: Evaluation) -> dict[str, bytes]:
    """What the verifier found on dev, as tables: file -> content in the shape MLflow shows.

    One for each part of the breakdown, and the sample of failures.
    """
    found: dict[str, bytes] = {}
    for name, part in list(evaluation.breakdown.items())[:MAX_TABLES]:
        columns, rows = _table(part)
        if rows:
            found[f"dev/{_file_name(str(name))}.json"] = _encoded(columns, rows)
    if evaluation.failures:
        failures = [[one.item, one.answer, one.score] for one in evaluation.failures]
        found["dev/failures.json"] = _encoded(["item", "answer", "score"], failures)
    return found


def shown_as_tables(files: Mapping[str, bytes]) -> str:
    """The value of MLflow's tag that names the files to be shown as tables."""
    return json.dumps([{"path": name, "type": "table"} for name in sorted(files)])


def _table(part: Any) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a part of a breakdown, whatever its shape."""
    if isinstance(part, dict):
        values = list(part.values())
        if values and all(isinstance(value, dict) for value in values):
            keys = list(dict.fromkeys(str(key) for value in values for key in value))
            return ["name", *keys], [
                [name, *(value.get(key) for key in keys)] for name, value in part.items()
            ]
        return ["name", "value"], [[name, value] for name, value in part.items()]
    if isinstance(part, list):
        rows = [list(row) if isinstance(row, list | tuple) else [row] for row in part]
        width = max((len(row) for row in rows), default=0)
        return ["row", *(str(k + 1) for k in range(width))], [
            [number, *row, *[None] * (width - len(row))] for number, row in enumerate(rows, start=1)
        ]
    return ["value"], [[part]]


def _encoded(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    cells = [[_cell(value) for value in row] for row in rows[:MAX_ROWS]]
    return msgspec.json.encode({"columns": list(columns), "data": cells})


def _cell(value: Any) -> Any:
    plain = value is None or isinstance(value, str | int | float | bool)
    return value if plain else msgspec.json.encode(value).decode()


def _file_name(name: str) -> str:
    return re.sub(r"[^\w\-. ,]", "_", name).strip(". ")[:100] or "_"


def _side_by_side(lines: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """`file`, `gap`, `same` and `changed`, each with what belongs to the left and the right."""
    old = new = 0  # lines that the hunk still has
    left_at = right_at = 0
    removed: list[Line] = []
    added: list[Line] = []

    def changes() -> Iterator[tuple[str, Line, Line]]:
        for pair in zip_longest(removed, added):
            yield "changed", *pair
        removed.clear()
        added.clear()

    for number, line in enumerate(lines):
        if not (old or new):
            yield from changes()
            hunk = _HUNK.match(line)
            if hunk:
                left_at, right_at = int(hunk[1]), int(hunk[3])
                old, new = int(hunk[2] or 1), int(hunk[4] or 1)
                yield "gap", html.escape(hunk[0]), None
            elif line.startswith("--- ") and number + 1 < len(lines):
                yield "file", lines[number + 1].removeprefix("+++ ").removeprefix("b/"), None
            elif not line.startswith("+++ "):
                yield "gap", html.escape(line[:MAX_LINE]), None
        elif line.startswith("-"):
            removed.append((left_at, line[1:]))
            left_at, old = left_at + 1, old - 1
        elif line.startswith("+"):
            added.append((right_at, line[1:]))
            right_at, new = right_at + 1, new - 1
        else:
            yield from changes()
            yield "same", (left_at, line[1:]), (right_at, line[1:])
            left_at, right_at, old, new = left_at + 1, right_at + 1, old - 1, new - 1
    yield from changes()


def _cells(line: Line, kind: str, changed: bool) -> str:
    if line is None:
        return '<td class="n none"></td><td class="none"></td>'
    number, text = line
    shown = text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 1]}…"
    return (
        f'<td class="n">{number}</td>'
        f"<td{f' class={kind}' if changed else ''}>{html.escape(shown)}</td>"
    )
