"""The matrix of known series is the planted one; what cannot become a connectome is refused with its numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from connectome_files import NAMES, correlation_of, fisher, own_spec, planted

from models.reasons import Reason
from tasks.affines import BadScanError
from tasks.connectome import R_MAX, Series, make_connectome, matrix_of

SPEC = own_spec()


def made(signals: np.ndarray, every: int | None = None, **changes: object) -> tuple[np.ndarray, dict[str, object]]:
    return make_connectome(Series(signals, "s1.1D", every or len(signals)), own_spec(**changes))


def refused(signals: np.ndarray, reason: Reason, text: str, every: int | None = None, **changes: object) -> None:
    with pytest.raises(BadScanError, match=text) as error:
        made(signals, every, **changes)
    assert error.value.reason == reason


def test_planted_correlations_come_back() -> None:
    truth = correlation_of(1)
    matrix, qc = made(planted(truth) * [1, 10, 1e3, 1e-3, 5, 7] + 40)
    np.testing.assert_allclose(matrix, fisher(truth), atol=1e-6)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, matrix.T)
    assert not np.diag(matrix).any()
    assert qc == {
        "connectome_frames": 100,
        "connectome_frames_all": 100,
        "connectome_missing_regions": 0,
        "connectome_mean_z": pytest.approx(fisher(truth)[np.triu_indices(6, 1)].mean(), abs=1e-5),
    }
    json.dumps(qc, allow_nan=False)


def test_without_fisher_z_they_are_stored_as_they_are() -> None:
    truth = correlation_of(2)
    np.testing.assert_allclose(made(planted(truth), fisher_z=False)[0], truth - np.eye(6), atol=1e-6)


def test_partial_correlation_is_that_of_the_precision_matrix() -> None:
    truth = correlation_of(3)
    precision = np.linalg.inv(truth)
    scale = np.sqrt(np.diag(precision))
    expected = fisher(-precision / np.outer(scale, scale))
    np.testing.assert_allclose(made(planted(truth), kind="partial correlation")[0], expected, atol=1e-5)


def test_shrinkage_does_not_depend_on_units() -> None:
    series = planted(correlation_of(4), 90)
    shrunk = own_spec(kind="partial correlation", covariance="ledoit_wolf")
    plain, scaled = (matrix_of(values, shrunk) for values in (series, series * [1, 100, 1, 1e-3, 1, 1] + 7))
    np.testing.assert_allclose(plain, scaled, atol=1e-6)
    assert np.abs(plain).sum() < np.abs(matrix_of(series, own_spec(kind="partial correlation"))).sum()


def test_equal_signals_stay_finite() -> None:
    series = planted(correlation_of(5))
    series[:, 1] = series[:, 0]
    series[:, 2] = -series[:, 0]
    matrix, _ = made(series)
    assert matrix[0, 1] == pytest.approx(np.arctanh(R_MAX))
    assert matrix[0, 2] == pytest.approx(-np.arctanh(R_MAX))


def test_regions_without_signal_are_nan_as_far_as_the_spec_allows() -> None:
    truth = correlation_of(6)
    series = planted(truth) + 1000
    series[:, 1], series[:, 4] = 7.0, np.nan
    here = [0, 2, 3, 5]
    matrix, qc = made(series, missing_regions=2)
    np.testing.assert_allclose(matrix[np.ix_(here, here)], fisher(truth)[np.ix_(here, here)], atol=1e-6)
    assert np.isnan(matrix[[1, 4]]).all()
    assert np.isnan(matrix[:, [1, 4]]).all()
    assert qc["connectome_missing_regions"] == 2
    text = rf"s1.1D: 2 of 6 regions have no signal .* the spec allows 1 \(missing_regions\): {NAMES[1]}, {NAMES[4]}"
    refused(series, Reason.NO_SIGNAL, text, missing_regions=1)


def test_too_few_frames_are_refused_with_the_numbers() -> None:
    series = planted(correlation_of(7), 79)
    text = r"s1.1D: 79 of 79 frames can be used, the spec asks for 80 \(min_frames\)"
    refused(series, Reason.FEW_FRAMES, text)
    text = r"79 of 200 frames can be used, 40%; the spec asks for 50% \(min_kept_share\)"
    refused(series, Reason.FEW_FRAMES, text, every=200, min_frames=50)


def test_what_cannot_be_inverted_is_refused_with_the_way_out() -> None:
    series = np.random.default_rng(0).standard_normal((20, 30))
    many = {"regions": [f"r{n}" for n in range(30)], "values": list(range(1, 31)), "min_frames": 10}
    partial = {**many, "kind": "partial correlation"}
    text = "partial correlation of 30 regions needs more than as many degrees of freedom, 20 frames leave 19; use "
    refused(series, Reason.FEW_FRAMES, text + "covariance 'ledoit_wolf' or kind 'correlation'", **partial)
    assert np.isfinite(made(series, **partial, covariance="ledoit_wolf")[0]).all()
    assert np.isfinite(made(series, **many)[0]).all()


def test_cleaning_must_leave_degrees_of_freedom() -> None:
    series = Series(planted(correlation_of(8), 90), "s1", 90, lost=85.0)
    with pytest.raises(BadScanError, match="cleaning leaves 4 degrees of freedom of 90 frames, at least 10 are needed"):
        make_connectome(series, SPEC)


def test_values_that_cannot_be_squared_are_refused() -> None:
    refused(
        planted(correlation_of(9)) * 1e160, Reason.NOT_FINITE, r"s1.1D: holds a value of size \d.*, at most 1e\+100 can"
    )


def test_partial_correlation_refuses_a_region_that_follows_from_others() -> None:
    series = planted(correlation_of(9))
    series[:, 1] = 3 * series[:, 0] + 7
    text = "the signals of 6 regions follow from 5 of them, so partial correlation has no answer; use covariance"
    refused(series, Reason.NO_SIGNAL, text, kind="partial correlation")
