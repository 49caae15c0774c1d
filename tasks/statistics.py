"""How sure one can be: bootstrap intervals over subjects with seeds nested, paired tests, Holm's correction, ranks.

A bootstrap replicate draws subjects with replacement and is written as weights: W[b, s] counts how often subject s was
drawn. Every metric is a closed form in those weights, so a replicate costs a matrix product, and rows that are compared
share their draws. Seeds are nested in subjects: a replicate computes the metric of each seed and averages over seeds.

Legend: B replicates, S subjects, E seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from tasks.skewness import skewed_ends

Floats = npt.NDArray[np.float64]
MetricFunction = Callable[[Floats], Floats]
"""Weights (B, S) of the subjects -> the metric of each replicate (B,), seeds averaged; NaN where undefined."""

INTERVAL_METHOD = "95 % BCa bootstrap over subjects, widened for few of them, seeds averaged inside each replicate"
UNBOUNDED_METHOD = "t intervals with Hall's correction for skewness, at either end the wider of it and of the plain one"
"""Of means of values without an upper bound."""
P_METHOD = " (difference by its bootstrap error, t with n - 1 degrees of freedom, at least 2^(1 - n))"
"""What a sentence about p adds."""
RULES_VERSION = 2
"""Raised when a rule of intervals, tests or ranks changes, so that kept tables are written again."""
REPLICATES = 2000
UNDEFINED_SHARE_MAX = 0.05
LEVEL = 0.05
"""Of tests; intervals hold 1 - LEVEL."""


@dataclass(frozen=True)
class Interval:
    """A score with its interval. `low` and `high` are NaN when no honest interval exists; `note` says why."""

    estimate: float
    low: float
    high: float
    n: int
    """Subjects."""
    note: str = ""
    error: float = float("nan")
    """Standard error: the standard deviation of the replicates."""

    @property
    def standardised(self) -> float:
        """The estimate in standard deviations of one subject: of a mean paired difference, Cohen's d_z.

        estimate / (sqrt(n) * error). It says for any metric how large a difference is against what subjects vary.
        """
        return self.estimate / (np.sqrt(self.n) * self.error) if self.error > 0 else float("nan")


def draw_subjects(n_subjects: int, replicates: int = REPLICATES, seed: int = 0) -> Floats:
    """Return bootstrap weights (B, S): how often each subject is drawn in each replicate; rows sum to S."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_subjects, np.full(n_subjects, 1 / n_subjects), size=replicates).astype(np.float64)


def expanded_alpha(n: int, alpha: float = 0.05) -> float:
    """Return the nominal alpha that widens a bootstrap interval for small n.

    alpha' / 2 = Phi(-sqrt(n / (n - 1)) t_{n-1, 1 - alpha/2}). Source: Hesterberg, What Teachers Should Know About
    the Bootstrap, The American Statistician 69 (2015), section 3.2.
    """
    return float(2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(1 - alpha / 2, n - 1)))


def bca_tails(estimate: float, replicates: Floats, left_out: Floats, tail: float) -> tuple[float, float]:
    """Return the shares of the replicates at which a BCa interval ends, lower and upper.

    `replicates` (B,) are finite, `left_out` (S,) is the metric without each subject. Bias: where the estimate lies
    among the replicates, ties by half; acceleration: from the skewness of the values without one subject. Percentiles
    alone miss skewed scores, such as an AUROC near 1 (docs/metrics.md has the coverage of both). Source: Efron and
    Tibshirani, An Introduction to the Bootstrap (1993), section 14.3; `scipy.stats.bootstrap`, with which a test
    compares it, cannot share draws between rows.
    """
    below = float((replicates < estimate).mean() + 0.5 * (replicates == estimate).mean())
    bias = stats.norm.ppf(np.clip(below, 1 / (replicates.size + 1), replicates.size / (replicates.size + 1)))
    spread = np.nanmean(left_out) - left_out[np.isfinite(left_out)]
    scale = float((spread**2).sum())
    acceleration = float((spread**3).sum()) / (6 * scale**1.5) if scale > 0 else 0.0
    shifted = bias + np.array([stats.norm.ppf(tail), -stats.norm.ppf(tail)])
    low, high = stats.norm.cdf(bias + shifted / np.maximum(1 - acceleration * shifted, 1e-3))
    return float(low), float(high)


