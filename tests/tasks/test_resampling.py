import numpy as np
import pytest
import torch
from nifti_files import blob, centred, oblique, volume_of

from models.records import Reason
from tasks.affines import BadScanError
from tasks.resampling import resample
from tasks.volumes import Grid, dense, grid_of, isotropic_grid, tight

AFFINES = {
    "same": centred,
    "anisotropic": lambda shape: centred(shape, (0.8, 1.1, 2.5)),
    "oblique": lambda shape: oblique(shape, (1, 1.2, 1.5)),
}


def on(volume, grid, **options):
    return dense(resample(tight(volume), grid, **options))


@pytest.mark.parametrize("affine", ["same", "anisotropic", "oblique"])
@pytest.mark.parametrize("spacing", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_linear_resampling_equals_nilearn(affine, spacing, dtype):
    from nibabel import Nifti1Image
    from nilearn.image import resample_img

    volume = volume_of(blob().astype(dtype), AFFINES[affine]((30, 28, 24)))
    target = Grid((25, 24, 20), centred((25, 24, 20), (spacing,) * 3))
    ours = on(volume, target)
    other = resample_img(
        Nifti1Image(volume.data.float().numpy(), volume.affine),
        target.affine,
        target.shape,
        interpolation="linear",
        copy_header=True,
        force_resample=True,
    ).get_fdata()
    np.testing.assert_allclose(ours / 250, other / 250, atol=2e-3)
    assert ours.max() > 100


def test_nearest_keeps_labels_and_equals_scipy():
    from scipy.ndimage import affine_transform

    label = np.random.default_rng(0).integers(0, 5, (20, 18, 16)).astype(np.uint8)
    for affine in (oblique(label.shape, (1, 1.2, 1.5)), centred(label.shape, (1, 1.2, 1.5))):
        # Shifted a little: voxels exactly half-way between two belong to either.
        target = Grid((17, 15, 14), centred((17, 15, 14), (1.01, 1.03, 0.97)) + 0.013 * np.eye(4, k=3))
        matrix = np.linalg.inv(affine) @ target.affine
        other = affine_transform(label, matrix[:3, :3], matrix[:3, 3], target.shape, order=0, mode="grid-constant")
        np.testing.assert_array_equal(on(volume_of(label, affine), target, nearest=True), other)


@pytest.mark.parametrize("affine", ["same", "anisotropic", "oblique"])
@pytest.mark.parametrize("spacing", [1.0, 1.7])
def test_isotropic_grid_and_voxels_equal_monai_spacing(affine, spacing):
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    volume = volume_of(blob() / 250, AFFINES[affine]((30, 28, 24)))
    grid = isotropic_grid(grid_of(volume), spacing)
    ours = on(volume, grid)
    theirs = Spacing((spacing,) * 3, mode="bilinear", padding_mode="border")(
        MetaTensor(volume.data[None], affine=torch.from_numpy(volume.affine))
    )
    assert ours.shape == theirs.shape[1:]
    np.testing.assert_allclose(grid.affine, theirs.affine.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours, theirs.numpy()[0], atol=2e-3)


@pytest.mark.parametrize("affine", ["anisotropic", "oblique"])
def test_the_box_of_tissue_alone_gives_what_the_whole_volume_gives(affine):
    data = blob((40, 38, 36), margin=12) - 100 * (blob((40, 38, 36), margin=14) > 0)
    volume = volume_of(data, AFFINES[affine](data.shape))
    grid = Grid((50, 48, 46), centred((50, 48, 46), (0.9, 1.0, 1.3)))
    part = resample(tight(volume), grid)
    assert part.data.numel() < 0.7 * np.prod(grid.shape)
    # One bright corner voxel makes the box the whole volume; it is far from the tissue.
    lit = data.copy()
    lit[0, 0, 0] = lit[-1, -1, -1] = 1e-30
    np.testing.assert_allclose(dense(part), on(volume_of(lit, volume.affine), grid), atol=1e-3)


def test_outside_the_field_of_view_is_zero_and_the_half_voxel_of_the_border_holds():
    volume = volume_of(np.ones((10, 10, 10), np.float32))
    assert on(volume, Grid((20, 20, 20), centred((20, 20, 20)))).sum() == 1000
    fine = on(volume, Grid((40, 40, 40), centred((40, 40, 40), (0.5,) * 3)))
    assert set(np.unique(fine)) == {0, 1}
    assert fine.sum() == 20**3
    turned = Grid((20, 20, 20), oblique((20, 20, 20), (1, 1, 1), 30))
    assert on(volume, turned).sum() == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize(("by", "what"), [((90, 90, 90), "field of view does not reach"), ((0, 0, 9), "nothing of it")])
@pytest.mark.parametrize("degrees", [0, 12])
def test_images_that_do_not_reach_the_grid(by, what, degrees):
    data = np.zeros((10, 10, 30), np.float32)
    data[:, :, 2:5] = 1
    far = oblique((10, 10, 10), (1, 1, 1), degrees)
    far[:3, 3] += by
    with pytest.raises(BadScanError, match=rf"^grids do not overlap: a: .*{what}.* the grid of the case") as error:
        resample(tight(volume_of(data)), Grid((10, 10, 10), far))
    assert error.value.reason == Reason.NO_OVERLAP


def test_equal_and_shifted_grids_are_not_interpolated():
    volume = volume_of(blob().astype(np.int16))
    block = tight(volume)
    jittered = Grid((30, 28, 24), volume.affine + 1e-5)
    assert resample(block, jittered).data is block.data
    shifted = np.array(volume.affine)
    shifted[:3, 3] += [3, -2, 7]
    found = resample(block, Grid((20, 40, 15), shifted))
    assert found.data.dtype == torch.int16
    expected = np.zeros((20, 40, 15))
    expected[:, 2:30] = volume.data.numpy()[3:23, :, 7:22][:, :28]
    np.testing.assert_array_equal(dense(found), expected)
