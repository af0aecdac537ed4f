"""How often the intervals of `sia.report.stats` hold the truth, and how often noise is called gain.

    python benchmarks/coverage.py --out reports/coverage.md

Experiments are simulated with all that real ones have: items of different difficulty that all runs
answer, an effect of the arm on each item, a run's luck that moves all its items (`spread` of seeds:
its standard deviation beside that of the items' mean), and noise in each answer. Scores are 0 or 1,
or anything between; either way the true mean is known in closed form.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from sia.report import stats
from sia.verify.stats import Array, mean_interval

ARM_BY_ITEM, REST = 0.5, 0.5  # standard deviations, beside 1 for the items' difficulty
LEVELS = {"a": 0.6, "b": 0.8}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One kind of experiment; `spread` as in the module's docstring."""

    graded: bool
    seeds: int
    spread: float
    items: int = 300

    @property
    def seed_sd(self) -> float:
        """Of a run's luck, on the scale of the items' difficulty."""
        return self.spread * float(np.sqrt((1 + ARM_BY_ITEM**2 + REST**2) / self.items))


def simulate(
    setting: Setting, levels: dict[str, float], rng: np.random.Generator
) -> dict[str, Array]:
    """Scores of each arm, shape (seeds, items), on the same items."""
    difficulty = rng.normal(0, 1, setting.items)
    shape = (setting.seeds, setting.items)
    scores = {}
    for name, level in levels.items():
        latent = (
            level
            + difficulty
            + rng.normal(0, ARM_BY_ITEM, setting.items)
            + rng.normal(0, setting.seed_sd, (setting.seeds, 1))
            + rng.normal(0, REST, shape)
        )
        scores[name] = norm.cdf(latent) if setting.graded else (latent > 0).astype(float)
    return scores


def true_mean(setting: Setting, level: float) -> float:
    """Expected score over all seeds and items."""
    variance = 1 + ARM_BY_ITEM**2 + REST**2 + setting.seed_sd**2
    return float(norm.cdf(level / np.sqrt(variance + setting.graded)))


def items_only(scores: Array, rng: np.random.Generator) -> tuple[float, float]:
    """The bootstrap over items with the seeds as they are."""
    found = mean_interval(scores.mean(0), draws=400, rng=rng)
    return found.low, found.high


def two_level(scores: Array, rng: np.random.Generator) -> tuple[float, float]:
    """The bootstrap that resamples seeds, and items in common."""
    n_seeds, n_items = scores.shape
    of_seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), 400) / n_seeds
    of_items = rng.multinomial(n_items, np.full(n_items, 1 / n_items), 400) / n_items
    low, high = np.quantile(((of_seeds @ scores) * of_items).sum(1), [0.025, 0.975])
    return float(low), float(high)


def ours(*blocks: Array) -> tuple[float, float]:
    """What the tables show."""
    found = stats.crossed(*blocks)
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def coverage(setting: Setting, experiments: int, rng: np.random.Generator) -> dict[str, float]:
    """Share of the intervals that hold the truth, by what they are of."""
    hits: Counter[str] = Counter()
    a, b = (true_mean(setting, LEVELS[name]) for name in LEVELS)
    for _ in range(experiments):
        scores = simulate(setting, LEVELS, rng)
        gain = scores["b"] - scores["a"]
        intervals = {
            "mean": (ours(scores["b"]), b),
            "gain": (ours(gain), b - a),
            "gap": (ours(*_dev_and_test(setting, rng)), 0.0),
            "gain, items only": (items_only(gain, rng), b - a),
            "gain, two-level bootstrap": (two_level(gain, rng), b - a),
        }
        hits.update(name for name, ((low, high), true) in intervals.items() if low <= true <= high)
    return {name: hits[name] / experiments for name in intervals}


def _dev_and_test(setting: Setting, rng: np.random.Generator) -> tuple[Array, Array]:
    """Dev and negated test scores of an arm for which the two are equally hard.

    Each has a luck of its own: what moves both alike leaves no trace in the gap.
    """
    dev, test = (simulate(setting, {"b": LEVELS["b"]}, rng)["b"] for _ in range(2))
    return dev, -test


