"""Arms of a paper: examined runs as tables and figures, one set for each task.

An arm is what the runs of several seeds have in common. `reference`, the reference harness as each
run's exam measured it, is an arm that needs no run of its own.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sia import rundir, seeds
from sia.errors import RunDirectoryError, SiaError
from sia.records import BEST, REFERENCE, ExamRow
from sia.report import stats
from sia.report.examined import NOT_BASELINES, Examined, arms_of, read
from sia.report.tables import (
    Table,
    between,
    csv_text,
    latex,
    markdown,
    number,
    p_value,
    signed,
)
from sia.verify.stats import Array

DRAWS = 10_000  # of a bootstrap
OPTIMISM_DRAWS = 1_000
REFERENCE_ARM = "reference"


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run: what it chose by dev score, and what that cost."""

    task: str
    arm: str
    seed: int
    dev: float | None
    test: float | None
    low: float | None
    high: float | None
    generations: int
    candidates: int
    updates: int
    seconds: float
    cost_usd: float | None
    run: str
    note: str


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """One arm over its seeds.

    Attributes:
        items: Of the sealed test; 1 where the scores of single items are not known.
        gap: By how much dev flatters: dev minus test, or test minus dev where low scores are good.
        optimism: What the choice of the best by dev score is expected to add to the gap; None for
            an arm in which nothing was chosen.
        candidates: Scored on dev, mean of the runs; `seconds` and `cost_usd` are means, too.
    """

    task: str
    arm: str
    seeds: int
    items: int
    test: float
    se: float | None
    low: float | None
    high: float | None
    seed_min: float
    seed_max: float
    dev: float | None
    gap: float | None
    gap_low: float | None
    gap_high: float | None
    optimism: float | None
    candidates: float | None
    seconds: float | None
    cost_usd: float | None
    runs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The gain of one arm over another, on the same items and over the seeds that both have.

    Attributes:
        gain: Positive where the arm is better, whichever way the metric points.
        low, high, these_low, these_high, p, p_items, detectable: As in `sia.report.stats.Gain`.
        p_holm: Adjusted for all comparisons of the table.
        floor: What two equally good arms differ by, from repeats of the baselines; None where
            nothing was repeated.
        verdict: As in `sia.report.stats.Claim`.
    """

    task: str
    arm: str
    against: str
    seeds: int
    items: int
    gain: float
    se: float | None
    low: float | None
    high: float | None
    these_low: float | None
    these_high: float | None
    p: float | None
    p_holm: float | None
    p_items: float | None
    floor: float | None
    detectable: float | None
    verdict: str
    runs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs of several seeds that differ in nothing else, and the exam's row that stands for them.

    Attributes:
        runs: By seed. The reference has those of all arms: its row stands in every exam.
    """

    name: str
    row: str
    runs: Mapping[int, tuple[Examined, ...]]

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all runs, in the order of their seeds."""
        return tuple(run.info.run_id for seed in sorted(self.runs) for run in self.runs[seed])


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is known of the arms of one task."""

    task: str
    arms: tuple[Arm, ...]
    tables: tuple[Table, ...]


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sia.report arms", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="or folders of runs")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=RUN,RUN",
        help="names an arm; other runs are grouped by what differs between their configurations",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="ARM",
        help="compare with this arm alone; without it, all pairs",
    )
    parser.add_argument("--out", type=Path, help="folder for tables and figures, one for each task")
    args = parser.parse_args(argv)
    try:
        for report in reports(args.runs, args.arm, args.against):
            text = "\n".join(markdown(table) for table in report.tables)
            print(f"## {report.task}\n\n{text}")
            if args.out:
                write(report, args.out / report.task.replace("/", "_"))
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def reports(
    folders: Sequence[Path], named: Sequence[str] = (), against: Sequence[str] = ()
) -> Iterator[Report]:
    """One report for each task among the runs, in the order of the tasks' names.

    Args:
        folders: Runs, or folders of runs; their arms are named after what differs between them.
        named: `NAME=RUN,RUN`: arms with a name.
        against: Arms to compare with; none means all pairs.

    Raises:
        RunDirectoryError: A run cannot be read or compared, or an arm is not there.
    """
    by_task: dict[str, dict[str, list[Examined]]] = defaultdict(dict)
    for text in named:
        name, equals, paths = text.partition("=")
        if not (name and equals and paths) or name == REFERENCE_ARM:
            raise RunDirectoryError(
                f"--arm {text!r} is not of the form NAME=RUN,RUN, with a name other than "
                f"{REFERENCE_ARM!r}."
            )
        for run in _read(Path(path) for path in paths.split(",")):
            by_task[run.info.task].setdefault(name, []).append(run)
    derived: dict[str, list[Examined]] = defaultdict(list)
    for run in _read(folders):
        derived[run.info.task].append(run)
    for task, runs in derived.items():
        for name, own in arms_of(runs).items():
            by_task[task].setdefault(name, []).extend(own)
    if not by_task:
        raise RunDirectoryError("No run was named. Name some: python -m sia.report arms RUN...")
    for task in sorted(by_task):
        yield _report(task, by_task[task], against)


