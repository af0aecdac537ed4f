"""`python -m sia.runs`: lists run directories, resumes those that did not finish, compares two.

list [FOLDER] [task=NAME] [status=NAME]     one line per run below a folder
resume FOLDER...                            goes on with every run that did not finish
compare RUN RUN...                          the best candidates, paired item by item
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sia import rundir, spend
from sia.errors import ConfigError, RunDirectoryError, SiaError
from sia.multirun import override
from sia.records import Evaluation, Generation, from_data

WIDTH = 500  # more than any row needs: a table takes no more than its cells do
DRAWS = 10_000  # of the bootstrap
FILTERS = ("task", "status")
STATUSES = ("running", "finished", "failed", "interrupted", "killed")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one run.

    Attributes:
        status: One of `STATUSES`.
        meta: What proposes.
        arm: The levers that it could pull: `harness`, `weights` or `both`.
        generations: Closed so far.
        dev: Of the incumbent; None while nothing was scored.
        test: Of the best candidate by dev; None while the sealed test is closed.
        cost_usd: Of model calls; None where none were made.
        age_s: Since the run was created.
    """

    run: str
    task: str
    meta: str
    target: str
    arm: str
    seed: int
    status: str
    generations: int
    dev: float | None
    test: float | None
    cost_usd: float | None
    age_s: float


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "list":
            return _list(args.words, as_json=args.json)
        if args.command == "resume":
            return _resume(args.folders, workers=args.workers)
        return _compare(args.runs)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sia: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sia.runs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="one line per run")
    listing.add_argument(
        "words", nargs="*", metavar="FOLDER|task=NAME|status=NAME",
        help=f"where to look (default: runs), and which to show; status: {', '.join(STATUSES)}",
    )  # fmt: skip
    listing.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    resume = commands.add_parser("resume", help="go on with every run that did not finish")
    resume.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    resume.add_argument("--workers", type=int, default=1, help="runs side by side (default: 1)")
    compare = commands.add_parser("compare", help="later runs beside the first one")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    return parser


def rows(folders: Sequence[Path], *, now: datetime) -> Iterator[Row]:
    """One row per run below the folders, in the order of their names.

    Raises:
        RunDirectoryError: A folder holds no run, or a run is damaged.
    """
    for folder in folders:
        for run in rundir.find_runs(folder):
            yield _row(run, now)


def _row(run: Path, now: datetime) -> Row:
    info = rundir.read_info(run)
    result = rundir.read_result(run)
    if result is not None:
        generations, dev = result.generations, result.best_score
        paid = spend.from_record(result.spend)
    else:
        generations, dev = _so_far(run)
        paid = spend.of_run(run)
    exam = rundir.read_exam(run)
    best = exam.best if exam else None
    return Row(
        run=str(run),
        task=info.task,
        meta=info.meta,
        target=info.target,
        arm=rundir.arm((run / rundir.CONFIG_FILE).read_text("utf-8")),
        seed=info.seed,
        status=rundir.status(run),
        generations=generations,
        dev=dev,
        test=best.test if best else None,
        cost_usd=spend.total(paid).cost_usd if paid else None,
        age_s=round((now - datetime.fromisoformat(info.created_at)).total_seconds(), 1),
    )


def _so_far(run: Path) -> tuple[int, float | None]:
    """Closed generations, and the incumbent's dev score, of a run that has no result yet."""
    closed = [line for line in rundir.read_journal(run) if line.kind == Generation.__name__]
    last = max(closed, key=lambda line: line.key, default=None)
    return len(closed), from_data(last.data, Generation).best_score if last else None


def _list(words: Sequence[str], *, as_json: bool) -> int:
    wanted: dict[str, str] = {}
    folders: list[Path] = []
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            folders.append(Path(word))
        elif name in FILTERS:
            wanted[name] = value
        else:
            raise ConfigError(f"{word!r}: runs are chosen by {'=, '.join(FILTERS)}= only.")
    if (status := wanted.get("status", STATUSES[0])) not in STATUSES:
        raise ConfigError(f"status={status!r} is none of {', '.join(STATUSES)}.")
    shown = [
        row
        for row in rows(folders or [Path("runs")], now=datetime.now(UTC))
        if all(getattr(row, name) == value for name, value in wanted.items())
    ]
    if as_json:
        line = msgspec.json.encode([asdict(row) for row in shown])
        print(msgspec.json.format(line).decode())
    else:
        _show(_table(shown))
    return 0


