"""Grids, boxes and crops: where voxels lie, and which of them have to be touched at all.

Coordinates: a voxel index is the centre of its voxel; an affine maps voxel indices to RAS+ mm.
Most of a head scan is air. Every step therefore works on a `Block`: the box of a grid outside which all voxels are 0.
Steps run where their tensor is, CPU or CUDA. Source of the order of frame `image`: BrainMVP's input pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
import torch

from models.records import Reason
from models.spec import PreprocessSpec
from tasks.affines import BadScanError
from tasks.memory_order import axes_by_stride, extremes
from tasks.nifti import Volume

Box = tuple[slice, slice, slice]
Shape3 = tuple[int, int, int]
AFFINE_TOLERANCE = 1e-3
"""Grids that differ by less are one grid (MONAI's AFFINE_TOL)."""


@dataclass(frozen=True)
class Grid:
    """A voxel grid in the world."""

    shape: Shape3
    affine: np.ndarray
    """(4, 4) float64: voxel -> RAS+ mm."""

    def corners(self) -> np.ndarray:
        """Return the homogeneous voxel coordinates of the eight outer corners, (4, 8)."""
        ends = [(-0.5, n - 0.5) for n in self.shape]
        return np.array(np.meshgrid(*ends, (1.0,), indexing="ij")).reshape(4, -1)

    def box(self) -> Box:
        """Return the box of all voxels."""
        x, y, z = self.shape
        return slice(0, x), slice(0, y), slice(0, z)


@dataclass(frozen=True)
class Block:
    """The part of an image that may differ from zero; every other voxel of its grid is zero."""

    data: torch.Tensor
    """(x, y, z), any memory order."""
    start: Shape3
    """Index of its first voxel in the grid."""
    grid: Grid
    name: str

    def box(self) -> Box:
        """Return where the block lies in its grid."""
        return _box(self.start, tuple(self.data.shape))


def grid_of(volume: Volume) -> Grid:
    """Return the grid on which a volume was read."""
    return Grid(volume.shape, volume.affine)


def tight(volume: Volume, device: str = "cpu") -> Block:
    """Return the box of voxels that are not zero, copied to a device, with one more voxel around it inside the grid.

    The margin is for interpolation: between the last voxel of tissue and the first of air. The copy lets go of the
    memory of the whole volume. An image without any such voxel gives a block of its first voxels.
    """
    grid, data = grid_of(volume), volume.data
    found = box_above(data, 0.0)
    if extremes(data)[0] < 0:
        found = _union([box for box in (found, box_above(-data.float(), 0.0)) if box])
    around = found or _box((0, 0, 0), (1, 1, 1))
    x, y, z = (slice(max(s.start - 1, 0), min(s.stop + 1, n)) for s, n in zip(around, grid.shape, strict=True))
    part = data[x, y, z]
    # Keeps the order of the axes in memory, which `contiguous` would not.
    dense = torch.empty_like(part, device=device).copy_(part)
    return Block(dense, (x.start, y.start, z.start), grid, volume.name)


def to_ras(block: Block) -> Block:
    """Flip and permute axes so that they point nearest to right, anterior, superior; no interpolation."""
    shape, affine = block.grid.shape, block.grid.affine
    orientation = nib.orientations.io_orientation(affine)
    turned = [axis for axis, (_, sign) in enumerate(orientation) if sign < 0]
    order = [int(axis) for axis in np.argsort(orientation[:, 0])]
    data = block.data.flip(turned) if turned else block.data
    starts = [
        n - begin - size if axis in turned else begin
        for axis, (n, begin, size) in enumerate(zip(shape, block.start, data.shape, strict=True))
    ]
    x, y, z = order
    grid = Grid((shape[x], shape[y], shape[z]), affine @ nib.orientations.inv_ornt_aff(orientation, shape))
    return Block(data.permute(order), (starts[x], starts[y], starts[z]), grid, block.name)


def isotropic_grid(grid: Grid, spacing_mm: float) -> Grid:
    """Return the grid of cubic voxels over the same field of view: voxel 0 and the axes stay where they are.

    As MONAI's Spacing (bilinear, diagonal=False, scale_extent=False): n' = round((n - 1) old / new + 1); shear is
    removed by the Cholesky factor of the voxel axes.
    """
    axes = grid.affine[:3, :3]
    zoom = np.linalg.cholesky(axes.T @ axes).T
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.linalg.inv(zoom) @ np.diag(np.sign(np.diag(zoom)) * spacing_mm)
    affine[:3, 3] = grid.affine[:3, 3]
    edges_mm = np.linalg.norm(axes, axis=0)
    x, y, z = (round((n - 1) * float(mm) / spacing_mm + 1) for n, mm in zip(grid.shape, edges_mm, strict=True))
    return Grid((x, y, z), affine)


def dense(block: Block) -> np.ndarray:
    """Return all voxels of the grid of a block, (x, y, z) of its type: the block, and zeros around it."""
    data = block.data.cpu().numpy()
    out = np.zeros(block.grid.shape, data.dtype)
    out[block.box()] = data
    return out


def template_grid(spec: PreprocessSpec) -> Grid:
    """Return the fixed grid of frame `template`."""
    return Grid(spec.grid, np.asarray(spec.grid_affine, dtype=np.float64))


def same_grid(a: Grid, b: Grid) -> bool:
    """Say whether two grids agree in shape and place every corner within a thousandth of an edge of each other."""
    return a.shape == b.shape and largest_shift(a, b) < AFFINE_TOLERANCE * max(a.shape)


def largest_shift(a: Grid, b: Grid) -> float:
    """Return how far apart two grids of one shape place the same corner, in voxels of b."""
    return float(np.linalg.norm(((voxel_map(b, a) - np.eye(4)) @ a.corners())[:3], axis=0).max())


def voxel_map(source: Grid, target: Grid) -> np.ndarray:
    """Return the (4, 4) matrix from voxels of the target to voxels of the source."""
    return np.linalg.solve(source.affine, target.affine)


def overlap_share(source: Grid, target: Grid) -> float:
    """Return the share of the target's field of view that the source's bounding box covers, 0..1."""
    reached = (voxel_map(target, source) @ source.corners())[:3]
    low = np.maximum(reached.min(axis=1), -0.5)
    high = np.minimum(reached.max(axis=1), np.array(target.shape) - 0.5)
    return float(np.prod(np.maximum(high - low, 0) / np.array(target.shape)))


def box_above(data: torch.Tensor, limit: float) -> Box | None:
    """Return the box of voxels above a limit, or None without any."""
    order = axes_by_stride(data)
    rows = data.permute(order)
    # The slowest axis goes first: the plane that is left is small, in whatever order it is read.
    plane = rows.amax(0)
    highest = (rows.amax((1, 2)), plane.amax(1), plane.amax(0))
    slices = []
    for axis in range(3):
        hit = torch.nonzero(highest[order.index(axis)] > limit).flatten()
        if not hit.numel():
            return None
        slices.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return slices[0], slices[1], slices[2]


def shrunk(data: torch.Tensor, limit: float) -> Box | None:
    """Return the box of voxels above a limit, or None without any; quick where that is nearly the whole tensor."""
    ends = [[0, n] for n in data.shape]
    for axis in range(3):
        for side, step in ((0, 1), (1, -1)):
            while ends[axis][0] < ends[axis][1] and not _plane_above(data, ends, axis, side, limit):
                ends[axis][side] += step
        if ends[axis][0] == ends[axis][1]:
            return None
    x, y, z = (slice(*end) for end in ends)
    return x, y, z


def _plane_above(data: torch.Tensor, ends: list[list[int]], axis: int, side: int, limit: float) -> bool:
    others = [slice(*end) for end in ends]
    others[axis] = slice(ends[axis][side] - side, ends[axis][side] - side + 1)
    plane = data[others[0], others[1], others[2]]
    return plane.numel() > 0 and float(plane.max()) > limit


def foreground_box(blocks: Sequence[Block], above: Sequence[float], region: Box) -> Box:
    """Return the box of voxels above a limit in any image, in indices of the common grid; above: a limit per image.

    The blocks lie inside the region. Raises BadScanError if no voxel is above.
    """
    found = []
    for block, limit in zip(blocks, above, strict=True):
        if limit < 0 and block.box() != region:
            return region  # the zeros around the block are above the limit
        if box := shrunk(block.data, limit):
            found.append(_moved(box, block.start))
    union = _union(found)
    if union is None:
        shape = tuple(s.stop - s.start for s in region)
        raise BadScanError(Reason.EMPTY, f"no voxel above zero in {len(blocks)} x {shape} voxels")
    return union


def symmetric(box: Box, shape: Shape3) -> Box:
    """Widen a box until it is symmetric about the centre of the volume, so that the centre stays fixed."""
    margins = [min(s.start, n - s.stop) for s, n in zip(box, shape, strict=True)]
    x, y, z = (slice(m, n - m) for m, n in zip(margins, shape, strict=True))
    return x, y, z


def cut(block: Block, box: Box) -> Block:
    """Return the part of a block inside a box of its grid, without a copy; may be empty."""
    starts, parts = [], []
    for outer, inner in zip(box, block.box(), strict=True):
        begin = min(max(outer.start, inner.start), outer.stop)
        end = max(begin, min(outer.stop, inner.stop))
        starts.append(begin)
        parts.append(slice(min(begin - inner.start, inner.stop - inner.start), end - inner.start))
    return replace(block, data=block.data[parts[0], parts[1], parts[2]], start=(starts[0], starts[1], starts[2]))


def shift_affine(affine: np.ndarray, box: Box) -> np.ndarray:
    """Return the affine of the voxels inside a box."""
    out = np.array(affine, dtype=np.float64)
    out[:3, 3] = affine[:3, :3] @ np.array([s.start for s in box], dtype=np.float64) + affine[:3, 3]
    return out


def size_of(box: Box) -> Shape3:
    """Return the voxels of a box by axis."""
    x, y, z = (s.stop - s.start for s in box)
    return x, y, z


def centre_mm(grid: Grid) -> tuple[float, ...]:
    """Return the world coordinates of the middle of a grid, in mm, rounded for messages."""
    centre = grid.affine @ np.array([*((n - 1) / 2 for n in grid.shape), 1.0])
    return tuple(round(float(v), 1) for v in centre[:3])


def _box(start: Sequence[int], shape: Sequence[int]) -> Box:
    x, y, z = (slice(int(begin), int(begin + n)) for begin, n in zip(start, shape, strict=True))
    return x, y, z


def _moved(box: Box, start: Shape3) -> Box:
    x, y, z = (slice(s.start + by, s.stop + by) for s, by in zip(box, start, strict=True))
    return x, y, z


def _union(boxes: Sequence[Box]) -> Box | None:
    if not boxes:
        return None
    x, y, z = (slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))
    return x, y, z
