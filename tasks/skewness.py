"""Intervals for means of values without an upper bound, of which a small sample has rarely seen the tail.

A bootstrap draws from what was seen and so shares its blindness. Here the t statistic's skewness is removed by Hall's
monotone cubic transformation, T + k T^2 / 3 + k^2 T^3 / 27 + k / 6 with k = skewness / sqrt(n), which is t-distributed
to a better approximation. Source: Hall, Journal of the Royal Statistical Society B 54 (1992) 221-228; with t quantiles
Zhou and Gao, The American Statistician 54 (2000) 100-104. Skewness of few values is itself unsure, most of all of
differences, so the interval ends at either side where the wider of this one and of the plain t interval does.
studies/coverage.py measures both. Error and skewness are the jackknife's, of a mean those of the sample.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def skewed_ends(estimate: float, left_out: Floats, alone: Bools, alpha: float = 0.05) -> tuple[float, float]:
    """Return the ends of the interval of a metric; `left_out` (S,) is the metric without each of S >= 2 subjects.

    alone (S,): where the metric of a subject alone is defined. Other subjects count when the metric changes without
    them; else they have no value (an undefined HD95). Raises ValueError where fewer than two count or all are equal.
    """
    spread = np.nanmean(left_out) - np.where(np.isfinite(left_out), left_out, np.nanmean(left_out))
    n = int((alone | (np.abs(spread) > 1e-9 * np.abs(spread).max())).sum())
    if n < 2 or not spread.any():
        raise ValueError(f"an interval needs two subjects whose values differ, got {n} with values")
    square = float((spread**2).sum())
    error = math.sqrt((n - 1) / n * square)
    unbiased = n**2 / ((n - 1) * (n - 2)) if n > 2 else 0.0
    k = unbiased * float((spread**3).sum()) / square**1.5
    t = float(stats.t.ppf(1 - alpha / 2, n - 1))
    low, high = (error * max(t, abs(_back(sign * t, k))) for sign in (1, -1))
    return estimate - low, estimate + high


def _back(value: float, k: float) -> float:
    """Return the T that Hall's transformation turns into a value."""
    if abs(k) < 1e-8:
        return value
    return 3 / k * (float(np.cbrt(1 + k * (value - k / 6))) - 1)
