"""Interpolation of one image on another grid: trilinear for intensities, nearest for labels.

Most grids differ by a scale and a shift per axis only: then three passes along one axis each do it, as products with
a small matrix of weights that runs at the speed of the machine. Oblique grids go through torch's `grid_sample`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from models.records import Reason
from models.stopwatch import step
from tasks.affines import BadScanError
from tasks.memory_order import axes_by_stride
from tasks.volumes import AFFINE_TOLERANCE, Block, Box, Grid, centre_mm, overlap_share, same_grid, voxel_map

EDGE = 1e-4
"""Voxels by which a sample may lie outside the field of view, for rounding."""
PIECE = 64
"""Output planes of one product: few enough that the matrix of weights holds few zeros."""
SLAB = 16
"""Output planes that `grid_sample` computes at once: bounds the memory of the sampling points."""


@step("resample")
def resample(block: Block, target: Grid, *, nearest: bool = False) -> Block:
    """Interpolate an image at the voxel centres of a grid, float32; trilinear, or nearest for labels.

    block: as `tight` makes it. Only the target voxels that it can reach are computed, all others are 0. No
    anti-aliasing when voxels grow, as MONAI. Voxels outside the source's field of view are 0; in the half voxel
    between the outermost centres and the border the outermost value holds. Grids that are equal or shifted by whole
    voxels are not interpolated and keep their type. Raises BadScanError when the image does not reach the target.
    """
    source = block.grid
    if same_grid(source, target):
        return replace(block, grid=target)
    if overlap_share(source, target) == 0:
        raise _no_overlap(block, target, "field of view does not reach")
    matrix = voxel_map(source, target)
    matrix[:3, 3] -= block.start
    skew = np.abs(matrix[:3, :3] - np.diag(np.diag(matrix[:3, :3]))) @ np.array(target.shape)
    if skew.max() < AFFINE_TOLERANCE:
        return _along_axes(block, matrix, target, nearest)
    return _oblique(block, matrix, target, nearest)


def _along_axes(block: Block, matrix: np.ndarray, target: Grid, nearest: bool) -> Block:
    starts, samples = [], []
    for axis in range(3):
        at = matrix[axis, axis] * np.arange(target.shape[axis]) + matrix[axis, 3]
        if np.abs(at - np.rint(at)).max() < AFFINE_TOLERANCE:
            at = np.rint(at)
        reached = np.flatnonzero((at > -1) & (at < block.data.shape[axis]) & _inside(block, axis, at))
        if not reached.size:
            raise _no_overlap(block, target, "nothing of it reaches")
        starts.append(int(reached[0]))
        samples.append(at[reached])
    data = block.data
    # Axes that lose voxels first: the later passes then have less to do.
    for axis in sorted(range(3), key=lambda axis: len(samples[axis]) / data.shape[axis]):
        data = _pick(data, axis, samples[axis]) if nearest else _interpolate(data, axis, samples[axis])
    return Block(data, (starts[0], starts[1], starts[2]), target, block.name)


def _inside(block: Block, axis: int, at: np.ndarray) -> np.ndarray:
    """Say which block coordinates lie in the source's field of view."""
    place = at + block.start[axis]
    return (place >= -0.5 - EDGE) & (place <= block.grid.shape[axis] - 0.5 + EDGE)


def _pick(data: torch.Tensor, axis: int, at: np.ndarray) -> torch.Tensor:
    # Half-way rounds up: `rint` would depend on where the block begins.
    index = np.clip(np.floor(at + 0.5), 0, data.shape[axis] - 1).astype(np.int64)
    return data.index_select(axis, torch.from_numpy(index).to(data.device))


def _interpolate(data: torch.Tensor, axis: int, at: np.ndarray) -> torch.Tensor:
    """Interpolate linearly along one axis at rising or falling coordinates; the outermost values hold beyond."""
    length = data.shape[axis]
    if (at == np.rint(at)).all() and (np.diff(at) == 1).all() and at[0] >= 0 and at[-1] < length:
        return data.narrow(axis, int(at[0]), len(at))
    at = np.clip(at, 0, length - 1)
    low = np.clip(np.floor(at).astype(np.int64), 0, length - 2)
    order = axes_by_stride(data)
    place = order.index(axis)
    memory = data.float().permute(order)  # the rows of memory, so that no product has to copy
    shape = [*memory.shape]
    shape[place] = len(at)
    out = memory.new_empty(shape)
    for begin in range(0, len(at), PIECE):
        part = slice(begin, min(begin + PIECE, len(at)))
        first, last = int(low[part].min()), min(int(low[part].max()) + 2, length)
        weights = _weights(at[part] - first, low[part] - first, last - first).to(memory.device)
        _apply(weights, memory.narrow(place, first, last - first), out.narrow(place, begin, len(weights)), place)
    return out.permute([order.index(axis) for axis in range(3)])


