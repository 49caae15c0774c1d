"""How often the 95 % intervals of the tables hold the truth, and how often their tests find what is not there.

    python -m studies.coverage

Prints two tables of docs/metrics.md; some twenty minutes on one core. All constants below were set before the run.

Intervals, on simulated test sets of the papers' sizes: each trial draws subjects and three trainings (the seeds) from a
known distribution, gives the scores to `bootstrap_interval` as a table does, and looks whether the interval holds what
the same three trainings score on infinitely many subjects: tables hold the seeds fixed. Asked is 93 to 97 %. The plain
percentile interval of the same replicates stands beside it.

Tests, on smaller test sets too: each trial draws two rows that are equally good, and looks whether p of `paired_test`
is below 0.05; asked is at most 6 %. The share of replicates at least as far from the difference as 0 is, the plain
bootstrap p, stands beside it.

Cross-validated scores have a study of their own: studies/coverage_folds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
from scipy import stats

from tasks.metrics_weighted import classification_metric
from tasks.statistics import (
    LEVEL,
    Floats,
    MetricFunction,
    bootstrap_interval,
    draw_subjects,
    estimate_of,
    mean_metric,
    paired_test,
)

SIZES = (57, 154, 238)
"""Test sets of BraTS2018, ADHD-200 and ADNI."""
DISTANCE_SIZES = (20, *SIZES)
"""Of distances, whose tails few subjects hide."""
SEEDS = 3
TRIALS = 2500
REPLICATES = 1000
POOL = 16
"""Sets of draws, used in turn: they do not depend on the scores."""
ASKED = (0.93, 0.97)
LEVEL_ASKED = 0.06
"""Share of equally good rows that a test at 5 % may call different: 5 %, and what 2,500 trials vary."""
MEAN_SIZES = (2, 3, 4, 5, 6, 7, 10, 20, 40)
AUROC_SIZES = (12, 20, 40, 60)

Rng = np.random.Generator
Trial = tuple[MetricFunction, float]
"""A metric of one simulated test set, and its truth."""


def dice_like(rng: Rng, n: int) -> Trial:
    """Return the mean of skewed scores: nine subjects of ten around 0.8, one of ten missed; seeds a bit apart."""
    return mean_metric(_dice_values(rng, n, shift := rng.normal(0, 0.02, (SEEDS, 1)))), DICE_MEAN + float(shift.mean())


DICE_MEAN = 0.9 * 8 / 10 + 0.1 * 1 / 7


def _dice_values(rng: Rng, n: int, shift: Floats) -> Floats:
    _, subject = _lesions(rng, n)
    return np.asarray(subject + shift + rng.normal(0, 0.05, (SEEDS, n)))


def _lesions(rng: Rng, n: int) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Return which lesions are missed (n,), and the Dice of each (n,)."""
    missed = rng.random(n) < 0.1
    return missed, np.where(missed, rng.beta(1, 6, n), rng.beta(8, 2, n))


def dice_difference(rng: Rng, n: int) -> Trial:
    """Return the difference of two rows on the same subjects: one is 0.02 better where the lesion is not missed."""
    missed, subject = _lesions(rng, n)
    base = subject + rng.normal(0, 0.05, (SEEDS, n))
    better = subject + np.where(missed, 0, 0.02) + rng.normal(0, 0.05, (SEEDS, n))
    first, second = mean_metric(better), mean_metric(base)
    return (lambda w: first(w) - second(w)), 0.9 * 0.02


def hd95_like(sigma: float) -> Callable[[Rng, int], Trial]:
    """Return trials of the mean of distances with a heavy tail: log-normal, median 4 mm, of sigma 1 mean 6.6 mm."""

    def trial(rng: Rng, n: int) -> Trial:
        subject = rng.lognormal(np.log(4), sigma, n)
        return mean_metric(_seen_by_seeds(rng, subject)), 4 * float(np.exp(sigma**2 / 2))

    return trial


