import numpy as np
import pytest
from nifti_files import blob, centred
from scipy import ndimage

from tasks.fingerprint import EDGE, fingerprint


def brain(seed=0):
    """Return a smooth textured ball of 100 mm at 2 mm and its affine: (x, y, z) float32 of 0..1."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.standard_normal((60, 64, 56)), 3)
    values = 0.5 + 0.2 * texture / texture.std()
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in values.shape), indexing="ij")
    ball = sum(axis**2 for axis in axes) < 0.8
    return np.where(ball, np.clip(values, 0.05, 1), 0).astype(np.float32), centred(values.shape, (2, 2, 2))


def similarity(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def test_it_holds_normal_scores_of_cells_with_tissue():
    found = np.array(fingerprint(*brain()))
    assert found.shape == (EDGE**3,)
    inside = found[found != 0]
    assert 500 < len(inside) < 2000
    assert abs(inside.mean()) < 0.01
    assert abs(inside.std() - 1) < 0.02


@pytest.mark.parametrize("change", [lambda v: 0.3 * v + 0.02, lambda v: v**1.5, np.sqrt])
def test_intensity_scale_and_gamma_do_not_matter(change):
    values, affine = brain()
    changed = np.where(values > 0, change(values), 0)
    assert similarity(fingerprint(values, affine), fingerprint(changed, affine)) > 0.99


def test_voxel_axes_and_position_in_the_world_do_not_matter():
    values, affine = brain()
    expected = fingerprint(values, affine)
    turned = np.transpose(values, (2, 0, 1))[::-1]
    axes = affine @ np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, values.shape[2] - 1], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(fingerprint(turned, axes), expected, atol=2e-2)
    moved = affine.copy()
    moved[:3, 3] += (31, -7, 12)
    np.testing.assert_allclose(fingerprint(values, moved), expected, atol=2e-2)
    padded = np.pad(values, ((5, 2), (0, 3), (1, 1)))
    assert similarity(fingerprint(padded, affine), expected) > 0.999


def test_another_spacing_and_a_tighter_mask_change_little():
    values, affine = brain()
    expected = fingerprint(values, affine)
    fine = ndimage.zoom(values, 2, order=0, grid_mode=True, mode="nearest")
    half = affine @ np.diag([0.5, 0.5, 0.5, 1])
    half[:3, 3] -= 0.5
    assert similarity(fingerprint(fine.astype(np.float16), half), expected) > 0.98
    tight = np.where(ndimage.binary_erosion(values > 0, iterations=2), values, 0)
    assert similarity(fingerprint(tight, affine), expected) > 0.85


def test_other_brains_are_others():
    assert abs(similarity(fingerprint(*brain(1)), fingerprint(*brain(2)))) < 0.3


def test_too_little_tissue_is_all_zero():
    assert set(fingerprint(np.zeros((8, 8, 8)), np.eye(4))) == {0.0}
    assert set(fingerprint(blob((6, 6, 6), margin=2), np.eye(4))) == {0.0}
