"""What quality control wants to know of the voxels of one channel: slow drift of its intensities, and flat ends.

Both look at a lattice of the channel, so they cost about a millisecond. A channel is (x, y, z) float16 of 0..1 on
RAS-nearest axes, cropped to the foreground of its case, as it goes into the store.
"""

from __future__ import annotations

import numpy as np

TISSUE = 0.1
"""Voxels above this share of the intensity range count as tissue."""
LATTICE = 24
"""Points of the lattice along an axis, about."""
MIN_POINTS = 100
"""Points of tissue that are enough for a fit."""
FACES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))

# Floats that are not negative have the order of their bits, and numpy compares integers far faster than halves.
_TISSUE_BITS = np.float16(TISSUE).view(np.int16)


def voxel_measures(channel: np.ndarray, modality: str) -> dict[str, float | str]:
    """Return the entries of a receipt's `qc` for one channel: drift_*, flat_end_* and flat_face_*."""
    slow, (flat, face) = drift(channel), flat_end(channel)
    found: dict[str, float | str] = {} if slow is None else {f"drift_{modality}": round(slow, 4)}
    return found | ({f"flat_end_{modality}": round(flat, 4), f"flat_face_{modality}": face} if face else {})


def drift(channel: np.ndarray) -> float | None:
    """Return the spread of the slow drift of the tissue's intensities as a share of their mean; None without tissue.

    The drift is the least-squares fit of 1, x, y, z, x^2, y^2, z^2 to the tissue's intensities; a polynomial of low
    order is a common model of the bias field (Styner et al. 2000, IEEE TMI 19:153-165). Anatomy alone gives a part of
    it, about the same in all subjects: the number means something beside those of other scans of its kind.
    """
    points = channel[tuple(slice(None, None, step) for step in _steps(channel.shape))]
    places = np.nonzero(points.view(np.int16) > _TISSUE_BITS)
    if len(places[0]) < MIN_POINTS:
        return None
    values = points[places].astype(np.float64)
    axes = [2 * place / max(length - 1, 1) - 1 for place, length in zip(places, points.shape, strict=True)]
    design = np.stack([np.ones_like(values), *axes, *(axis**2 for axis in axes)], axis=1)
    weights = np.linalg.lstsq(design.T @ design, design.T @ values, rcond=None)[0]
    return float(np.std(design @ weights) / values.mean())


def flat_end(channel: np.ndarray) -> tuple[float, str]:
    """Return how flat the tissue ends at its flattest face, and the name of that face; (0, "") without tissue.

    Flat: the tissue in its outermost plane as a share of its largest plane along that axis. A whole brain tapers and
    has some hundredths; a brain that the field of view cut off ends with a large plane.
    """
    steps = _steps(channel.shape)
    best = (0.0, "")
    for axis, faces in enumerate(FACES):
        lines = channel[tuple(slice(None, None, 1 if other == axis else step) for other, step in enumerate(steps))]
        others = tuple(other for other in range(3) if other != axis)
        areas = np.count_nonzero(lines.view(np.int16) > _TISSUE_BITS, axis=others)
        planes = np.flatnonzero(areas)
        if not len(planes):
            return 0.0, ""
        for plane, face in zip((planes[0], planes[-1]), faces, strict=True):
            best = max(best, (float(areas[plane] / areas.max()), face))
    return best


def _steps(shape: tuple[int, ...]) -> list[int]:
    return [max(1, round(length / LATTICE)) for length in shape]