def _table(shown: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "task", "meta", "target", "arm", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("seed", "generations", "dev", "test", "USD", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in shown:
        table.add_row(
            *(Text(word) for word in (row.run, row.task, row.meta, row.target, row.arm)),
            row.status,
            str(row.seed),
            str(row.generations),
            _number(row.dev),
            _number(row.test),
            "" if row.cost_usd is None else f"{row.cost_usd:,.2f}",
            _age(row.age_s),
        )
    return table


def _resume(folders: Sequence[Path], *, workers: int) -> int:
    if workers < 1:
        raise ConfigError(f"--workers={workers} must be at least 1.")
    runs = [run for folder in folders for run in rundir.find_runs(folder)]
    found = {run: rundir.status(run) for run in dict.fromkeys(runs)}
    waiting = [
        run
        for run, status in found.items()
        if status not in ("finished", "running") and rundir.read_exam(run) is None
    ]
    if not waiting:
        print(f"nothing to resume: {_counts(list(found.values()))}")
        return 0
    with ThreadPoolExecutor(min(workers, len(waiting))) as pool:
        codes = list(pool.map(_go_on, waiting))
    failed = [run for run, code in zip(waiting, codes, strict=True) if code != 0]
    print(f"resumed {len(waiting)}: {_counts([rundir.status(run) for run in waiting])}")
    for run in failed:
        print(f"  {rundir.status(run)}  {run}")
    return 1 if failed else 0


def _go_on(run: Path) -> int:
    """Resumes one run in a process of its own, and prints its lines behind its name."""
    command = [sys.executable, "-m", "sia", override("resume", run)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{run.name} | {line}", end="", flush=True)
    return process.returncode


def _compare(runs: Sequence[Path]) -> int:
    if len(runs) < 2:
        raise ConfigError("Two runs are compared, or more: python -m sia.runs compare RUN RUN")
    first, *others = [_Compared.read(run) for run in runs]
    for other in others:
        if (other.task, other.public) != (first.task, first.public):
            raise ConfigError(
                f"{other.run} ({other.task}) was not made on the data of {first.run} "
                f"({first.task}): their items cannot be paired."
            )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "best"):
        table.add_column(name, no_wrap=True)
    for name in ("dev", "difference", "test", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in (first, *others):
        table.add_row(
            Text(str(one.run)),
            one.candidate,
            _number(one.dev),
            "" if one is first else _difference(first.dev_items, one.dev_items),
            _number(one.test),
            "" if one is first else _difference(first.test_items, one.test_items),
        )
    _show(table)
    print(
        "Differences to the first run on the same items, 95 % bootstrap interval over items. "
        "dev chose the candidates: its differences are optimistic."
    )
    return 0


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """The best candidate of one run, on dev and, once it is open, on the sealed test."""

    run: Path
    task: str
    public: str
    candidate: str
    dev: float | None
    dev_items: dict[str, float]
    test: float | None
    test_items: dict[str, float]

    @classmethod
    def read(cls, run: Path) -> "_Compared":
        info = rundir.read_info(run)
        records = rundir.records(run)
        closed = [record for key, record in records.items() if key.endswith("/generation")]
        best = from_data(closed[-1], Generation).incumbent if closed else None
        found = [
            from_data(record, Evaluation)
            for key, record in records.items()
            if key.endswith("/evaluation") and record["candidate"] == best
        ]
        if not found:
            raise RunDirectoryError(
                f"{run} has no scored candidate to compare. Go on with it: "
                f"python -m sia resume={run}"
            )
        exam = rundir.read_exam(run)
        row = exam.best if exam else None
        return cls(
            run=run,
            task=f"{info.task} v{info.task_version}",
            public=info.provenance.get("public_sha256", ""),
            candidate=found[0].candidate,
            dev=found[0].score,
            dev_items=found[0].items,
            test=row.test if row else None,
            test_items=row.items if row else {},
        )


def _difference(before: dict[str, float], after: dict[str, float]) -> str:
    """`+0.0210 [-0.0040, +0.0460]`; empty where one side has no items."""
    if not before or not after:
        return ""
    from sia import seeds
    from sia.verify.stats import aligned, paired_difference

    one, other = aligned(before, after)
    found = paired_difference(one, other, draws=DRAWS, rng=seeds.stream(0, "runs/compare"))
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _counts(statuses: Sequence[str]) -> str:
    return ", ".join(f"{statuses.count(name)} {name}" for name in STATUSES if statuses.count(name))


def _show(table: Table) -> None:
    # A narrow terminal breaks the lines; the words stay whole.
    console = Console()
    Console(file=console.file, width=WIDTH, force_terminal=console.is_terminal).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _age(seconds: float) -> str:
    for size, letter in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {letter}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
