"""One run: what it did and what the sealed test says, for people."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sia import rundir, spend
from sia.errors import RunDirectoryError, SiaError
from sia.records import Candidate, Evaluation, Exam, ExamRow, Generation, from_data
from sia.report.tables import between, markdown_table, number, signed
from sia.tasks import bundled_task

WIDTH = 500  # more than any row needs: a table takes no more than its cells do
HEADER = (
    "",
    "dev",
    "test",
    "95 % interval",
    "gain over reference",
    "dev - test",
    "seconds",
    "note",
)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sia.report",
        description=__doc__,
        epilog="Several runs as the arms of a paper: python -m sia.report arms --help",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    parser.add_argument("--html", type=Path, help="write one run, examined or not, to this file")
    args = parser.parse_args(argv)
    if args.html:
        return _write_page(args.runs, args.html)
    console = Console()
    texts = []
    try:
        for run in args.runs:
            found = read_exam(run)
            show(console, run, found)
            texts.append(markdown(run, found))
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_atomic(args.markdown, "\n\n".join(texts).encode())
    return 0


def read_exam(run: Path) -> Exam:
    """The exam of a run.

    Raises:
        RunDirectoryError: Its sealed test is still closed.
    """
    found = rundir.read_exam(run)
    if found is None:
        raise RunDirectoryError(
            f"The sealed test of {run} is still closed. Open it: python -m sia.exam {run}; or show "
            f"what is known: python -m sia.report {run} --html run.html"
        )
    return found


def _write_page(runs: Sequence[Path], file: Path) -> int:
    from sia.pages.document import document

    try:
        if len(runs) != 1:
            raise RunDirectoryError(
                f"--html is for one run, not for {len(runs)}. Compare runs: python -m sia.web"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_atomic(file, document(runs[0]).encode())
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    print(file)
    return 0


def show(console: Console, run: Path, exam: Exam) -> None:
    """Prints the result table of one run."""
    extra = _extra_columns(exam)
    table = Table(title=_title(run, exam), box=None, header_style="bold", title_justify="left")
    for place, name in enumerate(_header(extra)):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for cells in _cells(exam, extra):
        table.add_row(*(Text(cell) for cell in cells))
    # A narrow terminal breaks the lines; the numbers stay whole.
    Console(file=console.file, width=WIDTH).print(table)
    console.print(_footer(run, exam), markup=False, highlight=False)


def markdown(run: Path, exam: Exam) -> str:
    """The result table of one run, with the candidates it tried, as Markdown."""
    extra = _extra_columns(exam)
    return "\n".join(
        [
            f"## {_title(run, exam)}",
            "",
            *markdown_table(_header(extra), _cells(exam, extra)),
            "",
            _footer(run, exam),
            "",
            "### Candidates",
            "",
            *markdown_table(("candidate", "source", "dev", "incumbent", "changes"), _history(run)),
            "",
        ]
    )


def _title(run: Path, exam: Exam) -> str:
    info = rundir.read_info(run)
    return (
        f"{exam.task}: {exam.metric} on {exam.n_items} sealed test items "
        f"(meta={info.meta}, seed {info.seed}, run {exam.run_id})"
    )


def _footer(run: Path, exam: Exam) -> str:
    result = rundir.read_result(run)
    spent = f"{result.generations} generations in {result.elapsed_s:.0f} s" if result else ""
    if result and result.spend:
        spent += f", model calls {spend.line(spend.from_record(result.spend))}"
    return (
        "Chosen by dev score alone. Intervals: bootstrap over test items; gains are paired. "
        f"{spent}; sandbox {exam.sandbox}; test opened {exam.opened_at}."
        + "".join(f"\nWarning: {warning}" for warning in exam.warnings)
    )


def _extra_columns(exam: Exam) -> dict[str, str]:
    """Further metrics that the task wants in its table: metric -> header."""
    task = bundled_task(exam.task)
    return dict(task.facts.report) if task else {}


def _header(extra: dict[str, str]) -> tuple[str, ...]:
    """The columns of every table, a task's own ones before the note."""
    return (*HEADER[:-1], *extra.values(), HEADER[-1])


def _cells(exam: Exam, extra: dict[str, str]) -> Iterator[tuple[str, ...]]:
    for row in exam.rows:
        yield _row_cells(row, extra)
    task = bundled_task(exam.task)
    for known in task.facts.published if task else ():
        blank = ("",) * (len(HEADER) - 4 + len(extra))
        yield (f"published: {known.name}", "", f"{known.score:.3f}", *blank, known.source)


def _row_cells(row: ExamRow, extra: dict[str, str]) -> tuple[str, ...]:
    gap = None if row.dev is None or row.test is None else row.dev - row.test
    name = row.name if row.candidate is None else f"{row.name} ({row.candidate})"
    return (
        name,
        number(row.dev),
        number(row.test),
        between(row.low, row.high),
        f"{row.gain:+.4f} [{row.gain_low:+.4f}, {row.gain_high:+.4f}]"
        if row.gain is not None
        else "",
        signed(gap),
        f"{row.seconds:.1f}" if row.seconds is not None else "",
        *(number(row.metrics.get(metric)) for metric in extra),
        row.note,
    )


def _history(run: Path) -> Iterator[tuple[str, ...]]:
    """One line per candidate in the order of the search."""
    records = rundir.records(run)
    for key in sorted(key for key in records if key.endswith("/candidate")):
        candidate = from_data(records[key], Candidate)
        place = key.removesuffix("/candidate")
        evaluation = records.get(f"{place}/evaluation")
        score = from_data(evaluation, Evaluation).score if evaluation else None
        closed = records.get(f"{candidate.generation:04}/generation")
        incumbent = from_data(closed, Generation).incumbent if closed else None
        changes = ", ".join(f"{name}={value}" for name, value in candidate.proposal.changes.items())
        yield (
            candidate.id, candidate.proposal.source, number(score), incumbent or "",
            changes or candidate.problem,
        )  # fmt: skip