def bootstrap_interval(
    metric: MetricFunction,
    weights: Floats,
    alpha: float = 0.05,
    at_bounds: int = 0,
    replicates: Floats | None = None,
    unbounded: bool = False,
) -> Interval:
    """Return the estimate and the interval of a metric over subjects.

    Bias-corrected and accelerated bootstrap (`bca_tails`), with `expanded_alpha`; of a mean of values that are
    `unbounded`, such as distances, `tasks.skewness.skewed_ends` instead. studies/coverage.py measures how often both
    hold the truth.

    Rules: with one subject there is no interval. Replicates in which the metric is undefined (a class was not drawn)
    are left out; if they are more than 5 %, there is no interval. No spread at all would claim certainty: at exactly 0
    or 1 the exact binomial (Clopper-Pearson) bound for `at_bounds` subjects is given instead (conservative:
    pass the size of the smallest class); elsewhere, or with `at_bounds` 0, there is no interval. `replicates` (B,) is
    metric(weights), where the caller has it already.
    """
    n = weights.shape[1]
    estimate = estimate_of(metric, n)
    if not np.isfinite(estimate):
        return Interval(estimate, np.nan, np.nan, n, "undefined: a class or every value is absent from the test set")
    if n < 2:
        return Interval(estimate, np.nan, np.nan, n, "one test subject: no interval")
    replicates = metric(weights) if replicates is None else replicates
    finite = replicates[np.isfinite(replicates)]
    if finite.size < (1 - UNDEFINED_SHARE_MAX) * replicates.size:
        share = 100 * (1 - finite.size / replicates.size)
        return Interval(estimate, np.nan, np.nan, n, f"undefined in {share:.0f} % of the replicates: no interval")
    left_out = metric(np.ones((n, n)) - np.eye(n))
    if np.ptp(finite) < 1e-12 or (unbounded and np.ptp(left_out[np.isfinite(left_out)]) < 1e-12):
        return _without_spread(estimate, n, alpha, at_bounds)
    if unbounded:
        low, high = skewed_ends(estimate, left_out, np.isfinite(metric(np.eye(n))), alpha)
    else:
        low, high = np.quantile(finite, bca_tails(estimate, finite, left_out, expanded_alpha(n, alpha) / 2))
    return Interval(estimate, float(low), float(high), n, error=float(finite.std(ddof=1)))


def estimate_of(metric: MetricFunction, n: int) -> float:
    """Return a metric over all of n subjects, each counted once."""
    return float(metric(np.ones((1, n)))[0])


def _without_spread(estimate: float, n: int, alpha: float, at_bounds: int) -> Interval:
    reach = float((alpha / 2) ** (1 / at_bounds)) if at_bounds else np.nan
    note = f"exact binomial bound for {at_bounds} subjects, all replicates being equal"
    if at_bounds and abs(estimate - 1) < 1e-12:
        return Interval(estimate, reach, 1.0, n, note)
    if at_bounds and abs(estimate) < 1e-12:
        return Interval(estimate, 0.0, 1 - reach, n, note)
    return Interval(estimate, np.nan, np.nan, n, "no spread between subjects: no interval")


def paired_test(
    first: MetricFunction,
    second: MetricFunction,
    weights: Floats,
    replicates: Floats | None = None,
    unbounded: bool = False,
) -> tuple[Interval, float]:
    """Return the difference first - second with its interval (`bootstrap_interval`) and its two-sided paired p.

    Both metrics see the same draws; p is `paired_p` of the difference and its bootstrap standard error. p is NaN when
    the difference has no interval; two rows that are equal in every replicate have p = 1. `replicates` (B,) is
    first(weights) - second(weights), where the caller has it already.
    """

    def difference(w: Floats) -> Floats:
        return first(w) - second(w)

    replicates = difference(weights) if replicates is None else replicates
    interval = bootstrap_interval(difference, weights, replicates=replicates, unbounded=unbounded)
    replicates = replicates[np.isfinite(replicates)] if interval.n > 1 else np.array([])
    if replicates.size and np.allclose(replicates, 0) and interval.estimate == 0:
        return interval, 1.0
    if not np.isfinite(interval.low):
        return interval, float("nan")
    note = "; ".join(text for text in (interval.note, few_subjects(interval.n, bootstrap=not unbounded)) if text)
    return replace(interval, note=note), paired_p(interval.estimate, interval.error, interval.n)


