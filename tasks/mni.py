"""Whether a scan lies in MNI space, as far as its grid and its tissue can tell."""

from __future__ import annotations

import numpy as np
import torch

from models.records import Reason
from tasks.affines import BadScanError
from tasks.volumes import Block, Grid, overlap_share

BRAIN_MM = ((-72.0, 72.0), (-107.0, 73.0), (-72.0, 82.0))
"""Ends of the MNI152 brain along x, y, z (mask of the 2009a symmetric template, as nilearn ships it)."""
BRAIN_CENTRE_MM = (0.0, -22.0, 9.0)
COVERED_MIN = 0.9
"""Smallest share of that box which the field of view must cover."""
TURN_MAX = 2.0
"""Degrees: whoever resamples into MNI space writes axes along the world's."""
SHIFT_MAX_MM = 25.0
"""Distance of the centre of the tissue from the brain's; a head with its neck has it some 15 mm lower."""


def require_mni(block: Block) -> Block:
    """Return the image unchanged; raises BadScanError when it clearly does not lie in MNI space.

    block: RAS-nearest axes. Three signs: axes turned against the world's, a field of view that leaves out a part of
    the MNI152 brain, tissue that is centred elsewhere. An image that was shifted into place by hand passes.
    """
    turned, shift = turn_of(block.grid.affine), _tissue_shift(block)
    low, high = np.array(BRAIN_MM).T
    box = np.eye(4)
    box[:3, 3] = low
    covered = overlap_share(
        block.grid, Grid((int(high[0] - low[0]), int(high[1] - low[1]), int(high[2] - low[2])), box)
    )
    if turned > TURN_MAX:
        raise _refused(block, f"axes are turned by {turned:.1f} degrees, at most {TURN_MAX:g}")
    if covered < COVERED_MIN:
        raise _refused(block, f"field of view covers {covered:.0%} of the MNI152 brain, at least {COVERED_MIN:.0%}")
    if shift > SHIFT_MAX_MM:
        raise _refused(
            block, f"tissue is centred {shift:.0f} mm from the MNI152 brain's centre, at most {SHIFT_MAX_MM:g}"
        )
    return block


def turn_of(affine: np.ndarray) -> float:
    """Return by how many degrees the axes of a grid are turned against the nearest of the world's, at most."""
    axes = np.abs(affine[:3, :3]) / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(axes.max(axis=0), -1, 1))).max())


def _tissue_shift(block: Block) -> float:
    """Return the distance in mm of the centre of the bright half of the image from the centre of the brain."""
    data = block.data.float()
    bright = (data > data[data > 0].mean() / 2).float()
    total = bright.sum()
    place = np.ones(4)
    for axis in range(3):
        profile = bright.sum(dim=[other for other in range(3) if other != axis])
        index = torch.arange(len(profile), dtype=torch.float32, device=profile.device)
        place[axis] = float((profile * index).sum() / total) + block.start[axis]
    return float(np.linalg.norm((block.grid.affine @ place)[:3] - BRAIN_CENTRE_MM))


def _refused(block: Block, what: str) -> BadScanError:
    return BadScanError(
        Reason.NOT_MNI,
        f"{block.name}: {what}; register it first, or use a spec with registration 'rigid' or 'affine'",
    )
