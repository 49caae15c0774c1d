"""Surface distances against MONAI's on random masks: anisotropic voxels, masks cut by the border, specks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, gaussian_filter

from tasks.metrics_surface import Surfaces, surface, surface_distances, union_box

SPACINGS = ((1.0, 1.0, 1.0), (0.5, 0.5, 3.0), (0.94, 1.2, 2.0), (3.0, 3.0, 3.0))


def monai(prediction: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> list[float]:
    tensors = [torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (prediction, target)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distance = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))
        share = compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=list(spacing))
    return [float(distance[0, 0]), float(share[0, 0])]


def random_mask(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Return noise, blobs (cut by the border of the volume) or a single voxel."""
    if kind == "speck":
        mask = np.zeros(shape, bool)
        mask[tuple(rng.integers(0, shape))] = True
        return mask
    values = rng.normal(size=shape)
    values = gaussian_filter(values, 2) if kind == "blobs" else values
    return values > np.quantile(values, rng.uniform(0.3, 0.97))


DRAWN = given(
    seed=st.integers(0, 100_000),
    kinds=st.tuples(*[st.sampled_from(["noise", "blobs", "speck"])] * 2),
    spacing=st.sampled_from(SPACINGS),
    tolerance=st.sampled_from([0.7, 1.0, 3.1]),
)


def equals_monai(seed: int, kinds: tuple[str, str], spacing: tuple[float, ...], tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(4, 16, 3))
    prediction, target = (random_mask(rng, shape, kind) for kind in kinds)
    found = surface_distances(prediction, target, spacing)
    expected = monai(prediction, target, spacing, tolerance)
    np.testing.assert_allclose([found.hd95, found.surface_dice(tolerance)], expected, rtol=1e-5, atol=1e-6)
    assert len(found.to_target) == int(surface(prediction).sum())
    both = np.concatenate([found.to_target, found.to_prediction])
    assert found.hd95_pooled == pytest.approx(np.percentile(both, 95))


@DRAWN
@settings(max_examples=20, deadline=None)
def test_hd95_and_surface_dice_equal_monai(
    seed: int, kinds: tuple[str, str], spacing: tuple[float, ...], tolerance: float
) -> None:
    equals_monai(seed, kinds, spacing, tolerance)


@pytest.mark.full
@DRAWN
@settings(max_examples=250, deadline=None)
def test_hd95_and_surface_dice_equal_monai_on_many_masks(
    seed: int, kinds: tuple[str, str], spacing: tuple[float, ...], tolerance: float
) -> None:
    equals_monai(seed, kinds, spacing, tolerance)


@pytest.mark.parametrize("kind", ["noise", "blobs", "speck"])
def test_surface_is_what_erosion_takes_away(kind: str) -> None:
    mask = random_mask(np.random.default_rng(3), (9, 11, 7), kind)
    np.testing.assert_array_equal(surface(mask), mask ^ binary_erosion(mask))


def test_far_apart_and_full() -> None:
    first, second = np.zeros((2, 30, 6, 6), bool)
    first[0, 0, 0] = second[29, 5, 5] = True
    found = surface_distances(first, second, (1.0, 2.0, 3.0))
    assert found.hd95 == pytest.approx(np.linalg.norm([29, 10, 15]))
    assert surface_distances(~first, ~first, (1, 1, 1)).hd95 == 0


def test_a_mask_without_a_voxel_has_no_surface() -> None:
    some = np.ones((3, 3, 3), bool)
    for masks in ((some, ~some), (~some, some), (~some, ~some)):
        with pytest.raises(ValueError, match="need two masks with a voxel each; an empty mask has no surface"):
            surface_distances(*masks, (1, 1, 1))


def test_the_pooled_form_differs_where_one_direction_is_far() -> None:
    near, far = np.zeros(90), np.full(10, 20.0)
    found = Surfaces(to_target=np.concatenate([near, far]), to_prediction=np.zeros(300))
    assert found.hd95 == 20
    assert found.hd95_pooled == 0
    assert found.surface_dice(1.0) == pytest.approx(390 / 400)


def test_the_box_of_two_masks_stays_inside_the_volume() -> None:
    first, second = np.zeros((2, 10, 10, 10), bool)
    first[0, 4, 9] = second[3, 5, 5] = True
    assert union_box([first, second]) == (slice(0, 4), slice(4, 6), slice(5, 10))
    assert union_box([first, second], margin=2) == (slice(0, 6), slice(2, 8), slice(3, 10))
    assert union_box([np.zeros((2, 2, 2), bool)]) is None
