"""Baselines on connectomes: matrices taken back, tangent space against nilearn, nothing fitted on the held-out fold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from nilearn.connectome import ConnectivityMeasure

from models.config_cinp import NetworkClassificationConfig
from models.connectomes import ConnectomeSpec
from tasks.connectome_baselines import (
    FLOOR,
    GivenCovariance,
    correlations,
    supervised_network,
    tangent_svm,
    upper_triangles,
    why_no_tangent,
)

N, R = 30, 6
FOLD, CLASS = np.arange(N) % 3, np.arange(N) // 3 % 2
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.connectome_baselines.GRID", (1.0,))
    monkeypatch.setattr("tasks.connectome_baselines.INNER_FOLDS", 2)


def series(effect: float, frames: int = 40) -> np.ndarray:
    """Return signals (N, frames, R); of the second class the first two regions share one."""
    found = RNG.standard_normal((N, frames, R))
    found[:, :, 1] += effect * CLASS[:, None] * found[:, :, 0]
    return found


def stored(signals: np.ndarray) -> np.ndarray:
    """Return connectomes as a store has them: Fisher's z, diagonal 0, float32."""
    found = np.array([np.arctanh(np.clip(np.corrcoef(one.T), -0.999, 0.999)) for one in signals])
    found[:, range(R), range(R)] = 0
    return found.astype(np.float32)


def test_stored_matrices_become_the_correlations_that_they_were() -> None:
    signals = series(1.0)
    found = correlations(stored(signals), fisher_z=True)
    np.testing.assert_allclose(found, [np.corrcoef(one.T) for one in signals], atol=1e-6)
    plain = np.array([np.corrcoef(one.T) for one in signals], dtype=np.float32)
    np.testing.assert_allclose(correlations(plain, fisher_z=False), found, atol=1e-6)


def test_few_frames_and_missing_regions_still_give_positive_definite_matrices() -> None:
    matrices = stored(series(1.0, frames=4))
    found = correlations(matrices, fisher_z=True)
    assert np.linalg.eigvalsh(found)[:, 0].min() == pytest.approx(FLOOR)
    np.testing.assert_allclose(found[:, range(R), range(R)], 1)
    matrices[3, 2, :] = matrices[3, :, 2] = np.nan
    assert correlations(matrices, fisher_z=True).shape == (N, R - 1, R - 1)
    assert np.isnan(upper_triangles(matrices)).sum(axis=1).tolist() == [5 * (k == 3) for k in range(N)]
    for region in (0, 1, 4):
        matrices[region, region, :] = matrices[region, :, region] = np.nan
    with pytest.raises(ValueError, match="tangent space: only 2 regions are present in all 30 connectomes"):
        correlations(matrices, fisher_z=True)


def test_the_upper_triangle_leaves_out_the_diagonal() -> None:
    matrix = np.arange(9, dtype=np.float32).reshape(1, 3, 3)
    assert upper_triangles(matrix).tolist() == [[1, 2, 5]]


def test_given_matrices_make_the_tangent_space_of_their_series() -> None:
    class Empirical(GivenCovariance):
        def fit(self, matrix: np.ndarray, y: None = None) -> GivenCovariance:
            self.covariance_ = np.corrcoef(matrix.T)
            return self

    signals = series(1.0)
    wanted = ConnectivityMeasure(Empirical(), kind="tangent", standardize=False).fit_transform(list(signals))
    given = list(correlations(stored(signals), fisher_z=True))
    found = ConnectivityMeasure(GivenCovariance(), kind="tangent", standardize=False).fit_transform(given)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_svm_finds_an_effect_and_never_sees_the_held_out_fold() -> None:
    matrices = correlations(stored(series(2.0)), fisher_z=True)
    found = tangent_svm(matrices, CLASS, FOLD, 2)
    assert (found.argmax(axis=1) == CLASS).mean() > 0.9
    np.testing.assert_allclose(found.sum(axis=1), 1)
    held = np.flatnonzero(FOLD == 0)
    changed, target = matrices.copy(), CLASS.copy()
    changed[held[1:]] = np.eye(R)
    target[held] = 1 - target[held]
    np.testing.assert_array_equal(tangent_svm(changed, target, FOLD, 2)[held[0]], found[held[0]])
    three = np.arange(N) // 3 % 3
    many = tangent_svm(matrices, three, FOLD, 3)
    assert (many.shape, bool(np.isfinite(many).all())) == ((N, 3), True)


def test_the_supervised_network_is_trained_anew_in_every_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[list[float], list[int], int]] = []

    def fit(matrices: np.ndarray, targets: np.ndarray, config: object, seed: int) -> SimpleNamespace:
        fitted.append((matrices[:, 0, 1].tolist(), targets.tolist(), seed))
        return SimpleNamespace(predict_proba=lambda test: np.full((len(test), 2), 0.1 * len(fitted)))

    monkeypatch.setattr("models.network_training.fit_network_classifier", fit)
    matrices = stored(series(1.0))
    found = supervised_network(matrices, CLASS, FOLD, 2, NetworkClassificationConfig(), seed=3)
    np.testing.assert_allclose(found[:, 0], 0.1 * (FOLD + 1))
    others = [np.flatnonzero(k != FOLD) for k in range(3)]
    wanted = [(matrices[train, 0, 1].tolist(), CLASS[train].tolist(), 3) for train in others]
    assert fitted == wanted


def test_there_is_no_tangent_space_of_partial_correlations_or_without_common_regions() -> None:
    holed = np.zeros((4, R, R), np.float32)
    for region in range(4):
        holed[region, region] = holed[region, :, region] = np.nan
    partial, plain = (
        ConnectomeSpec(atlas="desikan_killiany", kind=kind, missing_regions=1)
        for kind in ("partial correlation", "correlation")
    )
    words = "the store holds partial correlations, tangent space is one of correlations"
    assert why_no_tangent(partial, lambda: holed) == words
    words = "only 2 regions are present in all connectomes, tangent space needs 3"
    assert why_no_tangent(plain, lambda: holed) == words
    assert why_no_tangent(plain, lambda: holed[:2]) == ""
    assert why_no_tangent(plain.replace(missing_regions=0), lambda: pytest.fail("was read")) == ""
