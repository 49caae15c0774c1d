"""The plain linear models that studies compare with: ridge regression with more columns than rows, and components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tasks.probes import Floats

PENALTY = 0.3
"""Of the ridge, relative to the mean variance of a training case."""


@dataclass(frozen=True)
class Components:
    """Principal components of training cases, scaled to a variance of 1."""

    mean: Floats
    axes: Floats
    """(columns, components)"""

    def of(self, values: Floats) -> Floats:
        """Return the components (N, K) of values (N, columns)."""
        return np.asarray((values - self.mean) @ self.axes)


def fit_components(train: Floats, count: int) -> Components:
    """Return the first components of training cases (N, columns)."""
    mean = train.mean(axis=0)
    _, scale, axes = np.linalg.svd(train - mean, full_matrices=False)
    return Components(mean, np.asarray(axes[:count].T / scale[:count] * np.sqrt(len(train))))


def ridge(train: Floats, targets: Floats, others: Floats, penalty: float = PENALTY) -> Floats:
    """Return what a ridge regression of targets (N, K) on training cases (N, columns) says of other cases (M, columns).

    Columns are standardised by the training cases; those that hardly vary among them are left out.
    """
    mean, spread = train.mean(axis=0), train.std(axis=0)
    used = spread > 1e-2 * spread.max()
    x, z = ((values[:, used] - mean[used]) / spread[used] for values in (train, others))
    kernel = x @ x.T
    weights = np.linalg.solve(
        kernel + penalty * np.trace(kernel) / len(x) * np.eye(len(x)), targets - targets.mean(axis=0)
    )
    return np.asarray(z @ x.T @ weights + targets.mean(axis=0))


def cosines(first: Floats, second: Floats) -> Floats:
    """Return the cosine of every line of one (N, K) and every line of another (M, K)."""
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (first, second))
    return np.asarray(a @ b.T)
