"""How sure one can be: bootstrap intervals over subjects with seeds nested, paired tests, Holm's correction.

A bootstrap replicate draws subjects with replacement and is written as weights: W[b, s] counts how often subject s was
drawn. Every metric is a closed form in those weights, so a replicate costs a matrix product, and rows that are compared
share their draws. Seeds are nested in subjects: a replicate computes the metric of each seed and averages over seeds.

Legend: B replicates, S subjects, N cases, K classes, E seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
MetricFunction = Callable[[Floats], Floats]
"""Weights (B, S) of the subjects -> the metric of each replicate (B,), seeds averaged; NaN where undefined."""

INTERVAL_METHOD = "95 % expanded percentile bootstrap over subjects, seeds averaged inside each replicate"
REPLICATES = 2000
UNDEFINED_SHARE_MAX = 0.05


@dataclass(frozen=True)
class Interval:
    """A score with its interval. `low` and `high` are NaN when no honest interval exists; `note` says why."""

    estimate: float
    low: float
    high: float
    n: int
    """Subjects."""
    note: str = ""


def draw_subjects(n_subjects: int, replicates: int = REPLICATES, seed: int = 0) -> Floats:
    """Return bootstrap weights (B, S): how often each subject is drawn in each replicate; rows sum to S."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_subjects, np.full(n_subjects, 1 / n_subjects), size=replicates).astype(np.float64)


def expanded_alpha(n: int, alpha: float = 0.05) -> float:
    """Return the nominal alpha that widens a percentile interval for small n.

    alpha' / 2 = Phi(-sqrt(n / (n - 1)) t_{n-1, 1 - alpha/2}). Source: Hesterberg, What Teachers Should Know About
    the Bootstrap, The American Statistician 69 (2015), section 3.2.
    """
    return float(2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(1 - alpha / 2, n - 1)))


def bootstrap_interval(metric: MetricFunction, weights: Floats, alpha: float = 0.05, at_bounds: int = 0) -> Interval:
    """Return the estimate and the bootstrap interval of a metric over subjects.

    Rules: with one subject there is no interval. Replicates in which the metric is undefined (a class was not drawn)
    are left out; if they are more than 5 %, there is no interval. No spread at all would claim certainty: at exactly
    0 or 1 the exact binomial (Clopper-Pearson) bound for `at_bounds` subjects is given instead (conservative: pass the
    size of the smallest class); elsewhere, or with `at_bounds` 0, there is no interval.
    """
    n = weights.shape[1]
    estimate = float(metric(np.ones((1, n)))[0])
    if not np.isfinite(estimate):
        return Interval(estimate, np.nan, np.nan, n, "undefined: a class or every value is absent from the test set")
    if n < 2:
        return Interval(estimate, np.nan, np.nan, n, "one test subject: no interval")
    replicates = metric(weights)
    finite = replicates[np.isfinite(replicates)]
    if finite.size < (1 - UNDEFINED_SHARE_MAX) * replicates.size:
        share = 100 * (1 - finite.size / replicates.size)
        return Interval(estimate, np.nan, np.nan, n, f"undefined in {share:.0f} % of the replicates: no interval")
    tail = expanded_alpha(n, alpha) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    if high - low < 1e-12:
        return _without_spread(estimate, n, alpha, at_bounds)
    return Interval(estimate, float(low), float(high), n)


def _without_spread(estimate: float, n: int, alpha: float, at_bounds: int) -> Interval:
    reach = float((alpha / 2) ** (1 / at_bounds)) if at_bounds else np.nan
    note = f"exact binomial bound for {at_bounds} subjects, all replicates being equal"
    if at_bounds and abs(estimate - 1) < 1e-12:
        return Interval(estimate, reach, 1.0, n, note)
    if at_bounds and abs(estimate) < 1e-12:
        return Interval(estimate, 0.0, 1 - reach, n, note)
    return Interval(estimate, np.nan, np.nan, n, "no spread between subjects: no interval")