def _seen_by_seeds(rng: Rng, subject: Floats) -> Floats:
    return np.asarray(subject + rng.normal(0, 0.5, (SEEDS, subject.size)))


def gamma_like(rng: Rng, n: int) -> Trial:
    """Return the mean of values with many near 0, such as volume errors: gamma of shape 0.7, mean 5.6."""
    return mean_metric(_seen_by_seeds(rng, rng.gamma(0.7, 8, n))), 0.7 * 8


def missed_like(rng: Rng, n: int) -> Trial:
    """Return the mean of distances of which a tenth, the missed lesions, are ten times as far: 40 and 3.4 mm."""
    subject = np.where(rng.random(n) < 0.1, rng.gamma(4, 10, n), rng.lognormal(np.log(3), 0.5, n))
    return mean_metric(_seen_by_seeds(rng, subject)), 0.1 * 40 + 0.9 * 3 * float(np.exp(0.125))


def distance_difference(longer: float) -> Callable[[Rng, int], Trial]:
    """Return trials of the difference of two rows on the same subjects, log-normal distances of which the second's
    median is `longer` times the first's."""

    def trial(rng: Rng, n: int) -> Trial:
        first = rng.lognormal(np.log(4), 1, n)
        second = first * rng.lognormal(np.log(longer), 0.3, n)
        one, other = (mean_metric(_seen_by_seeds(rng, values)) for values in (second, first))
        return (lambda w: one(w) - other(w)), 4 * float(np.exp(0.5)) * (longer * float(np.exp(0.045)) - 1)

    return trial


def auroc_like(distance: float, positive: float) -> Callable[[Rng, int], Trial]:
    """Return trials of an AUROC: normal scores of two classes `distance` apart, a share of positives.

    The seeds differ in the noise that each adds to what it sees of a subject, so each has an AUROC of its own.
    """

    def trial(rng: Rng, n: int) -> Trial:
        target = (np.arange(n) < round(positive * n)).astype(np.int64)
        noise = rng.uniform(0.3, 0.7, (SEEDS, 1))
        metric = _auroc(rng, rng.normal(size=n) + distance * target, noise, target)
        return metric, float(stats.norm.cdf(distance / np.sqrt(2 * (1 + noise**2))).mean())

    return trial


def _auroc(rng: Rng, seen: Floats, noise: Floats, target: npt.NDArray[np.int64]) -> MetricFunction:
    """Return the AUROC of trainings that see `seen` (n,) with noise (SEEDS, 1) of their own."""
    probability = stats.norm.cdf(seen + noise * rng.normal(size=(SEEDS, target.size)))
    both = np.stack([1 - probability, probability], axis=-1)
    return classification_metric("auroc", np.arange(target.size), np.tile(target, (SEEDS, 1)), both)


def balanced_accuracy_like(rng: Rng, n: int) -> Trial:
    """Return trials of a balanced accuracy: normal scores 1.5 apart, cut half way, a third positive; seeds as above."""
    distance, target = 1.5, (np.arange(n) < round(n / 3)).astype(np.int64)
    noise = rng.uniform(0.3, 0.7, (SEEDS, 1))
    seen = rng.normal(size=n) + distance * (target - 0.5)
    probability = stats.norm.cdf(seen + noise * rng.normal(size=(SEEDS, n)))
    both = np.stack([1 - probability, probability], axis=-1)
    metric = classification_metric("balanced_accuracy", np.arange(n), np.tile(target, (SEEDS, 1)), both)
    return metric, float(stats.norm.cdf(distance / 2 / np.sqrt(1 + noise**2)).mean())


def nsd_like(rng: Rng, n: int) -> Trial:
    """Return the mean of shares near 1: nine subjects of ten around 0.9, one of ten missed, around 0.25."""
    subject = np.where(rng.random(n) < 0.1, rng.beta(1, 3, n), rng.beta(9, 1, n))
    return mean_metric(subject + rng.normal(0, 0.02, (SEEDS, n))), 0.9 * 9 / 10 + 0.1 * 1 / 4


