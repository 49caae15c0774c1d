"""What quality control wants to know of the voxels of one scan: drift of its intensities, flat ends, and what is cut.

All look at a lattice of the voxels, so they cost about a millisecond.
"""

from __future__ import annotations

import numpy as np
import torch

from tasks.resampling import EDGE
from tasks.volumes import Block, Grid, voxel_map

TISSUE = 0.1
"""Voxels above this share of the intensity range count as tissue."""
LATTICE = 24
"""Points of the lattice along an axis, about."""
MIN_POINTS = 100
"""Points of tissue that are enough for a fit."""
FACES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


def base_of(bounds: tuple[float, float]) -> float:
    """Return how far above 0 the intensity of the file lies that becomes 0, as a share of the range; at least 0.

    bounds: intensities of the file that became 0 and 1. Added to scaled intensities it makes ratios those of the file.
    """
    return max(0.0, bounds[0]) / (bounds[1] - bounds[0])


def drift_measure(channel: np.ndarray, base: float, modality: str) -> dict[str, float]:
    """Return the entry drift_* of a receipt's `qc`; empty without tissue."""
    found = drift(channel, base)
    return {} if found is None else {f"drift_{modality}": round(found, 4)}


def end_measures(source: torch.Tensor, bounds: tuple[float, float], modality: str) -> dict[str, float | str]:
    """Return the entries flat_end_* and flat_face_* of a receipt's `qc`; empty without tissue."""
    share, face = flat_end(source, _tissue_level(bounds))
    return {f"flat_end_{modality}": round(share, 4), f"flat_face_{modality}": face} if face else {}


def grid_measure(source: Block, target: Grid, bounds: tuple[float, float], modality: str) -> dict[str, float]:
    """Return the entry outside_grid_* of a receipt's `qc`; empty without tissue."""
    found = outside_share(source, target, _tissue_level(bounds))
    return {} if found is None else {f"outside_grid_{modality}": round(found, 4)}


def _tissue_level(bounds: tuple[float, float]) -> float:
    """Return the intensity of the file above which a voxel counts as tissue."""
    return max(0.0, bounds[0] + TISSUE * (bounds[1] - bounds[0]))


def drift(channel: np.ndarray, base: float = 0.0) -> float | None:
    """Return the spread of the slow drift of the tissue's intensities as a share of their mean; None without tissue.

    channel: (x, y, z) float16 of 0..1, as it goes into the store; base: see base_of.

    The drift is the least-squares fit of 1, x, y, z, x^2, y^2, z^2 to the tissue's intensities; a polynomial of low
    order is a common model of the bias field (Styner et al. 2000, IEEE TMI 19:153-165). Anatomy alone gives a part of
    it, about the same in all subjects: the number means something beside those of other scans of its kind.
    """
    points = channel[tuple(slice(None, None, step) for step in _steps(channel.shape))].astype(np.float32)
    places = np.nonzero(points > TISSUE)
    if len(places[0]) < MIN_POINTS:
        return None
    values = points[places].astype(np.float64)
    axes = [2 * place / max(length - 1, 1) - 1 for place, length in zip(places, points.shape, strict=True)]
    design = np.stack([np.ones_like(values), *axes, *(axis**2 for axis in axes)], axis=1)
    weights = np.linalg.lstsq(design.T @ design, design.T @ values, rcond=None)[0]
    return float(np.std(design @ weights) / (values.mean() + base))


def flat_end(source: torch.Tensor, level: float) -> tuple[float, str]:
    """Return how flat the tissue ends at its flattest face, and the name of that face; (0, "") without tissue.

    source: (x, y, z) on RAS-nearest axes; tissue: above `level`. Flat: the tissue in its outermost plane as a share of
    its largest plane along that axis. A whole brain tapers and has some hundredths; a brain that the field of view cut
    off ends with a large plane, padded with zeros or not. On the scan's own grid, where the cut is parallel to an axis.
    """
    steps = _steps(source.shape)
    best = (0.0, "")
    for axis, faces in enumerate(FACES):
        lines = source[tuple(slice(None, None, 1 if other == axis else step) for other, step in enumerate(steps))]
        areas = (lines > level).sum(dim=[other for other in range(3) if other != axis]).cpu().numpy()
        planes = np.flatnonzero(areas)
        if not len(planes):
            return 0.0, ""
        for plane, face in zip((planes[0], planes[-1]), faces, strict=True):
            best = max(best, (float(areas[plane] / areas.max()), face))
    return best


def outside_share(source: Block, target: Grid, level: float) -> float | None:
    """Return the share of a scan's tissue that lies outside the field of view of a grid, 0..1; None without tissue.

    source: on its own grid; tissue: above `level`. A fixed template grid cuts that part off.
    """
    steps = _steps(tuple(source.data.shape))
    lattice = source.data[tuple(slice(None, None, step) for step in steps)].cpu().numpy()
    places = np.nonzero(lattice > level)
    if not len(places[0]):
        return None
    voxels = np.stack(
        [np.multiply(p, step) + start for p, step, start in zip(places, steps, source.start, strict=True)]
    )
    matrix = voxel_map(target, source.grid)
    reached = matrix[:3, :3] @ voxels + matrix[:3, 3:]
    ends = np.array(target.shape)[:, None] - 0.5
    inside = ((reached >= -0.5 - EDGE) & (reached <= ends + EDGE)).all(axis=0)
    return float(1 - inside.mean())


def _steps(shape: tuple[int, ...]) -> list[int]:
    return [max(1, round(length / LATTICE)) for length in shape]