def paired_test(first: MetricFunction, second: MetricFunction, weights: Floats) -> tuple[Interval, float]:
    """Return the difference first - second with its interval and its two-sided paired bootstrap p.

    Both metrics see the same draws. p = (1 + #{|d* - d| >= |d|}) / (B + 1): the bootstrap distribution is shifted to
    the null hypothesis. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 16. p is NaN
    when the difference has no interval; two rows that are equal in every replicate have p = 1.
    """

    def difference(w: Floats) -> Floats:
        return first(w) - second(w)

    interval = bootstrap_interval(difference, weights)
    replicates = difference(weights) if weights.shape[1] > 1 else np.array([np.nan])
    replicates = replicates[np.isfinite(replicates)]
    if replicates.size and np.allclose(replicates, 0) and interval.estimate == 0:
        return interval, 1.0
    if not np.isfinite(interval.low):
        return interval, float("nan")
    extreme = np.abs(replicates - interval.estimate) >= abs(interval.estimate) - 1e-12
    return interval, float((1 + extreme.sum()) / (1 + replicates.size))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values in the given order; NaN stays NaN and is not counted among the tests.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    from statsmodels.stats.multitest import multipletests

    p = np.array(p_values, dtype=np.float64)  # a copy: statsmodels may work in place
    tested = np.isfinite(p)
    if tested.any():
        p[tested] = multipletests(p[tested], method="holm")[1]
    return [float(value) for value in p]


def one_subject_points(n: int) -> float:
    """Return how many percentage points one subject is worth in a mean over n subjects."""
    if n < 1:
        raise ValueError(f"a test set needs at least one subject, got {n}")
    return 100 / n


def mean_metric(values: Floats) -> MetricFunction:
    """Return the mean over subjects of values (E, S); NaN marks a subject without a value (undefined HD95).

    Averaged per seed over its defined subjects, then over seeds. NaN where no drawn subject has a value.
    """
    defined = np.isfinite(values)
    filled = np.where(defined, values, 0.0)

    def metric(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            per_seed = (weights @ filled.T) / (weights @ defined.T.astype(np.float64))
        return np.asarray(per_seed.mean(axis=1))

    return metric


def classification_metric(
    name: str, subject: npt.NDArray[np.int64], target: npt.NDArray[np.int64], probabilities: Floats
) -> MetricFunction:
    """Return a classification metric as a function of subject weights.

    `subject` (N,) maps cases to 0..S-1, `target` (E, N) to 0..K-1, `probabilities` is (E, N, K). The weighted forms
    equal scikit-learn's on the repeated cases. Raises KeyError for an unknown metric.
    """
    try:
        form = CLASSIFICATION_FORMS[name]
    except KeyError:
        raise KeyError(f"unknown classification metric {name!r}; known: {', '.join(CLASSIFICATION_FORMS)}") from None
    forms = [form(own, seed) for own, seed in zip(target, probabilities, strict=True)]

    def metric(weights: Floats) -> Floats:
        cases = weights[:, subject]
        return np.asarray(np.mean([one(cases) for one in forms], axis=0))

    return metric


def _accuracy(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    right = (probabilities.argmax(axis=1) == target).astype(np.float64)
    return lambda w: (w @ right) / w.sum(axis=1)


def _balanced_accuracy(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    right = (probabilities.argmax(axis=1) == target).astype(np.float64)
    members = np.eye(probabilities.shape[1])[target]

    def metric(w: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(((w @ (members * right[:, None])) / (w @ members)).mean(axis=1))

    return metric


def _f1(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    classes = np.eye(probabilities.shape[1])
    true, predicted = classes[target], classes[probabilities.argmax(axis=1)]

    def metric(w: Floats) -> Floats:
        # 2 TP / (targets + predictions); a class neither present nor predicted counts 0, as scikit-learn's macro F1.
        both = w @ true + w @ predicted
        scores = np.divide(2 * (w @ (true * predicted)), both, out=np.zeros_like(both), where=both > 0)
        return np.asarray(scores.mean(axis=1))

    return metric


def _auroc(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    n_classes = probabilities.shape[1]
    # Two classes: the last is the positive one; more: one against the rest, macro average.
    positives = [1] if n_classes == 2 else list(range(n_classes))
    parts = []
    for k in positives:
        inside, outside = np.flatnonzero(target == k), np.flatnonzero(target != k)
        a, b = probabilities[inside, k][:, None], probabilities[outside, k][None, :]
        parts.append((inside, outside, (a > b) + 0.5 * (a == b)))

    def metric(w: Floats) -> Floats:
        scores = []
        for inside, outside, wins in parts:
            u, v = w[:, inside], w[:, outside]
            with np.errstate(invalid="ignore", divide="ignore"):
                scores.append(((u @ wins) * v).sum(axis=1) / (u.sum(axis=1) * v.sum(axis=1)))
        return np.asarray(np.mean(scores, axis=0))

    return metric


CLASSIFICATION_FORMS: dict[str, Callable[[npt.NDArray[np.int64], Floats], MetricFunction]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "auroc": _auroc,
    "f1": _f1,
}