def write(report: Report, folder: Path) -> None:
    """Tables as `.csv` and `.tex`, figures as `.pdf` and `.png`, and `arms.md` with all of them."""
    from sia.report import figures  # matplotlib takes a second

    folder.mkdir(parents=True, exist_ok=True)
    for table in report.tables:
        rundir.write_atomic(folder / f"{table.name}.csv", csv_text(table).encode())
        rundir.write_atomic(folder / f"{table.name}.tex", latex(table).encode())
    drawn = figures.draw(report.arms, folder)
    parts = [f"## {report.task}", "", *(markdown(table) for table in report.tables)]
    parts += [f"![{caption}]({name}.png)\n" for name, caption in drawn.items()]
    rundir.write_atomic(folder / "arms.md", "\n".join(parts).encode())


def _read(folders: Iterator[Path] | Sequence[Path]) -> list[Examined]:
    paths = {path.resolve(): path for folder in folders for path in rundir.find_runs(folder)}
    return [read(path) for path in paths.values()]


def _report(task: str, runs: Mapping[str, Sequence[Examined]], against: Sequence[str]) -> Report:
    everything = [run for own in runs.values() for run in own]
    scored = [run for run in everything if _scored(run, BEST) and _scored(run, REFERENCE)]
    left_out = [run for run in everything if run not in scored]
    if not scored:
        raise RunDirectoryError(
            f"No run of task {task!r} has a test score of its best candidate and of the reference "
            f"harness. See why: python -m sia.report {everything[0].path}"
        )
    _same_items(scored)
    maximize = all(run.maximize for run in scored)
    arms = [_arm(REFERENCE_ARM, REFERENCE, scored)]
    for name, own in runs.items():
        if members := [run for run in own if run in scored]:
            arms.append(_arm(name, BEST, members))
            if repeated := [seed for seed, same in arms[-1].runs.items() if len(same) > 1]:
                both = " and ".join(str(run.path) for run in arms[-1].runs[repeated[0]][:2])
                raise RunDirectoryError(
                    f"{both} are both seed {repeated[0]} of arm {name!r}. Leave one out, or name "
                    "the arms: --arm NAME=RUN,RUN"
                )
    for name in against:
        if name not in [arm.name for arm in arms]:
            raise RunDirectoryError(
                f"--against {name!r} is no arm of task {task!r}. Its arms: "
                f"{', '.join(arm.name for arm in arms)}"
            )
    repeats = noise_of_baselines(arms[0])
    pairs = [
        (arm, other)
        for index, arm in enumerate(arms[1:], 1)
        for other in ([each for each in arms if each.name in against] if against else arms[:index])
        if other is not arm and arm.runs.keys() & other.runs.keys()
    ]
    traced = [f"{arm.name}: {', '.join(arm.ids)}." for arm in arms[1:]]
    missing = [
        f"Left out, without a test score: {run.info.run_id} ({run.path})." for run in left_out
    ]
    metric = f"{scored[0].metric}, {'higher' if maximize else 'lower'} is better"
    return Report(
        task=task,
        arms=tuple(arms),
        tables=(
            Table(
                name="arms",
                title=f"{task}: arms ({metric})",
                columns=_ARM_COLUMNS,
                rows=[_arm_row(task, arm, maximize) for arm in arms],
                notes=[*_ARM_NOTES, *missing, *_warnings(scored), *traced],
            ),
            Table(
                name="comparisons",
                title=f"{task}: gains on the sealed test",
                columns=_COMPARISON_COLUMNS,
                rows=_comparisons(task, pairs, repeats, maximize),
                notes=[*_COMPARISON_NOTES, _floor_note(repeats)],
            ),
            Table(
                name="runs",
                title=f"{task}: runs",
                columns=_RUN_COLUMNS,
                rows=[
                    _run_row(task, name, run)
                    for name, own in runs.items()
                    for run in sorted(own, key=lambda run: run.info.seed)
                ],
            ),
        ),
    )


