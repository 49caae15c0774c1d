"""A small picture of a case that finds copies of one person across datasets.

Copies differ in id, gzip bytes, intensity scale, skull stripping, and by a few millimetres and degrees. So the picture
is taken in world axes about the centre of the tissue (not in voxels, and not in the template grid, where a new mask
moves a centred crop), averages tissue only (so that a mask changes cells at its border alone), and holds ranks (so
that gain, offset and gamma do not matter). `tasks.duplicates` compares the pictures.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

EDGE = 16
"""Cells along each world axis."""
CELL_MM = 9.0
"""Distance of cells: 144 mm cover the brain but for its poles."""
POOLED_MM = 3.0
"""Largest voxels on which the tissue is averaged: fine enough for the cells, and quick."""
SMOOTH_MM = 3.0
"""Standard deviation of the average: finer detail would not survive another registration."""
COVERED = 0.8
"""Share of tissue in the average below which a cell is empty."""
TISSUE = 1e-3
DECIMALS = 3


def fingerprint(channel: np.ndarray, affine: np.ndarray) -> tuple[float, ...]:
    """Return 16^3 normal scores of the tissue around its centre, RAS order; cells without enough tissue are 0.

    channel: (x, y, z) intensities of 0..1; affine: (4, 4) voxel -> RAS+ mm. All zeros when there is too little tissue.
    """
    from scipy import ndimage, stats  # here and below: who only compares fingerprints does not wait for them

    factor = max(1, int(POOLED_MM / float(np.linalg.norm(affine[:3, 0])) + 0.01))
    filled, sums = _pooled(channel, factor)
    inside = ndimage.binary_erosion(ndimage.binary_fill_holes(filled > 0.5))
    if not inside.any():
        return (0.0,) * EDGE**3
    grid = affine @ np.diag([factor, factor, factor, 1.0])
    grid[:3, 3] = affine[:3, :3] @ np.full(3, (factor - 1) / 2) + affine[:3, 3]
    values = np.where(inside, sums / np.maximum(filled, TISSUE), 0).astype(np.float32)
    points = _cells(grid, np.array(ndimage.center_of_mass(inside)))
    sigma = SMOOTH_MM / np.linalg.norm(grid[:3, :3], axis=0)
    weight = _smoothed_at(inside.astype(np.float32), sigma, points)
    found = weight > COVERED
    out = np.zeros(EDGE**3)
    if found.any():
        ranks = stats.rankdata(_smoothed_at(values, sigma, points)[found] / weight[found])
        out[found] = stats.norm.ppf((ranks - 0.5) / len(ranks))
    return tuple(np.round(out, DECIMALS).tolist())


def fingerprints_of(cases: pa.Table) -> list[np.ndarray]:
    """Return the fingerprint of every line of cases.parquet as float32, (EDGE^3,) or empty, without copying."""
    column = cases.column("fingerprint").combine_chunks()
    values, ends = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[begin:end] for begin, end in pairwise(ends)]


def _pooled(channel: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of tissue and the mean intensity in cubes of factor^3 voxels; beyond the ends all is zero."""
    import torch

    volume = torch.from_numpy(np.ascontiguousarray(channel)).float()[None]
    missing = [side for n in reversed(channel.shape) for side in (0, -n % factor)]
    volume = torch.nn.functional.pad(volume, missing)
    shares = [torch.nn.functional.avg_pool3d(part, factor)[0].numpy() for part in ((volume > TISSUE).float(), volume)]
    return shares[0], shares[1]


def _cells(grid: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return the voxel coordinates of the cells, (3, EDGE^3): a cube in world axes about a voxel."""
    steps = (np.arange(EDGE) - (EDGE - 1) / 2) * CELL_MM
    world = np.stack(np.meshgrid(steps, steps, steps, indexing="ij")).reshape(3, -1)
    return np.linalg.solve(grid[:3, :3], world) + centre[:, None]


def _smoothed_at(volume: np.ndarray, sigma: np.ndarray, points: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return ndimage.map_coordinates(ndimage.gaussian_filter(volume, sigma, mode="constant"), points, order=1)