@dataclass(frozen=True)
class Kind:
    """One kind of simulated score of a fixed test set."""

    name: str
    trial: Callable[[Rng, int], Trial]
    asked: bool = True
    """Whether a test demands 93 to 97 %."""
    unbounded: bool = False
    """Whether its values have no upper bound, as `bootstrap_interval` is told."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Subjects of its test sets."""
        return DISTANCE_SIZES if self.unbounded else SIZES


KINDS: tuple[Kind, ...] = (
    Kind("Dice, a tenth of the lesions missed", dice_like),
    Kind("AUROC about 0.68, half positive", auroc_like(0.75, 1 / 2)),
    Kind("AUROC about 0.83, a third positive", auroc_like(1.5, 1 / 3)),
    Kind("AUROC about 0.94, a third positive", auroc_like(2.5, 1 / 3)),
    Kind("difference of two Dice rows", dice_difference),
    Kind("HD95, log-normal, sigma 1", hd95_like(1.0), unbounded=True),
    Kind("balanced accuracy about 0.75, a third positive", balanced_accuracy_like),
    Kind("NSD, a tenth of the lesions missed", nsd_like),
    Kind("HD95, log-normal, sigma 0.8", hd95_like(0.8), unbounded=True),
    Kind("volume error, gamma of shape 0.7", gamma_like, unbounded=True),
    Kind("HD95, a tenth of the lesions missed", missed_like, asked=False, unbounded=True),
    Kind("difference of two HD95 rows, medians equal", distance_difference(1.0), asked=False, unbounded=True),
    Kind("difference of two HD95 rows, one a fifth longer", distance_difference(1.2), asked=False, unbounded=True),
)


@dataclass(frozen=True)
class Shares:
    """Shares of the trials in which the truth was inside, below and above the interval."""

    inside: float
    below: float
    above: float

    @property
    def met(self) -> bool:
        """Say whether it is what was asked."""
        return ASKED[0] <= self.inside <= ASKED[1]


@dataclass(frozen=True)
class Coverage(Shares):
    """Of the bootstrap's intervals."""

    percentile: float
    """Share inside the plain percentile interval of the same replicates."""


def cover(kind: Kind, n: int, trials: int = TRIALS, replicates: int = REPLICATES, seed: int = 20261122) -> Coverage:
    """Return how often the intervals of `trials` simulated test sets of n subjects hold the truth."""
    rng = np.random.default_rng([seed, n, KINDS.index(kind)])
    pool = [draw_subjects(n, replicates, k) for k in range(min(POOL, trials))]
    below = above = plain = 0
    for number in range(trials):
        metric, truth = kind.trial(rng, n)
        weights = pool[number % len(pool)]
        drawn = metric(weights)
        interval = bootstrap_interval(metric, weights, replicates=drawn, unbounded=kind.unbounded)
        below += truth < interval.low
        above += truth > interval.high
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        plain += low <= truth <= high
    return Coverage(1 - (below + above) / trials, below / trials, above / trials, plain / trials)


Rows = tuple[MetricFunction, MetricFunction]


def equal_means(rng: Rng, n: int) -> Rows:
    """Return two rows whose scores differ by normal noise alone."""
    subject = rng.normal(0, 0.2, n)
    first, second = subject + rng.normal(0, 0.1, (2, SEEDS, n))
    return mean_metric(first), mean_metric(second)


def equal_dice(rng: Rng, n: int) -> Rows:
    """Return two rows that miss a tenth of the lesions, each another one: differences with heavy tails."""
    first, second = (_lesions(rng, n)[1] + rng.normal(0, 0.05, (SEEDS, n)) for _ in range(2))
    return mean_metric(first), mean_metric(second)


