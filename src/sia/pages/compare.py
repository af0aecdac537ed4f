"""Several runs beside one another: the best candidates of each, paired item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sia import seeds
from sia.pages.run import RunPage, RunReader
from sia.verify.stats import Interval, aligned, mean_interval, paired_difference

DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run of a comparison.

    Attributes:
        dev: Score of its best candidate, with its interval over items; None without one.
        gain: Paired difference to the first run on the same dev items; None for the first.
        test: As `dev`, on the sealed test; None while it is sealed.
        test_gain: As `gain`, on the sealed test.
        problem: Why there is no difference.
    """

    page: RunPage
    dev: Interval | None
    gain: Interval | None
    test: Interval | None
    test_gain: Interval | None
    problem: str = ""


def compare(readers: Sequence[RunReader]) -> list[Compared]:
    """The runs in their order, each paired with the first one.

    Intervals are 95 % bootstrap over items, from a fixed seed: the same runs give the same numbers.
    A difference is positive where the score is higher, whatever the metric's direction.
    """
    devs = [_best_items(reader) for reader in readers]
    tests = [_test_items(reader.page()) for reader in readers]
    compared = []
    for place, reader in enumerate(readers):
        gain, problem = _paired(devs[0], devs[place]) if place else (None, "")
        test_gain, _ = _paired(tests[0], tests[place]) if place else (None, "")
        compared.append(
            Compared(
                page=reader.page(),
                dev=_mean(devs[place]),
                gain=gain,
                test=_mean(tests[place]),
                test_gain=test_gain,
                problem=problem,
            )
        )
    return compared


def _best_items(reader: RunReader) -> Mapping[str, float]:
    best = reader.page().incumbent
    evaluation = reader.evaluation(best) if best else None
    return evaluation.items if evaluation else {}


def _test_items(page: RunPage) -> Mapping[str, float]:
    best = page.exam.best if page.exam else None
    return best.items if best else {}


def _mean(items: Mapping[str, float]) -> Interval | None:
    if not items:
        return None
    scores, _ = aligned(items, items)
    return mean_interval(scores, draws=DRAWS, rng=seeds.stream(0, "compare"))


def _paired(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[Interval | None, str]:
    if not a or not b:
        return None, "one of them has no scores of items"
    try:
        before, after = aligned(a, b)
    except ValueError as error:
        return None, f"not the same items: {error}"
    return paired_difference(before, after, draws=DRAWS, rng=seeds.stream(0, "compare")), ""