def _weights(at: np.ndarray, low: np.ndarray, length: int) -> torch.Tensor:
    """Return the (samples, length) float32 matrix that interpolates linearly between `low` and its successor."""
    weights = np.zeros((len(at), length), dtype=np.float32)
    rows = np.arange(len(at))
    upper = (at - low).astype(np.float32)
    weights[rows, np.minimum(low + 1, length - 1)] = upper
    weights[rows, low] += 1 - upper
    return torch.from_numpy(weights)


def _apply(weights: torch.Tensor, values: torch.Tensor, out: torch.Tensor, place: int) -> None:
    """Multiply the axis `place` of a (slow, middle, fast) tensor by a matrix."""
    if place == 0:
        torch.matmul(weights, values.flatten(1), out=out.view(len(weights), -1))
    elif place == 1:
        out.copy_(torch.matmul(weights, values))
    else:
        out.copy_(torch.matmul(values, weights.T))


def _oblique(block: Block, matrix: np.ndarray, target: Grid, nearest: bool) -> Block:
    box = _reach(block, matrix, target)
    if any(s.stop <= s.start for s in box):
        raise _no_overlap(block, target, "nothing of it reaches")
    edges = np.array(block.data.shape, dtype=np.float64)
    # torch counts from -1 at the first voxel centre to 1 at the last (align_corners).
    linear = matrix[:3, :3] * (2 / (edges - 1))[:, None]
    offset = (matrix[:3, 3] + matrix[:3, :3] @ [s.start for s in box]) * (2 / (edges - 1)) - 1
    field = np.array(
        [(-0.5 - EDGE - s, n - 0.5 + EDGE - s) for s, n in zip(block.start, block.grid.shape, strict=True)]
    )
    low, high = (torch.tensor(ends * (2 / (edges - 1)) - 1, dtype=torch.float32) for ends in field.T)
    volume = block.data.float().contiguous()[None, None]
    size = [s.stop - s.start for s in box]
    out = volume.new_empty(size)
    for begin in range(0, size[0], SLAB):
        planes = range(begin, min(begin + SLAB, size[0]))
        points = _points(linear, offset, planes, size).to(volume.device)
        sampled = torch.nn.functional.grid_sample(
            volume,
            points.flip(-1)[None],  # torch names the last axis first
            mode="nearest" if nearest else "bilinear",
            padding_mode="border",
            align_corners=True,
        )[0, 0]
        inside = ((points >= low.to(points.device)) & (points <= high.to(points.device))).all(dim=-1)
        out[planes.start : planes.stop] = sampled * inside
    return Block(out, (box[0].start, box[1].start, box[2].start), target, block.name)


def _reach(block: Block, matrix: np.ndarray, target: Grid) -> Box:
    """Return the box of target voxels to which the block can give a value: those less than a voxel away from it."""
    ends = [(-1.0, float(n)) for n in block.data.shape]
    corners = np.array(np.meshgrid(*ends, (1.0,), indexing="ij")).reshape(4, -1)
    reached = np.linalg.solve(matrix, corners)[:3]
    low, high = np.floor(reached.min(axis=1)).astype(int), np.ceil(reached.max(axis=1)).astype(int) + 1
    x, y, z = (slice(max(0, int(a)), min(n, int(b))) for a, b, n in zip(low, high, target.shape, strict=True))
    return x, y, z


def _points(linear: np.ndarray, offset: np.ndarray, planes: range, size: list[int]) -> torch.Tensor:
    """Return the normalised source coordinates of some output planes, (planes, Y, Z, 3) float32."""
    x, y, z = (torch.arange(r.start, r.stop, dtype=torch.float64) for r in (planes, range(size[1]), range(size[2])))
    columns = [torch.from_numpy(np.ascontiguousarray(linear[:, axis])) for axis in range(3)]
    in_plane = (y[:, None, None] * columns[1] + z[None, :, None] * columns[2]).float()
    along = (x[:, None] * columns[0] + torch.from_numpy(offset)).float()
    return along[:, None, None, :] + in_plane[None]


def _no_overlap(block: Block, target: Grid, what: str) -> BadScanError:
    return BadScanError(
        Reason.NO_OVERLAP,
        f"{block.name}: centre at {centre_mm(block.grid)} mm, {what} the grid of the case "
        f"with centre {centre_mm(target)} mm",
    )