def equal_aurocs(distance: float, positive: float) -> Callable[[Rng, int], Rows]:
    """Return pairs of rows with the AUROC of `auroc_like`: the same subjects and amounts of noise, drawn twice."""

    def rows(rng: Rng, n: int) -> Rows:
        target = (np.arange(n) < round(positive * n)).astype(np.int64)
        seen, noise = rng.normal(size=n) + distance * target, rng.uniform(0.3, 0.7, (SEEDS, 1))
        return _auroc(rng, seen, noise, target), _auroc(rng, seen, noise, target)

    return rows


@dataclass(frozen=True)
class Null:
    """Two rows of which none is better."""

    name: str
    rows: Callable[[Rng, int], Rows]
    sizes: tuple[int, ...]


NULLS: tuple[Null, ...] = (
    Null("mean, normal differences", equal_means, MEAN_SIZES),
    Null("Dice, each row misses a tenth by itself", equal_dice, MEAN_SIZES),
    Null("AUROC about 0.68, half positive", equal_aurocs(0.75, 1 / 2), AUROC_SIZES),
    Null("AUROC about 0.83, a third positive", equal_aurocs(1.5, 1 / 3), AUROC_SIZES),
    Null("AUROC about 0.94, a third positive", equal_aurocs(2.5, 1 / 3), AUROC_SIZES),
)


@dataclass(frozen=True)
class Found:
    """Shares of the trials in which equal rows are called different at 5 %."""

    share: float
    plain: float
    """With the plain bootstrap p of the same replicates."""

    @property
    def met(self) -> bool:
        """Say whether it is what was asked."""
        return self.share <= LEVEL_ASKED


def level(null: Null, n: int, trials: int = TRIALS, replicates: int = REPLICATES, seed: int = 20261122) -> Found:
    """Return how often `trials` simulated test sets of n subjects find a difference where there is none."""
    rng = np.random.default_rng([seed, n, NULLS.index(null)])
    pool = [draw_subjects(n, replicates, k) for k in range(min(POOL, trials))]
    share = plain = 0
    for number in range(trials):
        first, second = null.rows(rng, n)
        weights = pool[number % len(pool)]
        drawn = first(weights) - second(weights)
        gap = estimate_of(first, n) - estimate_of(second, n)
        share += paired_test(first, second, weights, drawn)[1] < LEVEL
        finite = drawn[np.isfinite(drawn)]
        plain += (1 + (np.abs(finite - gap) >= abs(gap)).sum()) / (1 + finite.size) < LEVEL
    return Found(share / trials, plain / trials)


def level_table(trials: int = TRIALS, replicates: int = REPLICATES) -> list[str]:
    """Return the lines of a Markdown table, one a kind of rows and size; asked is LEVEL_ASKED at most."""
    lines = ["| rows that are equally good | n | found at 5 % | asked | plain bootstrap p |", "|---|---|---|---|---|"]
    for null in NULLS:
        for n in null.sizes:
            found = level(null, n, trials, replicates)
            asked = "met" if found.met else "**not met**"
            lines.append(f"| {null.name} | {n} | {100 * found.share:.1f} % | {asked} | {100 * found.plain:.1f} % |")
    return lines


def table(kinds: Sequence[Kind] = KINDS, trials: int = TRIALS, replicates: int = REPLICATES) -> Iterator[str]:
    """Yield the lines of a Markdown table, one a kind and size; asked are 93 to 97 %."""
    yield "| score | n | inside | truth below, above | asked | plain percentiles |"
    yield "|---|---|---|---|---|---|"
    for kind in kinds:
        for n in kind.sizes:
            found = cover(kind, n, trials, replicates)
            asked = "met" if found.met else "**not met**"
            yield (
                f"| {kind.name} | {n} | {100 * found.inside:.1f} % | {100 * found.below:.1f} %, "
                f"{100 * found.above:.1f} % | {asked} | {100 * found.percentile:.1f} % |"
            )


def main() -> None:
    """Print both tables."""
    print(f"{TRIALS} trials each, {REPLICATES} replicates, {SEEDS} seeds; standard error of a share 0.4 points\n")
    for line in chain(table(), [""], level_table()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
