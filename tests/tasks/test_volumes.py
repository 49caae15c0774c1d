import numpy as np
import pytest
from nifti_files import SMALL, blob, centred

from models.records import Reason
from tasks.nifti import BadScanError, Volume
from tasks.volumes import (
    Grid,
    foreground_box,
    grid_of,
    intensity_range,
    isotropic_grid,
    overlap_share,
    resample,
    same_grid,
    scale,
    shift_affine,
    snr_estimate,
    symmetric,
    to_ras,
)


def oblique(shape, zooms, degrees=12):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ centred(shape, zooms)


AFFINES = {
    "same": centred,
    "anisotropic": lambda shape: centred(shape, (0.8, 1.1, 2.5)),
    "oblique": lambda shape: oblique(shape, (1, 1.2, 1.5)),
}


@pytest.mark.parametrize("affine", ["same", "anisotropic", "oblique"])
@pytest.mark.parametrize("spacing", [0.7, 1.0, 3.0])
def test_linear_resampling_equals_nilearn(affine, spacing):
    from nibabel import Nifti1Image
    from nilearn.image import resample_img

    volume = Volume(blob() / 250, AFFINES[affine]((30, 28, 24)), "a")
    target = Grid((25, 24, 20), centred((25, 24, 20), (spacing,) * 3))
    ours = resample(volume, target)
    other = resample_img(
        Nifti1Image(volume.data, volume.affine),
        target.affine,
        target.shape,
        interpolation="linear",
        copy_header=True,
        force_resample=True,
    ).get_fdata()
    np.testing.assert_allclose(ours.astype(np.float16), other, atol=2e-3)
    assert ours.max() > 0.5


def test_nearest_keeps_labels_and_equals_scipy():
    from scipy.ndimage import affine_transform

    label = np.random.default_rng(0).integers(0, 5, (20, 18, 16)).astype(np.float32)
    volume = Volume(label, oblique(label.shape, (1, 1.2, 1.5)), "seg")
    # Shifted a little: voxels exactly half-way between two belong to either.
    target = Grid((17, 15, 14), centred((17, 15, 14), (1.01, 1.03, 0.97)) + 0.013 * np.eye(4, k=3))
    matrix = np.linalg.inv(volume.affine) @ target.affine
    other = affine_transform(label, matrix[:3, :3], matrix[:3, 3], target.shape, order=0, mode="grid-constant")
    np.testing.assert_array_equal(resample(volume, target, nearest=True), other)


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SAR", "RAS"])
def test_orientation_moves_no_voxel_in_the_world(axes):
    import nibabel as nib

    volume = Volume(blob(), centred((30, 28, 24), (1, 1.5, 2)), "a")
    image = nib.Nifti1Image(volume.data, volume.affine)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    )
    back = to_ras(Volume(np.asarray(turned.dataobj), turned.affine, "a"))
    np.testing.assert_array_equal(back.data, volume.data)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@pytest.mark.parametrize("affine", ["same", "anisotropic", "oblique"])
@pytest.mark.parametrize("spacing", [1.0, 1.7])
def test_isotropic_grid_and_voxels_equal_monai_spacing(affine, spacing):
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    volume = Volume(blob() / 250, AFFINES[affine]((30, 28, 24)), "a")
    grid = isotropic_grid(grid_of(volume), spacing)
    ours = resample(volume, grid)
    theirs = Spacing((spacing,) * 3, mode="bilinear", padding_mode="border")(
        MetaTensor(torch.from_numpy(volume.data)[None], affine=torch.from_numpy(volume.affine))
    )
    assert ours.shape == theirs.shape[1:]
    np.testing.assert_allclose(grid.affine, theirs.affine.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours, theirs.numpy()[0], atol=2e-3)


def test_outside_the_field_of_view_is_zero():
    volume = Volume(np.ones((10, 10, 10), np.float32), centred((10, 10, 10)), "a")
    wide = resample(volume, Grid((20, 20, 20), centred((20, 20, 20))))
    assert wide.sum() == 1000
    far = Grid((5, 5, 5), centred((5, 5, 5)) + np.array([[0, 0, 0, 90.0], [0] * 4, [0] * 4, [0] * 4]))
    assert overlap_share(grid_of(volume), far) == 0
    with pytest.raises(BadScanError, match="does not reach the grid of the case with centre") as error:
        resample(volume, far)
    assert error.value.reason == Reason.NO_OVERLAP


def test_equal_grids_are_not_interpolated():
    volume = Volume(blob(), centred((30, 28, 24)), "a")
    jittered = Grid((30, 28, 24), volume.affine + 1e-5)
    assert same_grid(grid_of(volume), jittered)
    assert resample(volume, jittered) is volume.data


def test_symmetric_crop_keeps_the_centre():
    image = np.zeros((2, 20, 21, 22), np.float32)
    image[0, 3:10, 8:9, 2:20] = 1
    image[1, 5:12, 8:10, 2:20] = 1
    box = foreground_box(image)
    assert box == (slice(3, 12), slice(8, 10), slice(2, 20))
    assert symmetric(box, (20, 21, 22)) == (slice(3, 17), slice(8, 13), slice(2, 20))
    with pytest.raises(BadScanError, match="no voxel above zero"):
        foreground_box(image * 0)


def test_affine_follows_the_crop():
    affine = oblique((30, 28, 24), (1, 1.2, 1.5))
    cropped = shift_affine(affine, (slice(3, 9), slice(5, 9), slice(7, 9)))
    np.testing.assert_allclose(cropped @ [0, 0, 0, 1], affine @ [3, 5, 7, 1])


def test_percentiles_with_and_without_zeros():
    channel = np.zeros((10, 10, 10), np.float32)
    channel[2:8, 2:8, 2:8] = np.arange(1, 217).reshape(6, 6, 6)
    assert intensity_range(channel, SMALL, "a") == pytest.approx(
        (np.percentile(channel, 5), np.percentile(channel, 95)), rel=1e-6
    )
    inside = SMALL.replace(percentile_region="foreground")
    assert intensity_range(channel, inside, "a") == pytest.approx((11.75, 205.25))
    channel[:] = 0
    channel[0, 0, 0] = 1
    with pytest.raises(BadScanError, match="percentiles 5 and 95 are both 0"):
        intensity_range(channel, SMALL, "a")


def test_scale_clips_and_has_no_minus_zero():
    scaled = scale(np.array([-5, -0.0, 0, 5, 10, 20], np.float32), 0, 10)
    np.testing.assert_array_equal(scaled, [0, 0, 0, 0.5, 1, 1])
    assert not np.signbit(scaled).any()


def test_snr_estimate_follows_the_noise():
    rng = np.random.default_rng(0)
    for sigma in (0.02, 0.1):
        noisy = 1 + rng.normal(0, sigma, (30, 30, 30))
        assert snr_estimate(noisy) == pytest.approx(1 / sigma, rel=0.05)
    assert snr_estimate(np.zeros((4, 4, 4))) == 0
