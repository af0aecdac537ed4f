"""The same rows as Markdown, as LaTeX (booktabs) and as CSV."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one dataclass, and how people see them.

    Attributes:
        name: Of its files.
        columns: Header -> cell of a row. CSV has the fields of the dataclass instead.
        notes: Below the table, one paragraph each.
    """

    name: str
    title: str
    columns: dict[str, Callable[[Any], str]]
    rows: Sequence[Any]
    notes: Sequence[str] = ()

    def cells(self) -> list[tuple[str, ...]]:
        """What people see, row by row."""
        return [tuple(cell(row) for cell in self.columns.values()) for row in self.rows]


def markdown(table: Table) -> str:
    """With its title as a heading, and its notes below."""
    lines = [f"### {table.title}", "", *markdown_table(list(table.columns), table.cells()), ""]
    for note in table.notes:
        lines += [note, ""]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def latex(table: Table) -> str:
    """A tabular for the package booktabs, to be put into a table of the paper's own."""
    columns = "l" + "r" * (len(table.columns) - 1)
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _tex_row(list(table.columns)),
        r"\midrule",
        *(_tex_row(cells) for cells in table.cells()),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    for note in table.notes:
        lines += [r"\par\smallskip", rf"{{\footnotesize {escape(note)}\par}}"]
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """Every field of the rows to twelve digits; empty for no value, lists joined by spaces."""
    out = io.StringIO()
    names = [field.name for field in fields(table.rows[0])] if table.rows else []
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        writer.writerow({name: _plain(value) for name, value in asdict(row).items()})
    return out.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(value)
    # The last digits of a float differ between machines.
    return "" if value is None else round(value, 12) if isinstance(value, float) else value


def escape(text: str) -> str:
    """Text as LaTeX shows it; the minus of a number is a minus."""
    escaped = "".join(_TEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(escape(cell) for cell in cells) + r" \\"


def number(value: float | None, digits: int = 4) -> str:
    """Empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """With its sign; empty where there is none."""
    return "" if value is None else f"{value:+.4f}"


def between(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Both ends; empty where there are none."""
    show = signed if sign else number
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def p_value(value: float | None) -> str:
    """Three digits; nothing smaller than what a permutation test can say."""
    return "" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"
