"""Block masks keep an exact number of blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.masking import block_grid, draw_mask, kept_blocks, to_voxels


@pytest.mark.parametrize(
    ("blocks", "rate", "kept"), [(1728, 0.875, 216), (1728, 0.8, 345), (64, 0.875, 8), (1000, 0.9, 100), (8, 0.95, 0)]
)
def test_kept_blocks_are_floored(blocks: int, rate: float, kept: int) -> None:
    assert kept_blocks(blocks, rate) == kept


@pytest.mark.parametrize(("rate", "kept"), [(0.875, 216), (0.8, 345)])
def test_a_mask_of_the_paper_has_1728_blocks(rate: float, kept: int) -> None:
    mask = draw_mask(block_grid((96, 96, 96), 8), rate, np.random.default_rng(0))
    assert mask.shape == (12, 12, 12)
    assert (~mask).sum() == kept


def test_masks_follow_their_generator() -> None:
    first, second, other = (draw_mask((4, 4, 4), 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_every_block_is_replaced_equally_often() -> None:
    rng = np.random.default_rng(0)
    share = np.mean([draw_mask((2, 3, 4), 0.5, rng) for _ in range(2000)], axis=0)
    assert np.abs(share - 0.5).max() < 0.06


def test_blocks_become_voxels() -> None:
    mask = torch.tensor([[[True, False]]])
    voxels = to_voxels(mask, 4)
    assert voxels.shape == (4, 4, 8)
    assert voxels[:, :, :4].all()
    assert not voxels[:, :, 4:].any()


def test_crop_must_be_made_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match=r"multiples of mask_block: got \(32, 48, 32\) and 12"):
        block_grid((32, 48, 32), 12)