def paired_p(difference: float, error: float, n: int) -> float:
    """Return the two-sided p of a paired difference of n >= 2 subjects with its bootstrap standard error.

    z = difference / error is turned into t = z sqrt((n - 1) / n) with n - 1 degrees of freedom: a bootstrap error
    divides by n and is that factor too small (Hesterberg 2015, as in `expanded_alpha`, whose intervals this p goes
    with). Of a mean it is the paired t-test. p is at least `smallest_p(n)`.
    """
    t = abs(difference) / error * np.sqrt((n - 1) / n)
    return float(max(2 * stats.t.sf(t, n - 1), smallest_p(n)))


def smallest_p(n: int) -> float:
    """Return 2^(1 - n), below which no two-sided p of n pairs can honestly be: that of the sign test.

    If two rows are alike, swapping them in any subject changes nothing, and the data are one of 2^n such exchanges.
    """
    return float(2.0 ** (1 - n))


def few_subjects(n: int, bootstrap: bool = True) -> str:
    """Return what n subjects, 2 or more, cannot show, where no p can reach LEVEL; otherwise nothing.

    bootstrap: whether the intervals are. A bootstrap interval of a mean ends within the values of the subjects: it
    misses the median of the distribution, and so the mean of a symmetric one, whenever all of them lie on one side of
    it, with probability 2^(1 - n).
    """
    if n < 2 or (least := smallest_p(n)) < LEVEL:
        return ""
    told = f"{n} subjects are too few: no p can be below {least:.2g}"
    if not bootstrap:
        return told
    return (
        f"{told}, and a 95 % bootstrap interval, which cannot reach beyond the subjects' own values, holds a mean in "
        f"at most {100 * (1 - least):.0f} %"
    )


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


@dataclass(frozen=True)
class Rank:
    """Where a row stands among those that it is compared with, 1 being the best; ties share the mean place."""

    place: float
    low: float
    high: float
    """95 % of the replicates lie from low to high."""
    first: float
    """Share of the replicates in which it is the best, ties shared."""


def rank_rows(metrics: Sequence[MetricFunction], weights: Floats) -> list[Rank]:
    """Return the rank of each row by a metric of which more is better, and how stable it is over drawn subjects.

    All rows see the same draws. Replicates in which a row is undefined are left out. Source: Wiesenfarth et al.,
    Scientific Reports 11 (2021) 2369 (challengeR): ranks of bootstrap samples of the test cases.
    """
    return ranks_of(places_of(metrics, weights))


def places_of(metrics: Sequence[MetricFunction], weights: Floats) -> Floats:
    """Return the places (1 + B, R) of rows: of all subjects, then in every replicate; NaN where one is undefined.

    One subject is drawn again and again and would seem to settle the order: all places are NaN.
    """
    values = np.stack([metric(np.vstack([np.ones((1, weights.shape[1])), weights])) for metric in metrics], axis=1)
    places = np.full(values.shape, np.nan)
    defined = np.isfinite(values).all(axis=1)
    if defined.any() and weights.shape[1] > 1:
        places[defined] = stats.rankdata(-values[defined], axis=1)
    return places


def ranks_of(places: Floats) -> list[Rank]:
    """Return the rank of each row from `places_of`, or from means of them over benchmarks."""
    defined = np.asarray(np.isfinite(places).all(axis=1))
    if not defined[0] or defined.sum() < 2:
        return [Rank(float("nan"), float("nan"), float("nan"), float("nan")) for _ in places.T]
    places = places[defined]
    best = places[1:] == places[1:].min(axis=1, keepdims=True)
    first = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    low, high = np.quantile(places[1:], [0.025, 0.975], axis=0)
    return [Rank(*(float(value) for value in one)) for one in zip(places[0], low, high, first, strict=True)]


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
