"""Drift and flat ends of shapes with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.qc_voxels import base_of, drift, drift_measure, end_measures, flat_end

SHAPE = (60, 72, 50)
X, Y, Z = (np.arange(n) - (n - 1) / 2 for n in SHAPE)
BALL = (X[:, None, None] / 29) ** 2 + (Y[:, None] / 35) ** 2 + (Z / 24) ** 2 < 1


def channel(values: np.ndarray) -> np.ndarray:
    return np.where(BALL, values, 0).astype(np.float16)


def test_drift_is_the_spread_of_a_linear_field() -> None:
    field = 0.5 * (1 + 0.6 * X[:, None, None] / 29)
    # A coordinate of a unit ball has a standard deviation of 1 / sqrt 5.
    assert drift(channel(field)) == pytest.approx(0.6 / 5**0.5, rel=0.03)
    assert drift(channel(np.full(SHAPE, 0.5))) == pytest.approx(0, abs=1e-4)


def test_drift_is_that_of_the_file_whatever_the_range_took_away() -> None:
    field = 1 + 0.3 * Z / 24
    low, high = 0.6, 1.4
    scaled = channel((field - low) / (high - low) + np.zeros(SHAPE))
    assert base_of((low, high)) == pytest.approx(0.75)
    assert drift(scaled, base_of((low, high))) == pytest.approx(0.3 / 5**0.5, rel=0.05)
    assert base_of((-3.0, 5.0)) == 0


def test_noise_and_texture_are_no_drift() -> None:
    rng = np.random.default_rng(0)
    assert drift(channel(0.5 + 0.1 * rng.standard_normal(SHAPE))) < 0.01


def test_without_tissue_nothing_is_measured() -> None:
    empty = np.zeros(SHAPE, np.float16)
    assert drift(empty) is None
    assert drift_measure(empty, 0.0, "t1") == {}
    assert flat_end(torch.from_numpy(empty), 0.1) == (0.0, "")
    assert end_measures(torch.from_numpy(empty), (0.0, 1.0), "t1") == {}


def test_a_whole_brain_tapers() -> None:
    share, _ = flat_end(torch.from_numpy(BALL * 100), 10.0)
    assert share < 0.12


@pytest.mark.parametrize(
    ("axis", "keep", "face"),
    [
        (0, slice(20, None), "left"),
        (0, slice(None, 40), "right"),
        (1, slice(20, None), "posterior"),
        (1, slice(None, 50), "anterior"),
        (2, slice(15, None), "inferior"),
        (2, slice(None, 35), "superior"),
    ],
)
@pytest.mark.parametrize("padded", [True, False])
def test_a_cut_is_found_with_its_face(axis: int, keep: slice, face: str, padded: bool) -> None:
    where = tuple(keep if other == axis else slice(None) for other in range(3))
    source = np.zeros_like(BALL, dtype=np.int16)
    source[where] = 100 * BALL[where]
    share, found = flat_end(torch.from_numpy(source if padded else source[where].copy()), 10.0)
    assert found == face
    assert share > 0.6


def test_what_is_darker_than_a_tenth_of_the_range_is_no_tissue() -> None:
    haze = torch.from_numpy(np.where(BALL, 100.0, 5.0))
    assert end_measures(haze, (0.0, 100.0), "t1")["flat_end_t1"] < 0.12
    assert end_measures(haze, (0.0, 40.0), "t1")["flat_end_t1"] == 1
