"""Block masks of masked image modelling: cubes of voxels, an exact number of them kept.

Source: BrainMVP's reference code: 8^3 blocks, floor(n (1 - rate)) random ones kept (216 of 1728 at 0.875).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def block_grid(crop: Sequence[int], block: int) -> tuple[int, ...]:
    """Return the number of blocks along each axis; raises ValueError when the crop is not made of whole blocks."""
    if any(edge % block for edge in crop):
        raise ValueError(f"crop edges must be multiples of mask_block: got {tuple(crop)} and {block}; change one")
    return tuple(edge // block for edge in crop)


def kept_blocks(blocks: int, rate: float) -> int:
    """Return floor(blocks (1 - rate)); the small term undoes rounding of 1 - rate (1000 x 0.1 is 100, not 99)."""
    return math.floor(blocks * (1.0 - rate) + 1e-9)


def check_kept(crop: Sequence[int], block: int, rate: float) -> None:
    """Raise ValueError when a mask would leave no block of a crop, or the crop is not made of whole blocks."""
    blocks = math.prod(block_grid(crop, block))
    if not kept_blocks(blocks, rate):
        raise ValueError(
            f"mask_rate {rate:g} keeps none of the {blocks} blocks of a crop {tuple(crop)}; "
            "lower it, take a smaller mask_block or a larger crop"
        )


def draw_mask(grid: Sequence[int], rate: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a boolean array of shape `grid`, True where a block is replaced."""
    blocks = math.prod(grid)
    mask = np.ones(blocks, dtype=bool)
    mask[rng.permutation(blocks)[: kept_blocks(blocks, rate)]] = False
    return mask.reshape(tuple(grid))


def to_voxels(mask: Tensor, block: int) -> Tensor:
    """Enlarge the last three axes of a block mask to voxels."""
    for axis in (-3, -2, -1):
        mask = mask.repeat_interleave(block, dim=axis)
    return mask
