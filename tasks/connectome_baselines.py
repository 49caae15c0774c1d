"""Baselines that see the connectome of who is tested: upper triangle, tangent space with a linear SVM, a supervised
network. Everything is fitted on the training folds alone.

Shapes: N subjects, R regions, C features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from models.config_cinp import NetworkClassificationConfig
from models.connectomes import ConnectomeSpec
from tasks.probes import GRID, INNER_FOLDS, SEED, Floats, Ints, held_out
from tasks.prompting import pseudo_probabilities

Matrices = npt.NDArray[np.float32]
FLOOR = 0.05
"""Smallest eigenvalue that a correlation matrix is shrunk to: few frames make it singular."""
REGIONS_MIN = 3
"""Regions that all connectomes must have for a tangent space."""


def upper_triangles(matrices_NRR: Matrices) -> Floats:
    """Return the connections above the diagonal, (N, R (R - 1) / 2), NaN where a region is missing."""
    rows, columns = np.triu_indices(matrices_NRR.shape[1], k=1)
    return matrices_NRR[:, rows, columns].astype(np.float64)


def common_regions(matrices_NRR: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Say of each region (R,) whether all connectomes have it."""
    # The diagonal of a missing region is NaN or 0: its connections tell.
    missing = np.isnan(matrices_NRR).sum(axis=2) >= matrices_NRR.shape[1] - 1
    return np.asarray(~missing.any(axis=0))


def correlations(matrices_NRR: Matrices, fisher_z: bool) -> Floats:
    """Return stored connectomes as positive definite correlation matrices of the regions that everybody has.

    Fisher's z is taken back, the diagonal set to 1, and each matrix mixed with as little of the identity as lifts its
    smallest eigenvalue to FLOOR: (1 - a) C + a I. Raises ValueError when fewer than three regions are left.
    """
    matrices = matrices_NRR.astype(np.float64)
    kept = common_regions(matrices)
    if kept.sum() < REGIONS_MIN:
        raise ValueError(
            f"tangent space: only {int(kept.sum())} regions are present in all {len(matrices)} connectomes"
        )
    matrices = matrices[:, kept][:, :, kept]
    found = np.tanh(matrices) if fisher_z else matrices
    found[:, np.arange(found.shape[1]), np.arange(found.shape[1])] = 1.0
    found = (found + found.transpose(0, 2, 1)) / 2
    smallest = np.linalg.eigvalsh(found)[:, 0]
    share = np.clip((FLOOR - smallest) / (1 - smallest), 0, None)[:, None, None]
    return (1 - share) * found + share * np.eye(found.shape[1])


class GivenCovariance(BaseEstimator):
    """A covariance estimator for matrices that are covariances already."""

    def fit(self, matrix: Floats, y: None = None) -> GivenCovariance:
        """Take a matrix (R, R) as it is."""
        self.covariance_ = matrix
        return self


def tangent_svm(correlations_NRR: Floats, target_N: Ints, fold_N: Ints, classes: int) -> Floats:
    """Return pseudo-probabilities (N, K) of a linear SVM in tangent space, of every subject by the other folds.

    nilearn's ConnectivityMeasure finds the geometric mean of the training matrices and projects all others about it. C
    is the one with the best balanced accuracy of the inner folds. The softmax of the decision values ranks subjects; it
    is not calibrated. Source: Dadi et al., NeuroImage 192 (2019) 115-134: tangent space with linear
    models does best there.
    """
    found = np.full((len(target_N), classes), np.nan)
    for train, test in held_out(fold_N):
        with threadpool_limits(1):
            inside, outside = _tangent(correlations_NRR[train], correlations_NRR[test])
            model = _svm(target_N[train]).fit(inside, target_N[train])
            decision = np.asarray(model.decision_function(outside), dtype=np.float64)
        sides = np.column_stack([-decision / 2, decision / 2]) if decision.ndim == 1 else decision
        found[test] = pseudo_probabilities(sides, 1.0)
    return found


def _tangent(train_NRR: Floats, test_NRR: Floats) -> tuple[Floats, Floats]:
    from nilearn.connectome import ConnectivityMeasure

    measure = ConnectivityMeasure(cov_estimator=GivenCovariance(), kind="tangent", vectorize=True, standardize=False)
    return measure.fit_transform(list(train_NRR)), measure.transform(list(test_NRR))


def _svm(target_N: Ints) -> Any:
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.svm import SVC

    smallest = int(np.bincount(target_N)[np.unique(target_N)].min())
    inner = StratifiedKFold(min(INNER_FOLDS, smallest), shuffle=True, random_state=SEED)
    return GridSearchCV(SVC(kernel="linear"), {"C": list(GRID)}, scoring="balanced_accuracy", cv=inner)


def supervised_network(
    matrices_NRR: Matrices,
    target_N: Ints,
    fold_N: Ints,
    classes: int,
    config: NetworkClassificationConfig,
    seed: int,
) -> Floats:
    """Return probabilities (N, K) of a network like BrainNetworkTransformer, of every subject by the other folds.

    It is trained anew on the training folds of each fold, from `seed`, for a fixed number of epochs: no fold is used to
    choose among them.
    """
    from models.network_training import fit_network_classifier

    found = np.full((len(target_N), classes), np.nan)
    for train, test in held_out(fold_N):
        model = fit_network_classifier(matrices_NRR[train], target_N[train], config, seed)
        found[test] = model.predict_proba(matrices_NRR[test])
    return found


def why_no_tangent(spec: ConnectomeSpec, matrices: Callable[[], Matrices]) -> str:
    """Return why there is no tangent space of connectomes of a store; empty when there is one. They are read only where
    the spec allows missing regions."""
    if spec.kind != "correlation":
        return f"the store holds {spec.kind}s, tangent space is one of correlations"
    if spec.missing_regions and (count := int(common_regions(matrices()).sum())) < REGIONS_MIN:
        return f"only {count} regions are present in all connectomes, tangent space needs {REGIONS_MIN}"
    return ""
