import nibabel as nib
import numpy as np
import pytest
import torch
from nifti_files import blob, centred, oblique, volume_of

from tasks.affines import BadScanError
from tasks.volumes import (
    Block,
    Grid,
    box_above,
    cut,
    dense,
    foreground_box,
    grid_of,
    isotropic_grid,
    overlap_share,
    same_grid,
    shift_affine,
    shrunk,
    symmetric,
    tight,
    to_ras,
)


def block_of(data, start=(0, 0, 0), shape=None):
    data = torch.as_tensor(data)
    return Block(data, start, Grid(shape or tuple(data.shape), np.eye(4)), "a")


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SAR", "RAS", "LAI"])
def test_orientation_moves_no_voxel_in_the_world(axes):
    volume = volume_of(blob(), centred((30, 28, 24), (1, 1.5, 2)))
    image = nib.Nifti1Image(volume.data.numpy(), volume.affine)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    )
    back = to_ras(tight(volume_of(np.array(turned.dataobj), turned.affine)))
    np.testing.assert_array_equal(dense(back), volume.data)
    np.testing.assert_allclose(back.grid.affine, volume.affine, atol=1e-9)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_tight_keeps_every_voxel_that_is_not_zero_and_one_around(order, dtype):
    data = np.zeros((12, 11, 10), dtype)
    data[3:6, 0:4, 5:10] = 1
    if dtype != np.uint8:
        data[8, 2, 6] = -1  # below zero is not air
    volume = volume_of(np.asarray(data, order=order))
    block = tight(volume)
    last = 8 if dtype == np.uint8 else 10
    assert block.box() == (slice(2, 7 if last == 8 else 10), slice(0, 5), slice(4, 10))
    np.testing.assert_array_equal(dense(block), data)
    assert block.data.untyped_storage().nbytes() == block.data.numel() * block.data.element_size()
    assert dense(tight(volume_of(np.zeros((3, 3, 3), dtype)))).sum() == 0


def test_boxes_above_a_limit():
    data = torch.zeros((8, 9, 10))
    data[2:5, 3:4, 1:9] = 5
    data[3, 3, 2] = 7
    for find in (box_above, shrunk):
        assert find(data, 0) == (slice(2, 5), slice(3, 4), slice(1, 9))
        assert find(data, 5) == (slice(3, 4), slice(3, 4), slice(2, 3))
        assert find(data, 7) is None
        assert find(data.permute(2, 0, 1), 5) == (slice(2, 3), slice(3, 4), slice(3, 4))


def test_cut_keeps_the_place_of_what_is_left():
    whole = block_of(np.arange(60).reshape(3, 4, 5), (2, 2, 2), (9, 9, 9))
    part = cut(whole, (slice(3, 9), slice(0, 4), slice(0, 9)))
    assert part.box() == (slice(3, 5), slice(2, 4), slice(2, 7))
    np.testing.assert_array_equal(dense(part)[3:, :4], dense(whole)[3:, :4])
    for far in ((slice(7, 9),) * 3, (slice(0, 1),) * 3):
        empty = cut(whole, far)
        assert empty.data.numel() == 0
        assert all(f.start <= b.start <= b.stop <= f.stop for f, b in zip(far, empty.box(), strict=True))


def test_symmetric_crop_keeps_the_centre():
    first, second = np.zeros((20, 21, 22)), np.zeros((20, 21, 22))
    first[3:10, 8:9, 2:20] = 1
    second[5:12, 8:10, 2:20] = 1
    blocks = [block_of(first), block_of(second)]
    everything = blocks[0].grid.box()
    box = foreground_box(blocks, [0, 0], everything)
    assert box == (slice(3, 12), slice(8, 10), slice(2, 20))
    assert symmetric(box, (20, 21, 22)) == (slice(3, 17), slice(8, 13), slice(2, 20))
    with pytest.raises(BadScanError, match=r"no voxel above zero in 2 x \(20, 21, 22\) voxels"):
        foreground_box(blocks, [1, 1], everything)


def test_zeros_around_a_block_count_as_foreground_above_a_negative_limit():
    block = block_of(np.full((2, 2, 2), -5.0), (1, 1, 1), (4, 4, 4))
    assert foreground_box([block], [-1], block.grid.box()) == block.grid.box()
    with pytest.raises(BadScanError, match="no voxel above zero"):
        foreground_box([block], [0], block.grid.box())


def test_affine_follows_the_crop():
    affine = oblique((30, 28, 24), (1, 1.2, 1.5))
    cropped = shift_affine(affine, (slice(3, 9), slice(5, 9), slice(7, 9)))
    np.testing.assert_allclose(cropped @ [0, 0, 0, 1], affine @ [3, 5, 7, 1])


def test_grids_that_agree_and_that_overlap():
    grid = Grid((30, 28, 24), centred((30, 28, 24)))
    assert same_grid(grid, Grid((30, 28, 24), grid.affine + 1e-5))
    assert not same_grid(grid, Grid((30, 28, 23), grid.affine))
    assert not same_grid(grid, isotropic_grid(grid_of(volume_of(blob(), centred((30, 28, 24), (1, 1, 2)))), 1.0))
    half = np.array(grid.affine)
    half[0, 3] += 15
    assert overlap_share(grid, Grid((30, 28, 24), half)) == pytest.approx(0.5)
