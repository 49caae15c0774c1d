"""Classification scores as functions of how often each subject was drawn, so that a bootstrap is a matrix product.

Each form takes one seed's targets (N,) and probabilities (N, K) and returns a function of case weights (B, N). With the
weights of repeated cases they equal scikit-learn's scores of those cases (tests); ECE is that of Guo et al., ICML 2017.
The predicted class is the most probable one. Two classes: the last is the positive one. More: every class against the
rest, plain average over classes, except for Brier score and ECE.

Legend: B replicates, S subjects, N cases, K classes, E seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from tasks.statistics import Floats, MetricFunction

BINS = 10
"""Bins of equal width in which probabilities are compared with outcomes."""


def classification_metric(
    name: str, subject: npt.NDArray[np.int64], target: npt.NDArray[np.int64], probabilities: Floats
) -> MetricFunction:
    """Return a classification score as a function of subject weights, averaged over seeds.

    `subject` (N,) maps cases to 0..S-1, `target` (E, N) to 0..K-1, `probabilities` is (E, N, K). NaN where a class that
    the score needs is not drawn. Raises KeyError for an unknown name.
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


def _ratio(top: Floats, bottom: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return top / bottom


def _accuracy(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    right = (probabilities.argmax(axis=1) == target).astype(np.float64)
    return lambda w: (w @ right) / w.sum(axis=1)


def _balanced_accuracy(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    right = (probabilities.argmax(axis=1) == target).astype(np.float64)
    members = np.eye(probabilities.shape[1])[target]
    return lambda w: _ratio(w @ (members * right[:, None]), w @ members).mean(axis=1)


def _f1(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    classes = np.eye(probabilities.shape[1])
    true, predicted = classes[target], classes[probabilities.argmax(axis=1)]

    def metric(w: Floats) -> Floats:
        # 2 TP / (targets + predictions); a class neither present nor predicted counts 0, as scikit-learn's macro F1.
        both = w @ true + w @ predicted
        scores = np.divide(2 * (w @ (true * predicted)), both, out=np.zeros_like(both), where=both > 0)
        return np.asarray(scores.mean(axis=1))

    return metric


@dataclass(frozen=True)
class _OneAgainstRest:
    """One class as the positive one."""

    true: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.bool_]
    score: Floats


def _sides(target: npt.NDArray[np.int64], probabilities: Floats) -> Iterator[_OneAgainstRest]:
    n_classes = probabilities.shape[1]
    for k in [1] if n_classes == 2 else range(n_classes):
        yield _OneAgainstRest(target == k, probabilities.argmax(axis=1) == k, probabilities[:, k])


def _mean_over_sides(parts: list[MetricFunction]) -> MetricFunction:
    return lambda w: np.asarray(np.mean([part(w) for part in parts], axis=0))


def _recall(true: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_]) -> MetricFunction:
    hit, all_of_it = (true & predicted).astype(np.float64), true.astype(np.float64)
    return lambda w: _ratio(w @ hit, w @ all_of_it)


def _sensitivity(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    return _mean_over_sides([_recall(side.true, side.predicted) for side in _sides(target, probabilities)])


def _specificity(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    return _mean_over_sides([_recall(~side.true, ~side.predicted) for side in _sides(target, probabilities)])


def _auroc(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    return _mean_over_sides([_area(side) for side in _sides(target, probabilities)])


def _area(side: _OneAgainstRest) -> MetricFunction:
    inside, outside = np.flatnonzero(side.true), np.flatnonzero(~side.true)
    a, b = side.score[inside][:, None], side.score[outside][None, :]
    wins = (a > b) + 0.5 * (a == b)

    def metric(w: Floats) -> Floats:
        u, v = w[:, inside], w[:, outside]
        return _ratio(((u @ wins) * v).sum(axis=1), u.sum(axis=1) * v.sum(axis=1))

    return metric


def _auprc(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    return _mean_over_sides([_average_precision(side) for side in _sides(target, probabilities)])


def _average_precision(side: _OneAgainstRest) -> MetricFunction:
    order = np.argsort(-side.score, kind="stable")
    ordered = side.score[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each group of equal scores
    true = side.true[order].astype(np.float64)

    def metric(w: Floats) -> Floats:
        mine = w[:, order]
        hits, found = np.cumsum(mine * true, axis=1)[:, last], np.cumsum(mine, axis=1)[:, last]
        precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
        gained = np.diff(hits, axis=1, prepend=0.0)
        return _ratio((gained * precision).sum(axis=1), hits[:, -1])

    return metric


def _brier(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    gaps = (probabilities - np.eye(probabilities.shape[1])[target]) ** 2
    # Of two classes the square of one gap, as is the custom; of more the sum over all.
    loss = gaps[:, 1] if probabilities.shape[1] == 2 else gaps.sum(axis=1)
    return lambda w: (w @ loss) / w.sum(axis=1)


def _ece(target: npt.NDArray[np.int64], probabilities: Floats) -> MetricFunction:
    claimed, came_true = claims(target, probabilities)
    members = np.eye(BINS)[_bin_of(claimed)]
    gaps = members * (came_true - claimed)[:, None]
    return lambda w: np.abs(w @ gaps).sum(axis=1) / w.sum(axis=1)


def claims(target: npt.NDArray[np.int64], probabilities: Floats) -> tuple[Floats, Floats]:
    """Return what each case was given as probability (N,) and whether it came true (N,), 0 or 1.

    Two classes: of the positive class. More: of the most probable class.
    """
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], (target == 1).astype(np.float64)
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == target).astype(np.float64)


def _bin_of(claimed: Floats) -> npt.NDArray[np.int64]:
    return np.minimum((claimed * BINS).astype(np.int64), BINS - 1)


def reliability(target: npt.NDArray[np.int64], probabilities: Floats) -> pd.DataFrame:
    """Return the reliability curve of one seed, a line a bin that is not empty.

    Columns: low, high (of the bin), n, mean_probability, observed (share that came true), observed_low, observed_high
    (95 % Wilson interval, cases taken as independent).
    """
    from statsmodels.stats.proportion import proportion_confint

    claimed, came_true = claims(target, probabilities)
    place = _bin_of(claimed)
    lines = []
    for k in np.unique(place):
        mine = place == k
        n, hits = int(mine.sum()), int(came_true[mine].sum())
        low, high = proportion_confint(hits, n, method="wilson")
        mean = float(claimed[mine].mean())
        share = hits / n
        # Rounding leaves 1e-17 where the bound is 0.
        lines.append((k / BINS, (k + 1) / BINS, n, mean, share, min(float(low), share), max(float(high), share)))
    names = ["low", "high", "n", "mean_probability", "observed", "observed_low", "observed_high"]
    return pd.DataFrame(lines, columns=names)


CLASSIFICATION_FORMS: dict[str, Callable[[npt.NDArray[np.int64], Floats], MetricFunction]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "auroc": _auroc,
    "f1": _f1,
    "auprc": _auprc,
    "sensitivity": _sensitivity,
    "specificity": _specificity,
    "brier": _brier,
    "ece": _ece,
}
