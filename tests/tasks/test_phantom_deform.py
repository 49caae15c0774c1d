"""Warps are smooth and one to one, and change the ventricles as calibrated."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.phantom.anatomy import BRAIN_CENTRE_MM, Atlas, load_atlas
from tasks.phantom.config import DEMO
from tasks.phantom.deform import (
    FLOW_TABLE,
    IDENTITY,
    check_invertible,
    draw_warp,
    fill,
    jacobian,
    voxel_centres,
    warp_grid,
)
from tasks.phantom.effects import draw_traits

AFFINE = np.array([[3.0, 0, 0, -90], [0, 3.0, 0, -125], [0, 0, 3.0, -84], [0, 0, 0, 1]])
SHAPE = (61, 73, 61)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return load_atlas()


def test_template_volumes_are_those_of_a_head(atlas: Atlas) -> None:
    assert atlas.brain.sum() / 1e6 == pytest.approx(1.887, abs=0.01)
    assert 12 < atlas.ventricles.sum() / 1e3 < 25
    assert (atlas.grey * atlas.cortex).sum() / atlas.grey.sum() == pytest.approx(1.0, abs=0.05)
    # Lateral ventricles on both sides, nothing at the surface.
    assert atlas.sample("ventricles", np.array([[9.0, -9.0, 60.0], [10, 10, 0], [18, 18, 20]])).round().tolist() == [
        1,
        1,
        0,
    ]


def test_identity_leaves_points_alone(atlas: Atlas) -> None:
    points = warp_grid(IDENTITY, AFFINE, SHAPE, atlas)
    np.testing.assert_array_equal(points, voxel_centres(AFFINE, SHAPE))


@pytest.mark.parametrize("number", range(8))
def test_jacobian_is_positive_and_the_move_moderate(atlas: Atlas, number: int) -> None:
    traits = draw_traits(DEMO, 0, number)
    warp = draw_warp(traits, np.random.default_rng(number))
    points = warp_grid(warp, AFFINE, SHAPE, atlas)
    assert jacobian(points, AFFINE).min() > 0
    scale = np.linalg.svd(warp.to_subject[:3, :3], compute_uv=False) / traits.head_scale
    assert np.abs(scale - 1).max() < 0.04
    waves = replace(warp, flow=0.0).to_template(np.zeros((3, 1)), atlas) - replace(
        warp, flow=0.0, waves=np.zeros((0, 3))
    ).to_template(np.zeros((3, 1)), atlas)
    assert np.abs(waves).max() < 15


def test_strongest_inflation_does_not_fold(atlas: Atlas) -> None:
    traits = draw_traits(DEMO, 0, 0).replace(ventricle_log=2.0)
    points = warp_grid(draw_warp(traits, np.random.default_rng(1)), AFFINE, SHAPE, atlas)
    assert check_invertible(points, AFFINE, "sub-1") > 0


@pytest.mark.parametrize("log", [-0.667, 0.625, 1.616])
def test_ventricles_grow_as_calibrated(atlas: Atlas, log: float) -> None:
    warp = replace(IDENTITY, flow=float(np.interp(log, *FLOW_TABLE)))
    points = warp_grid(warp, AFFINE, SHAPE, atlas).reshape(3, -1)
    grown = float(atlas.sample("ventricles", points).sum()) * 27
    assert np.log(grown / atlas.ventricles.sum()) == pytest.approx(log, abs=0.06)


def test_points_far_from_the_ventricles_do_not_flow(atlas: Atlas) -> None:
    far = np.array([[70.0, 0, 0], [0, -105, 72], [0, 0, -40]])
    moved = replace(IDENTITY, flow=20.0).to_template(far, atlas)
    assert np.abs(moved - far).max() < 0.5


def test_folding_is_refused_by_name() -> None:
    mirrored = voxel_centres(AFFINE, (8, 8, 8)) * np.array([-1, 1, 1]).reshape(3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"sub-7: the deformation folds, smallest Jacobian -1 must be > 0"):
        check_invertible(mirrored, AFFINE, "sub-7")


def test_affine_scales_about_the_brain_centre(atlas: Atlas) -> None:
    traits = draw_traits(DEMO, 0, 5)
    warp = draw_warp(traits, np.random.default_rng(3))
    moved = warp.to_subject[:3, :3] @ BRAIN_CENTRE_MM + warp.to_subject[:3, 3]
    assert np.abs(moved - BRAIN_CENTRE_MM).max() <= 4.0


def test_fill_interpolates_cubics_exactly() -> None:
    nodes = (np.arange(5)[:, None, None] * 2.0) ** 3 * np.ones((1, 4, 4))
    filled = fill(nodes, (9, 7, 7), (2, 2, 2))
    np.testing.assert_allclose(filled[:, 3, 3], np.arange(9.0) ** 3, rtol=1e-5, atol=1e-3)