def false_claims(
    setting: Setting, experiments: int, rng: np.random.Generator, *, arms: int = 3
) -> float:
    """Share of tables that call anything better where all candidates are equally good.

    Each run keeps the best of ten candidates by dev score. They differ in a comment: their answers
    differ by noise alone.
    """
    claimed = 0
    for _ in range(experiments):
        difficulty = rng.normal(0, 1, setting.items)
        dev_difficulty = rng.normal(0, 1, setting.items)

        def attempts(number: int, of_items: Array) -> Array:
            luck = rng.normal(0, setting.seed_sd, (number, 1))
            latent = 0.8 + of_items + luck + rng.normal(0, REST, (number, setting.items))
            return norm.cdf(latent) if setting.graded else (latent > 0).astype(float)

        reference = attempts(setting.seeds, difficulty)
        best = []
        for _ in range(arms):
            chosen = []
            for seed in range(setting.seeds):
                test = attempts(10, difficulty)
                test[0] = reference[seed]
                chosen.append(test[attempts(10, dev_difficulty).mean(1).argmax()])
            best.append(np.array(chosen))
        pairs = [(after, reference) for after in best]
        pairs += [(best[j], best[i]) for j in range(arms) for i in range(j)]
        gains = [_gain(one - other, rng) for one, other in pairs]
        floor = (
            stats.noise_floor(reference.mean(1)[:, None], seeds=setting.seeds)
            if setting.seeds > 1
            else None
        )
        verdicts = stats.claims(gains, floor=[floor] * len(gains))
        claimed += any(claim.verdict == stats.BETTER for claim in verdicts)
    return claimed / experiments


def _gain(differences: Array, rng: np.random.Generator) -> stats.Gain:
    """As in the tables, without the resampling that a verdict over several seeds does not use."""
    if len(differences) == 1:
        return stats.paired_gain(differences, draws=1_000, rng=rng)
    found = stats.crossed(differences)
    return stats.Gain(
        value=found.value, se=found.se, low=found.low, high=found.high, these_low=None,
        these_high=None, p=found.p, p_items=None, detectable=found.detectable,
    )  # fmt: skip


def optimism(experiments: int, spread: float, rng: np.random.Generator) -> tuple[float, float]:
    """True and estimated mean optimism of the best of 15 candidates on 300 items scored 0 or 1."""
    true, estimated = [], []
    for _ in range(experiments):
        levels = 0.8 + rng.normal(0, spread, 15)
        latent = levels[:, None] + rng.normal(0, 1, 300) + rng.normal(0, REST, (15, 300))
        scores = (latent > 0).astype(float)
        chosen = scores.mean(1).argmax()
        true.append(scores[chosen].mean() - norm.cdf(levels[chosen] / np.sqrt(1 + REST**2)))
        estimated.append(stats.optimism(scores, draws=300, rng=rng))
    return float(np.mean(true)), float(np.mean(estimated))


def report(experiments: int, claims: int, say: Callable[[str], None]) -> Iterator[str]:
    """The lines of the report."""
    rng = np.random.default_rng(0)
    yield from [
        "## What the intervals hold", "",
        "Made by `python benchmarks/coverage.py`; see there and docs/papers.md for how. Percentage "
        f"of {experiments:,} simulated experiments in which a 95 % interval holds the truth, 300 "
        f"items; one standard error is {100 * np.sqrt(0.95 * 0.05 / experiments):.1f} points. The "
        "last two columns are what is not used, and why.", "",
        "| scores | seeds | spread of seeds | mean | gain | dev - test | gain, items only | "
        "gain, two-level bootstrap |", "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for graded in (False, True):
        for seeds in (2, 3, 5):
            for spread in (0.0, 0.5, 1.0, 2.0):
                setting = Setting(graded=graded, seeds=seeds, spread=spread)
                say(str(setting))
                found = coverage(setting, experiments, rng)
                cells = " | ".join(f"{100 * share:.1f}" for share in found.values())
                yield f"| {_kind(setting)} | {seeds} | {spread:g} | {cells} |"
    yield from [
        "", "## How often noise is called gain", "",
        "Three arms and the reference, six comparisons; every run keeps the best of ten candidates "
        f"that differ in a comment. Percentage of {claims:,} tables with any `better`. With one "
        "seed the luck of a run cannot be told from a gain: that is why one seed is not enough.",
        "",
        "| scores | seeds | spread of seeds | tables with a false gain, % |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for graded in (False, True):
        for seeds, spread in ((3, 0.0), (3, 1.0), *(() if graded else ((1, 0.0), (1, 1.0)))):
            setting = Setting(graded=graded, seeds=seeds, spread=spread)
            say(f"false claims, {setting}")
            share = false_claims(setting, claims, rng)
            yield f"| {_kind(setting)} | {seeds} | {spread:g} | {100 * share:.1f} |"
    yield from [
        "", "## Expected optimism of the best of 15", "",
        "300 items scored 0 or 1; `spread` is the standard deviation of how good the candidates "
        "truly are, on the scale of the items' difficulty.", "",
        "| spread | true | estimated |", "| --- | --- | --- |",
    ]  # fmt: skip
    for spread in (0.0, 0.05, 0.2):
        true, estimated = optimism(experiments, spread, rng)
        yield f"| {spread:g} | {true:.4f} | {estimated:.4f} |"


def _kind(setting: Setting) -> str:
    return "0 to 1" if setting.graded else "0 or 1"


def main() -> None:
    """Prints the report, and writes it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experiments", type=int, default=500)
    parser.add_argument("--claims", type=int, default=500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = list(report(args.experiments, args.claims, lambda text: print(text, flush=True)))
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
