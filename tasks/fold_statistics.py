"""How sure a cross-validated score is: the corrected resampled t-test over folds.

Folds share training cases, so their scores are not independent and a plain t-test claims too much. Nadeau and Bengio
(Machine Learning 52, 2003, 239-281) widen the variance of the mean of K scores from s^2 / K to
s^2 (1 / K + n_test / n_train). Seeds are nested in folds: they are averaged before anything else.

Legend: K folds, E seeds.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from tasks.statistics import Interval

Floats = npt.NDArray[np.float64]

INTERVAL_METHOD = "95 % t interval of the mean over folds, Nadeau-Bengio corrected, seeds averaged in each fold"


def corrected_error(values: Floats, test_share: float) -> float:
    """Return the standard error of the mean of fold scores (K,); `test_share` is n_test / n_train of a fold."""
    return float(np.std(values, ddof=1) * math.sqrt(1 / len(values) + test_share))


def fold_interval(values: Floats, test_share: float, n: int, alpha: float = 0.05) -> Interval:
    """Return the mean of fold scores (E, K) with its interval; no interval where a fold has no score or nothing varies.

    `n` is the number of subjects, only carried along.
    """
    folds = values.mean(axis=0)
    estimate = float(folds.mean())
    if not np.isfinite(folds).all():
        count = int((~np.isfinite(folds)).sum())
        return Interval(math.nan, math.nan, math.nan, n, f"undefined in {count} of {len(folds)} folds")
    if len(folds) < 2:
        return Interval(estimate, math.nan, math.nan, n, "one fold: no interval")
    if np.ptp(folds) < 1e-12:
        return Interval(estimate, math.nan, math.nan, n, "no spread between folds: no interval")
    reach = float(stats.t.ppf(1 - alpha / 2, len(folds) - 1)) * corrected_error(folds, test_share)
    return Interval(estimate, estimate - reach, estimate + reach, n)


def fold_test(first: Floats, second: Floats, test_share: float, n: int) -> tuple[Interval, float]:
    """Return the difference first - second of fold scores (E, K) with its interval and its two-sided p.

    Both were scored on the same folds; their numbers of seeds may differ. Rows that are equal in every fold have p = 1;
    p is NaN when the difference has no interval otherwise.
    """
    difference = first.mean(axis=0) - second.mean(axis=0)
    interval = fold_interval(difference[None], test_share, n)
    if np.isfinite(difference).all() and np.abs(difference).max() < 1e-12:
        return interval, 1.0
    if not math.isfinite(interval.low):
        return interval, math.nan
    t = interval.estimate / corrected_error(difference, test_share)
    return interval, float(2 * stats.t.sf(abs(t), len(difference) - 1))
