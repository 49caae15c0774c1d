"""Drift and flat ends of shapes with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nifti_files import centred, oblique

from tasks.qc_voxels import base_of, drift, drift_measure, end_measures, flat_end, grid_measure, outside_share
from tasks.volumes import Block, Grid

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


def ball(affine: np.ndarray, start: int = 0) -> Block:
    """Return the ball as `tight` would: without some planes of air in front of it."""
    values = np.pad(BALL, ((start, 0), (0, 0), (0, 0)))
    grid = Grid((values.shape[0], *SHAPE[1:]), affine)
    return Block(torch.from_numpy(values[start:] * 100), (start, 0, 0), grid, "ball")


@pytest.mark.parametrize("affine", [centred(SHAPE), oblique(SHAPE, (1, 1, 1), 20)])
def test_what_a_grid_cuts_off_is_the_volume_of_a_cap(affine: np.ndarray) -> None:
    """A grid that begins half a radius above the centre of a ball leaves 27/32 of it out."""
    whole = Grid((80, 90, 70), centred((80, 90, 70)))
    assert outside_share(ball(affine), whole, 10.0) == 0
    upper = whole.affine.copy()
    upper[2, 3] = 24 / 2 + 0.5
    assert outside_share(ball(affine), Grid(whole.shape, upper), 10.0) == pytest.approx(27 / 32, abs=0.02)
    half = whole.affine.copy()
    half[2, 3] = 0.5
    assert grid_measure(ball(affine), Grid(whole.shape, half), (0, 90), "t1") == {
        "outside_grid_t1": pytest.approx(0.5, abs=0.03)
    }


def test_where_a_block_begins_does_not_matter() -> None:
    affine, target = centred(SHAPE), Grid((30, 90, 70), centred((30, 90, 70)))
    shifted = affine.copy()
    shifted[0, 3] -= 12
    expected = outside_share(ball(affine), target, 10.0)
    assert 0.2 < expected < 0.6
    assert outside_share(ball(shifted, start=12), target, 10.0) == expected


def test_without_tissue_nothing_is_outside() -> None:
    block = Block(torch.zeros(4, 4, 4), (0, 0, 0), Grid((4, 4, 4), np.eye(4)), "air")
    assert outside_share(block, Grid((2, 2, 2), np.eye(4)), 0.0) is None
    assert grid_measure(block, Grid((2, 2, 2), np.eye(4)), (0, 1), "t1") == {}
