"""What each piece of the harness is worth: the public counts split once more, dev and test unread.

Run: python tasks/denoising/pieces.py --data <public folder of denoising>
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "harness")]

from prepare import TRAIN_SHARE, read_counts, split_matrix  # noqa: E402
from target_agent import denoise  # noqa: E402
from verify import OFFICIAL_GATE, TOTALS_BAND, log_normalised, normalised  # noqa: E402
from verify import official_poisson as official  # noqa: E402
from verify import proper_poisson as proper  # noqa: E402

Changes = dict[str, Any]
Counts = NDArray[np.int64]

SVD: Changes = {"graph.use": False, "svd.use": True, "representation.reversed_order": False}
EXPECTED: Changes = {**SVD, "finish.expected_log": True}
SHARP: Changes = {**EXPECTED, "finish.power": 1.3}
FACTORS: Changes = {**SVD, "svd.use": False, "factors.use": True}

PIECES: dict[str, Changes] = {
    "MAGIC, reversed normalisation": {},
    "· usual order": {"representation.reversed_order": False},
    "· logarithms": {"representation.reversed_order": False, "representation.transform": "log"},
    "· 15 neighbours": {"graph.knn": 15},
    "· one step": {"graph.steps": 1},
    "· power 1.6": {"finish.power": 1.6},
    "· expected logarithm": {"finish.expected_log": True},
    "· expected logarithm, power 1.3": {"finish.expected_log": True, "finish.power": 1.3},
    "SVD of square roots, rank 20": SVD,
    "· rank 10": {**SVD, "svd.rank": 10},
    "· SVD, power 1.6": {**SVD, "finish.power": 1.6},
    "Poisson factors, rank 10": FACTORS,
    "SVD, expected logarithm": EXPECTED,
    "· half Poisson factors": {**EXPECTED, "factors.use": True},
    "SVD, expected logarithm, power 1.3": SHARP,
    "· half graph": {**SHARP, "graph.use": True},
    "· half Poisson factors, sharp": {**SHARP, "factors.use": True},
    "· a tenth of the average cell": {**SHARP, "finish.mean_weight": 0.1},
}


def main() -> None:
    """Print one line of a Markdown table for each piece, then the tricks that guards refuse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the train counts")
    parser.add_argument("--only", default="", help="pieces whose name contains this")
    args = parser.parse_args()
    base = yaml.safe_load((HERE / "harness" / "harness.yaml").read_text(encoding="utf-8"))
    splits = {}
    for path in sorted(args.data.glob("*.npz")):
        counts, _ = read_counts(path)
        splits[path.stem] = (*split_matrix(counts, seed=0), second_train(counts))
    names = " | ".join(splits)
    print(f"| piece | {names} | mean | poisson_norm | likelihood gain | seconds |")
    print("| --- |" + " --- |" * (len(splits) + 4), flush=True)
    for name, changes in PIECES.items():
        if args.only in name:
            config = changed(base, changes)
            show(name, splits, lambda train, other, config=config: denoise(train * 1.0, config))
    for name, trick in TRICKS.items():
        if args.only in name:
            show(name, splits, trick)


def second_train(counts: Counts) -> Counts:
    """Train counts of another split seed, with the genes of the first."""
    first = np.random.RandomState(0).binomial(counts, TRAIN_SHARE)
    second: Counts = np.random.RandomState(1).binomial(counts, TRAIN_SHARE)
    return second[:, first.sum(0) > 0]


def show(
    name: str,
    splits: Mapping[str, tuple[Counts, Counts, Counts]],
    make: Callable[[Counts, Counts], NDArray[np.float64]],
) -> None:
    """One row: error norm of each matrix and their mean, Poisson norm, likelihood gain, seconds."""
    norms, poissons, gains = [], [], []
    start = time.process_time()
    for train, held, other in splits.values():
        denoised = make(train, other)
        truth = log_normalised(held)
        errors = [((log_normalised(x) - truth) ** 2).mean() for x in (denoised, train)]
        norms.append(normalised(errors[0], nothing=errors[1], perfect=0.0))
        ends = {
            "nothing": official(held, train, train),
            "perfect": official(held, held, train),
        }
        poissons.append(normalised(official(held, denoised, train), **ends))
        gains.append(proper(held, train, train) - proper(held, denoised, train))
    each = " | ".join(f"{norm:.4f}" for norm in norms)
    seconds = time.process_time() - start
    print(
        f"| {name} | {each} | {np.mean(norms):.4f} | {np.mean(poissons):.3f} | "
        f"{np.mean(gains):+.3f} | {seconds:.1f} |",
        flush=True,
    )


def thousandth(train: Counts, other: Counts) -> NDArray[np.float64]:
    """MAGIC times 0.001: the same error, and the official gate passed."""
    base = yaml.safe_load((HERE / "harness" / "harness.yaml").read_text(encoding="utf-8"))
    return denoise(train * 1.0, base) * 1e-3


def second_split(train: Counts, other: Counts) -> NDArray[np.float64]:
    """What a second public split of the same cells would give away."""
    return np.maximum(other - train, 0) + 1e-3 * train


TRICKS = {
    f"refused: MAGIC times 0.001 (band {TOTALS_BAND}, official gate {OFFICIAL_GATE})": thousandth,
    "impossible here: molecules that a second split of the same cells shows": second_split,
}


def changed(base: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of the config with dotted paths set."""
    config = copy.deepcopy(dict(base))
    for path, value in changes.items():
        section, key = path.split(".")
        config[section][key] = value
    return config


if __name__ == "__main__":
    main()
