"""A short run of `benchmarks/coverage.py`: the intervals hold, and noise is not called gain.

The bounds are what a method that is right leaves in fewer than one of a thousand runs; the seed is
fixed. The whole of it, with 500 experiments each, is in `reports/coverage.md`.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_coverage", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_intervals_over_three_seeds_hold_the_truth(
    coverage: ModuleType, graded: bool, spread: float
) -> None:
    setting = coverage.Setting(graded=graded, seeds=3, spread=spread, items=100)
    found = coverage.coverage(setting, 200, np.random.default_rng(1))
    for name in ("mean", "gain", "gap"):
        assert found[name] >= 0.90, found
    if spread:  # what would be wrong to report
        assert found["gain, items only"] < 0.85


def test_candidates_that_differ_in_a_comment_are_not_called_better(coverage: ModuleType) -> None:
    setting = coverage.Setting(graded=False, seeds=3, spread=1.0, items=100)
    assert coverage.false_claims(setting, 60, np.random.default_rng(1)) <= 0.1
