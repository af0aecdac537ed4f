"""From smoothed proportions to a denoised matrix. C cells, G genes."""

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln
from smooth import Matrix

HELD_TO_TRAIN = 1 / 9  # the held-out molecules are a tenth of all
DEPTH = 1e4  # the metric scales every cell to it before its logarithm
GRID = 300  # rates at which the expected logarithm is computed
RATES = (1e-4, 100.0)  # beyond them it is linear, or the logarithm itself
COUNTS = 250


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What is done to the proportions before every cell gets its total back."""

    mean_weight: float  # share of the average cell mixed in
    expected_log: bool  # aim at the mean of the metric's logarithm, not at the mean count
    power: float  # of the proportions: above 1, small values shrink


def finish(proportions: Matrix, totals: Matrix, settings: Finish) -> Matrix:
    """Denoised counts, shape (C, G), each row with its total.

    Args:
        proportions: Smoothed, not negative, rows add up to 1.
        totals: Train molecules of each cell, shape (C, 1).
        settings: See `Finish`.
    """
    average = (proportions * totals).sum(0) / totals.sum()
    values = (1 - settings.mean_weight) * proportions + settings.mean_weight * average
    if settings.expected_log:
        values = np.expm1(expected_log(values, totals * HELD_TO_TRAIN))
    values = values / values.max(1, keepdims=True)
    return rescaled(values**settings.power, totals)


def expected_log(proportions: Matrix, depth: Matrix) -> Matrix:
    """Mean of log1p(10,000 count / depth) for Poisson counts of rate depth x proportion.

    With 0.01 molecules of a gene expected in a cell, the logarithm is 0 in 99 of 100 draws and
    near 3 in the other: its mean is far below the logarithm of the mean.
    """
    rates = np.geomspace(*RATES, GRID)
    k = np.arange(COUNTS)
    chance = np.exp(k * np.log(rates)[:, None] - rates[:, None] - gammaln(k + 1))  # (rate, count)
    unit = DEPTH / depth.ravel()
    table = chance @ np.log1p(k[:, None] * unit)  # (rate, C)
    result = np.empty_like(proportions)
    for cell, rate in enumerate(proportions * depth):
        inside = np.interp(np.log(np.maximum(rate, RATES[0])), np.log(rates), table[:, cell])
        small = table[0, cell] * rate / RATES[0]
        large = np.log1p(unit[cell] * rate)
        result[cell] = np.where(rate < RATES[0], small, np.where(rate > RATES[1], large, inside))
    return result


def rescaled(values: Matrix, totals: Matrix) -> Matrix:
    """Rows multiplied so that they add up to `totals`."""
    sums = values.sum(1, keepdims=True)
    return values * (totals / np.where(sums == 0, 1.0, sums))
