"""Probes of frozen features, cross-validated over given folds: logistic regression and ridge, or k nearest neighbours.

Features are standardised, and missing ones filled with the median, on the training folds only; the strength of the
penalty is chosen by an inner cross-validation of the training folds. Source of the grid: the evaluation code that
AnatCL's authors released with its parent method (C and alpha 10^-2 .. 10^2, five inner folds). It stops saga at 150
iterations; here lbfgs runs until it has converged, which is the optimum of the same loss.

Shapes: N cases (one a subject), C features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

GRID: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of C (logistic) and alpha (ridge)."""
INNER_FOLDS = 5
ITERATIONS = 1000
SEED = 0
"""Of the inner folds."""
NEIGHBOURS: tuple[int, ...] = (1, 3, 5, 10, 20, 50)
"""Of k-NN; those that an inner training fold has."""
Model = Literal["linear", "k-NN"]
"""linear: logistic regression or ridge. k-NN: the nearest training cases, weighted by 1 / distance."""
Prepare = Callable[[Floats, Ints], Floats]
"""Features (N, C) and the indices of the training cases -> features of all cases, by what was fitted on those alone."""


class ProbeError(ValueError):
    """Features or targets that cannot be probed, and why."""


def check_targets(fold_N: Ints, target_N: npt.NDArray[Any], classes: Sequence[str], who: str) -> None:
    """Refuse a class that is absent from a fold, or a regression target that is not finite or does not vary.

    `target_N` holds class indices, or numbers when there are no classes. Raises ProbeError with the counts.
    """
    if not classes:
        _check_numbers(target_N.astype(np.float64), who)
        return
    folds = range(int(fold_N.max()) + 1)
    for index, name in enumerate(classes):
        count = int((target_N == index).sum())
        if absent := [fold for fold in folds if not ((target_N == index) & (fold_N == fold)).any()]:
            raise ProbeError(
                f"{who}: class {name!r} ({count} subjects) is absent from fold {absent[0]} of {len(folds)}; every fold "
                "needs every class: ask for fewer folds, or leave the benchmark out"
            )
        if count < 3:
            raise ProbeError(f"{who}: class {name!r} has {count} subjects; the inner cross-validation needs three")


def _check_numbers(target_N: Floats, who: str) -> None:
    if not np.isfinite(target_N).all():
        count = int((~np.isfinite(target_N)).sum())
        raise ProbeError(f"{who}: {count} of {len(target_N)} targets are not finite numbers; leave those cases out")
    if np.ptp(target_N) == 0:
        raise ProbeError(f"{who}: the target is {target_N[0]:g} for all {len(target_N)} subjects; nothing to predict")


def held_out(fold_N: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield the indices of training and test cases of every fold in order."""
    for fold in range(int(fold_N.max()) + 1):
        yield np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)


def unchanged(features_NC: Floats, train: Ints) -> Floats:
    """Return the features as they are: the probe's own standardisation is all that is fitted."""
    return features_NC


def probe_classes(
    features_NC: Floats,
    target_N: Ints,
    fold_N: Ints,
    classes: int,
    who: str,
    model: Model = "linear",
    prepare: Prepare = unchanged,
) -> Floats:
    """Return the probabilities (N, K) of every case by the model of the folds that it is not in.

    C, or k, is the one with the best balanced accuracy of the inner folds. `prepare` is fitted on the same folds as the
    model. Raises ProbeError where a training feature is infinite, or all are missing.
    """
    probabilities = np.full((len(target_N), classes), np.nan)
    for train, test in held_out(fold_N):
        prepared = prepare(features_NC, train)
        fitted = _fitted(_class_search(target_N[train], model), prepared[train], target_N[train], who)
        probabilities[test] = fitted.predict_proba(prepared[test])
    return probabilities


def probe_numbers(
    features_NC: Floats,
    target_N: Floats,
    fold_N: Ints,
    who: str,
    model: Model = "linear",
    prepare: Prepare = unchanged,
) -> Floats:
    """Return the prediction (N,) of every case by the model of the folds that it is not in.

    alpha, or k, is the one with the best R2 of the inner folds. `prepare` and errors are as for `probe_classes`.
    """
    predictions = np.full(len(target_N), np.nan)
    for train, test in held_out(fold_N):
        prepared = prepare(features_NC, train)
        fitted = _fitted(_number_search(len(train), model), prepared[train], target_N[train], who)
        predictions[test] = fitted.predict(prepared[test])
    return predictions


def _fitted(model: Any, features_NC: Floats, target_N: npt.NDArray[Any], who: str) -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if np.isinf(features_NC).any():
        raise ProbeError(f"{who}: {int(np.isinf(features_NC).sum())} features are infinite; the encoder has diverged")
    if not np.isfinite(features_NC).any():
        raise ProbeError(f"{who}: every feature of the training folds is missing")
    # A feature that is missing for all training cases is left out (SimpleImputer's default).
    pipeline = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), model)
    with threadpool_limits(1):  # on matrices this small more threads only wait for each other
        return pipeline.fit(features_NC, target_N)


def _class_search(target_N: Ints, model: Model) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier

    smallest = int(np.bincount(target_N)[np.unique(target_N)].min())
    inner = StratifiedKFold(min(INNER_FOLDS, smallest), shuffle=True, random_state=SEED)
    search: tuple[Any, dict[str, list[Any]]] = LogisticRegression(max_iter=ITERATIONS), {"C": list(GRID)}
    if model == "k-NN":
        search = KNeighborsClassifier(weights="distance"), {"n_neighbors": _neighbours(len(target_N), inner.n_splits)}
    return GridSearchCV(*search, scoring="balanced_accuracy", cv=inner)


def _number_search(cases: int, model: Model) -> Any:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.neighbors import KNeighborsRegressor

    inner = KFold(min(INNER_FOLDS, cases // 2), shuffle=True, random_state=SEED)
    search: tuple[Any, dict[str, list[Any]]] = Ridge(), {"alpha": list(GRID)}
    if model == "k-NN":
        search = KNeighborsRegressor(weights="distance"), {"n_neighbors": _neighbours(cases, inner.n_splits)}
    return GridSearchCV(*search, scoring="r2", cv=inner)


def _neighbours(cases: int, folds: int) -> list[int]:
    """Return the numbers of neighbours that every inner training fold has."""
    smallest = cases - -(-cases // folds)
    return [k for k in NEIGHBOURS if k <= smallest]
