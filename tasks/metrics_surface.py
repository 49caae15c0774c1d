"""How far the surfaces of two masks are apart: HD95, its pooled form, and the normalised surface Dice.

A surface voxel is a voxel of the mask with one of its six neighbours outside it; beyond the volume there is nothing.
Each surface voxel of one mask has the distance in mm to the nearest surface voxel of the other, between voxel centres.
Both directions together decide all three scores, so they are computed once. Definitions are those of MONAI 1.6
(`compute_hausdorff_distance` with percentile 95, `compute_surface_dice` without subvoxels), with which tests compare
random masks. The pooled form takes one percentile over both directions, as MedPy's `hd95` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
NEAR = 2.3
"""Steps between voxels that are looked up before a tree is asked, in smallest voxel edges: those up to (2, 1, 0)."""
LEAF = 32
"""Points in a leaf of the tree: larger than SciPy's default, since each tree answers one batch of queries only."""


@dataclass(frozen=True)
class Surfaces:
    """Distances in mm between the surfaces of a predicted and a true mask; neither mask is empty."""

    to_target: Floats
    """Of each surface voxel of the prediction to the surface of the target."""
    to_prediction: Floats
    """Of each surface voxel of the target to the surface of the prediction."""

    @property
    def hd95(self) -> float:
        """The larger of the two directed 95th percentiles, mm."""
        return float(max(np.percentile(self.to_target, 95), np.percentile(self.to_prediction, 95)))

    @property
    def hd95_pooled(self) -> float:
        """The 95th percentile over both directions together, mm."""
        return float(np.percentile(np.concatenate([self.to_target, self.to_prediction]), 95))

    def surface_dice(self, tolerance_mm: float) -> float:
        """Return the share of all surface voxels within the tolerance of the other surface, 0..1.

        Source: Nikolov et al., arXiv 1809.04430; counted in voxels, not in areas, as MONAI does by default.
        """
        within = int((self.to_target <= tolerance_mm).sum()) + int((self.to_prediction <= tolerance_mm).sum())
        return within / (len(self.to_target) + len(self.to_prediction))


def union_box(masks: Sequence[Mask], margin: int = 0) -> tuple[slice, ...] | None:
    """Return the box of all true voxels of masks of one shape, with a margin inside the volume; None without any."""
    boxes = [box for box in (_box(mask) for mask in masks) if box]
    if not boxes:
        return None
    return tuple(
        slice(max(min(s.start for s in axis) - margin, 0), min(max(s.stop for s in axis) + margin, size))
        for axis, size in zip(zip(*boxes, strict=True), masks[0].shape, strict=True)
    )


def _box(mask: Mask) -> tuple[slice, ...] | None:
    # Axis by axis, each on what is left of the last: nearly all of a volume is looked at once only.
    found: list[slice] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hit = np.flatnonzero(mask[tuple(found)].any(axis=others))
        if not hit.size:
            return None
        found.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(found)


def surface(mask: Mask) -> Mask:
    """Return the voxels of a mask (X, Y, Z) with at least one of their six neighbours outside it.

    Equals `mask ^ scipy.ndimage.binary_erosion(mask)`, in a tenth of its time.
    """
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1, 1:-1] & padded[2:, 1:-1, 1:-1]
    inside &= padded[1:-1, :-2, 1:-1]
    inside &= padded[1:-1, 2:, 1:-1]
    inside &= padded[1:-1, 1:-1, :-2]
    inside &= padded[1:-1, 1:-1, 2:]
    return mask & ~inside


def surface_distances(prediction: Mask, target: Mask, spacing_mm: Sequence[float]) -> Surfaces:
    """Return the distances between the surfaces of two masks (X, Y, Z); raises ValueError when one of them is empty.

    spacing_mm: edge of a voxel along each axis.
    """
    box = union_box([prediction, target])
    if box is None or not prediction[box].any() or not target[box].any():
        raise ValueError("surface distances need two masks with a voxel each; an empty mask has no surface")
    first, second = surface(prediction[box]), surface(target[box])
    return Surfaces(_nearest(first, second, spacing_mm), _nearest(second, first, spacing_mm))


def _nearest(edges: Mask, others: Mask, spacing_mm: Sequence[float]) -> Floats:
    """Return the distance of each true voxel of `edges` to the nearest of `others`, in mm, in no stated order.

    Close ones are looked up among the neighbours, nearest first, which settles most voxels of a good prediction; a
    KD-tree finds the rest.
    """
    from scipy.spatial import cKDTree

    steps, lengths = _neighbours(tuple(spacing_mm))
    reach = int(np.abs(steps).max())
    table = np.pad(others, reach)
    strides = np.array([table.shape[1] * table.shape[2], table.shape[2], 1])
    flat = table.ravel()
    left = np.flatnonzero(np.pad(edges, reach))
    found = []
    for step, length in zip(steps @ strides, lengths, strict=True):
        hit = flat[left + step]
        found.append(np.full(int(hit.sum()), length))
        left = left[~hit]
    if left.size:
        scale = np.asarray(spacing_mm, dtype=np.float64)
        tree = cKDTree(_coordinates(np.flatnonzero(table), table.shape) * scale, leafsize=LEAF)
        found.append(np.asarray(tree.query(_coordinates(left, table.shape) * scale)[0]))
    return np.concatenate(found)


def _coordinates(flat: npt.NDArray[np.intp], shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    return np.stack(np.unravel_index(flat, shape), axis=1)


@cache
def _neighbours(spacing_mm: tuple[float, ...]) -> tuple[npt.NDArray[np.intp], Floats]:
    """Return all steps (n, 3) between voxels that are at most NEAR smallest edges long, and their lengths in mm."""
    limit = NEAR * min(spacing_mm)
    axes = [np.arange(-int(limit / edge), int(limit / edge) + 1) for edge in spacing_mm]
    steps = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    lengths = np.linalg.norm(steps * np.asarray(spacing_mm), axis=1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= limit]
    return steps[order], lengths[order]