def _arm(name: str, row: str, runs: Sequence[Examined]) -> Arm:
    by_seed: dict[int, list[Examined]] = defaultdict(list)
    for run in runs:
        by_seed[run.info.seed].append(run)
    return Arm(name=name, row=row, runs={seed: tuple(by_seed[seed]) for seed in sorted(by_seed)})


def _scored(run: Examined, row: str) -> bool:
    return row in run.rows and run.rows[row].test is not None


def _same_items(runs: Sequence[Examined]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.info.task_version != first.info.task_version or (
            run.rows[BEST].items.keys() != first.rows[BEST].items.keys()
        ):
            raise RunDirectoryError(
                f"{run.path} and {first.path} were not examined on the same items of task "
                f"{first.info.task!r}: their scores cannot be compared. Report them apart."
            )


def scores_on_test(arm: Arm, of_seeds: Sequence[int], row: str) -> Array:
    """Shape (seeds, items), mean of the runs of a seed; one column where items are not known.

    Args:
        arm: Whose runs.
        of_seeds: In the order of the result.
        row: Which row of their exams.
    """
    rows = [[run.rows[row] for run in arm.runs[seed]] for seed in of_seeds]
    return _matrix([[(row.test, row.items) for row in same] for same in rows])


def scores_on_dev(arm: Arm, of_seeds: Sequence[int]) -> Array | None:
    """Like `scores_on_test`; None where a run has no dev score."""
    found = []
    for seed in of_seeds:
        own = [(run.rows[arm.row].dev, run.dev_items.get(arm.row, {})) for run in arm.runs[seed]]
        if any(score is None for score, _ in own):
            return None
        found.append(own)
    return _matrix(found)


def _matrix(scores: Sequence[Sequence[tuple[float | None, Mapping[str, float]]]]) -> Array:
    """Seeds by items; by one column of scores where the items' mean is not the score."""
    flat = [pair for same in scores for pair in same]
    names = sorted(flat[0][1])
    of_items = names and all(
        items.keys() == flat[0][1].keys()
        and np.isclose(np.mean(list(items.values())), score or 0.0, rtol=1e-6, atol=1e-9)
        for score, items in flat
    )
    if not of_items:
        return np.array([[np.mean([score for score, _ in same])] for same in scores], np.float64)
    return np.array(
        [
            np.mean([[items[name] for name in names] for _, items in same], axis=0)
            for same in scores
        ],
        np.float64,
    )


def noise_of_baselines(reference: Arm) -> dict[str, Array]:
    """Repeats of every row of the exams that no search touched: name -> shape (seeds, attempts).

    Only what ran on two seeds or more; of seeds with more attempts than others the first count.
    """
    runs = reference.runs
    names = {
        name
        for same in runs.values()
        for run in same
        for name in run.rows
        if name not in NOT_BASELINES
    }
    found = {}
    for name in sorted(names, key=lambda name: (name != REFERENCE, name)):
        repeats = [
            [row.test for run in same if (row := run.rows.get(name)) and row.test is not None]
            for same in runs.values()
        ]
        repeats = [own for own in repeats if own]
        if len(repeats) > 1:
            attempts = min(len(own) for own in repeats)
            found[name] = np.array([own[:attempts] for own in repeats], np.float64)
    return found


def _arm_row(task: str, arm: Arm, maximize: bool) -> ArmRow:
    of_seeds = list(arm.runs)
    test = scores_on_test(arm, of_seeds, arm.row)
    found = stats.crossed(test)
    dev = scores_on_dev(arm, of_seeds)
    sign = 1.0 if maximize else -1.0
    gap = stats.crossed(sign * dev, -sign * test) if dev is not None else None
    searched = arm.row == BEST
    runs = [run for same in arm.runs.values() for run in same]
    prices = [run.cost_usd for run in runs]
    by_seed = test.mean(1)
    shares = bool(np.isin(test, (0.0, 1.0)).all())  # a share of items does not leave 0 to 1
    return ArmRow(
        task=task,
        arm=arm.name,
        seeds=len(of_seeds),
        items=test.shape[1],
        test=found.value,
        se=found.se,
        low=max(found.low, 0.0) if shares and found.low is not None else found.low,
        high=min(found.high, 1.0) if shares and found.high is not None else found.high,
        seed_min=float(by_seed.min()),
        seed_max=float(by_seed.max()),
        dev=float(dev.mean()) if dev is not None else None,
        gap=gap.value if gap else None,
        gap_low=gap.low if gap else None,
        gap_high=gap.high if gap else None,
        optimism=_optimism(runs, sign) if searched else None,
        candidates=float(np.mean([len(run.candidates) for run in runs])) if searched else None,
        seconds=float(np.mean([run.elapsed_s for run in runs])) if searched else None,
        cost_usd=float(np.mean([price for price in prices if price is not None]))
        if searched and all(price is not None for price in prices)
        else None,
        runs=arm.ids,
    )


def _optimism(runs: Sequence[Examined], sign: float) -> float | None:
    found = []
    for run in runs:
        names = sorted(run.candidates[0]) if run.candidates else []
        if not names or any(items.keys() != run.candidates[0].keys() for items in run.candidates):
            return None
        scores = np.array([[items[name] for name in names] for items in run.candidates])
        rng = seeds.stream(run.info.seed, "report/optimism")
        found.append(stats.optimism(sign * scores, draws=OPTIMISM_DRAWS, rng=rng))
    return float(np.mean(found))


def _comparisons(
    task: str, pairs: Sequence[tuple[Arm, Arm]], repeats: Mapping[str, Array], maximize: bool
) -> list[Comparison]:
    """A row for each pair, over the seeds that both have."""
    gains, floors, sizes = [], [], []
    for arm, other in pairs:
        differences = _differences(arm, other) * (1.0 if maximize else -1.0)
        rng = seeds.stream(0, f"report/{task}/{arm.name}/{other.name}")
        gains.append(stats.paired_gain(differences, draws=DRAWS, rng=rng))
        n_seeds = len(differences)
        floors.append(
            max((stats.noise_floor(each, seeds=n_seeds) for each in repeats.values()), default=None)
        )
        sizes.append(differences.shape)
    return [
        Comparison(
            task=task,
            arm=arm.name,
            against=other.name,
            seeds=n_seeds,
            items=n_items,
            gain=gain.value,
            se=gain.se,
            low=gain.low,
            high=gain.high,
            these_low=gain.these_low,
            these_high=gain.these_high,
            p=gain.p,
            p_holm=claim.p_holm,
            p_items=gain.p_items,
            floor=floor,
            detectable=gain.detectable,
            verdict=claim.verdict,
            runs=tuple(
                run.info.run_id
                for each in ((arm,) if other.name == REFERENCE_ARM else (arm, other))
                for seed in _shared(arm, other)
                for run in each.runs[seed]
            ),
        )
        for (arm, other), (n_seeds, n_items), gain, floor, claim in zip(
            pairs, sizes, gains, floors, stats.claims(gains, floor=floors), strict=True
        )
    ]


def _shared(arm: Arm, other: Arm) -> list[int]:
    return [seed for seed in arm.runs if seed in other.runs]


def _differences(arm: Arm, other: Arm) -> Array:
    """Shape (seeds, items): arm minus the other, or the reference in the arm's own exams."""
    shared = _shared(arm, other)
    after = scores_on_test(arm, shared, arm.row)
    before = scores_on_test(arm if other.name == REFERENCE_ARM else other, shared, other.row)
    if before.shape != after.shape:  # the items of one are not known
        before, after = (each.mean(1, keepdims=True) for each in (before, after))
    return after - before


def _run_row(task: str, arm: str, run: Examined) -> RunRow:
    row = run.rows.get(BEST, ExamRow(name=BEST))
    return RunRow(
        task=task,
        arm=arm,
        seed=run.info.seed,
        dev=row.dev,
        test=row.test,
        low=row.low,
        high=row.high,
        generations=run.generations,
        candidates=len(run.candidates),
        updates=run.updates,
        seconds=run.elapsed_s,
        cost_usd=run.cost_usd,
        run=run.info.run_id,
        note=row.note,
    )


def _warnings(runs: Sequence[Examined]) -> list[str]:
    return [f"Warning: {each}" for each in dict.fromkeys(w for run in runs for w in run.warnings)]


def _floor_note(repeats: Mapping[str, Array]) -> str:
    if not repeats:
        return "Floor: not known, no baseline ran on two seeds."
    spread = ", ".join(
        f"{name} {np.sqrt(each.var(axis=0, ddof=1).mean()):.4f} over {len(each)} seeds"
        for name, each in repeats.items()
    )
    return f"Floor: from the standard deviation of the baselines' repeats ({spread})."


_ARM_COLUMNS: dict[str, Callable[[ArmRow], str]] = {
    "arm": lambda row: row.arm,
    "seeds": lambda row: str(row.seeds),
    "items": lambda row: str(row.items),
    "test": lambda row: number(row.test),
    "SE": lambda row: number(row.se),
    "95 % interval": lambda row: between(row.low, row.high),
    "of seeds": lambda row: between(row.seed_min, row.seed_max),
    "dev": lambda row: number(row.dev),
    "dev - test": lambda row: signed(row.gap),
    "its 95 % interval": lambda row: between(row.gap_low, row.gap_high, sign=True),
    "expected optimism": lambda row: signed(row.optimism),
    "candidates": lambda row: number(row.candidates, 1),
    "seconds": lambda row: number(row.seconds, 0),
    "USD": lambda row: number(row.cost_usd, 2),
}
_ARM_NOTES = (
    "Chosen by dev score alone. Intervals are for new seeds and new items; with one seed for new "
    "items alone. Dev - test is positive where dev flatters; expected optimism is the part of it "
    "that choosing the best of the candidates explains.",
)
_COMPARISON_COLUMNS: dict[str, Callable[[Comparison], str]] = {
    "arm": lambda row: row.arm,
    "against": lambda row: row.against,
    "seeds": lambda row: str(row.seeds),
    "gain": lambda row: signed(row.gain),
    "95 % interval": lambda row: between(row.low, row.high, sign=True),
    "these runs": lambda row: between(row.these_low, row.these_high, sign=True),
    "p": lambda row: p_value(row.p),
    "p (Holm)": lambda row: p_value(row.p_holm),
    "p (items)": lambda row: p_value(row.p_items),
    "floor": lambda row: number(row.floor),
    "detectable": lambda row: number(row.detectable),
    "": lambda row: row.verdict + (" (1 seed)" if row.seeds == 1 else ""),
}
_COMPARISON_NOTES = (
    "Gains are paired by item and seed. The interval and p are for new seeds and new items; with "
    "one seed they know nothing of other seeds. These runs: the paired bootstrap over items, "
    "10,000 draws, and p (items) the exact paired test, both for these very runs. Detectable: the "
    "true gain that so many seeds and items find in four of five tries.",
)
_RUN_COLUMNS: dict[str, Callable[[RunRow], str]] = {
    "arm": lambda row: row.arm,
    "seed": lambda row: str(row.seed),
    "dev": lambda row: number(row.dev),
    "test": lambda row: number(row.test),
    "95 % interval": lambda row: between(row.low, row.high),
    "generations": lambda row: str(row.generations),
    "candidates": lambda row: str(row.candidates),
    "updates": lambda row: str(row.updates),
    "seconds": lambda row: number(row.seconds, 0),
    "USD": lambda row: number(row.cost_usd, 2),
    "run": lambda row: row.run,
    "note": lambda row: row.note,
}
