"""Real anatomy: the MNI152 maps that nilearn ships, and the regions that effects and lesions need.

The maps are the ICBM 152 nonlinear symmetric averages of 2009 (Fonov et al. 2011, NeuroImage 54:313-327) at 1 mm,
skull-stripped. Everything here is in template space: RAS+ mm of the MNI152 template.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import ndimage

Array = np.ndarray[Any, np.dtype[Any]]

COARSE = 3
"""Spacing in mm of the flow field and of region maps that vary slowly."""
BRAIN_CENTRE_MM = np.array([0.0, -17.0, 6.0])
"""Middle of the template's brain; heads are scaled about it."""
MEDIAL_TEMPORAL_MM = np.array([[27.0, -20.0, -17.0], [-27.0, -20.0, -17.0]])
"""Centres of the hippocampal regions."""
MEDIAL_TEMPORAL_AXES_MM = np.array([11.0, 20.0, 10.0])
VESSELS_MM: tuple[tuple[tuple[float, float, float], ...], ...] = (
    ((0, -26, -50), (0, -24, -36), (0, -22, -24), (0, -18, -16)),  # basilar
    ((0, -18, -16), (12, -20, -14), (22, -34, -8), (20, -62, 0), (10, -84, 6)),  # posterior cerebral
    ((14, 0, -22), (12, 4, -16), (24, 4, -16), (36, 4, -14), (44, -2, -4), (42, -18, 8), (46, -36, 18)),  # middle
    ((12, 4, -16), (4, 22, -14), (3, 36, -4), (3, 42, 12), (3, 32, 28), (3, 8, 38)),  # anterior cerebral
)
"""Rough course of the large arteries on the right; mirrored to the left."""
SINUS_MM = ((0, 62, 20), (0, 48, 52), (0, 10, 76), (0, -40, 78), (0, -80, 50), (0, -102, 14), (0, -100, -8))
"""Superior sagittal sinus, inner side."""


@dataclass(frozen=True)
class Atlas:
    """Template maps (float32, 1 mm, shape 197 x 233 x 189) and fields (COARSE mm)."""

    affine: Array
    """Voxel -> RAS+ mm of the 1 mm maps."""
    grey: Array
    white: Array
    brain: Array
    """1 inside the brain (CSF included), 0 outside."""
    brain_box: tuple[Array, Array]
    """Template corners in mm (low, high) that contain the brain."""
    ventricles: Array
    """CSF fraction of the lateral and third ventricles, 0 elsewhere."""
    cortex: Array
    """Where grey matter turns into CSF with age: weight with mean 1 over the grey matter, high beside sulci."""
    vessels: Array
    """Arteries and the sagittal sinus, 0..1."""
    coarse_affine: Array
    inflation: Array
    """(3, x, y, z): unit-scaled field that points into the ventricles; pulling back along it enlarges them."""
    tumour_sites_mm: Array
    """(n, 3) white-matter points that lie deep enough for a tumour's centre."""
    stroke_sites_mm: Array
    """(n, 3) points of the middle cerebral artery's territory."""

    def sample(self, name: str, points: Array) -> Array:
        """Return a 1 mm map at template points (3, n) mm by trilinear interpolation, 0 outside; float32."""
        return sample(getattr(self, name), self.affine, points)


def sample(volume: Array, affine: Array, points: Array) -> Array:
    """Return a map with a diagonal affine at points (3, n) mm, trilinear, 0 outside; float32."""
    spacing, origin = np.diag(affine)[:3, None], affine[:3, 3, None]
    where = (points - origin) / spacing
    return ndimage.map_coordinates(volume, where, output=np.float32, order=1, mode="constant", cval=0.0)


def medial_temporal_weight(points: Array) -> Array:
    """Return the smooth weight (0..1) of the two hippocampal regions at template points (3, n) mm."""
    weight = np.zeros(points.shape[1:], np.float32)
    for centre in MEDIAL_TEMPORAL_MM:
        squared = (((points - centre[:, None]) / MEDIAL_TEMPORAL_AXES_MM[:, None]) ** 2).sum(0)
        np.maximum(weight, np.exp(-0.5 * squared * squared), out=weight)
    return weight


@lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """Load the template once per process (about 3 s)."""
    from nilearn import datasets  # 2 s; only the processes that make phantoms need it

    template = datasets.load_mni152_template(resolution=1)
    affine = np.asarray(template.affine, float)
    brain = (np.asarray(template.dataobj) > 0).astype(np.float32)
    grey = np.asarray(datasets.load_mni152_gm_template(resolution=1).dataobj, np.float32) * brain
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, np.float32) * brain
    csf = np.clip(brain - grey - white, 0, 1)
    depth = _depth_mm(brain)
    ventricles = _ventricles(csf, depth, affine)
    coarse_affine = affine.copy()
    coarse_affine[:3, :3] *= COARSE
    return Atlas(
        affine=affine,
        grey=grey,
        white=white,
        brain=brain,
        brain_box=_box_mm(brain, affine),
        ventricles=ventricles,
        cortex=_cortex(csf * (ventricles == 0), grey),
        vessels=_vessels(brain.shape, affine),
        coarse_affine=coarse_affine,
        inflation=_inflation(ventricles),
        tumour_sites_mm=_sites(white, depth, affine, lambda x, y, z: (z > -10) & (np.abs(x) > 12), 18.0),
        stroke_sites_mm=_sites(
            grey + white,
            depth,
            affine,
            lambda x, y, z: (np.abs(x) > 30) & (y > -50) & (y < 30) & (z > -5) & (z < 45),
            9.0,
        ),
    )


def _box_mm(brain: Array, affine: Array) -> tuple[Array, Array]:
    spans = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    low, high = np.array([(span[0] - 1, span[-1] + 1) for span in spans], np.float32).T
    return low + affine[:3, 3].astype(np.float32), high + affine[:3, 3].astype(np.float32)


def _grid_mm(shape: tuple[int, ...], affine: Array, step: int = 1) -> tuple[Array, Array, Array]:
    axes = (np.arange(0, n, step) * affine[i, i] + affine[i, 3] for i, n in enumerate(shape))
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return x, y, z


def _depth_mm(brain: Array) -> Array:
    """Distance to the outside, computed at 3 mm and enlarged: depth is smooth and the exact transform slow."""
    coarse = ndimage.distance_transform_edt(brain[::COARSE, ::COARSE, ::COARSE]) * COARSE
    return np.repeat(np.repeat(np.repeat(coarse, COARSE, 0), COARSE, 1), COARSE, 2)[
        : brain.shape[0], : brain.shape[1], : brain.shape[2]
    ].astype(np.float32)


def _ventricles(csf: Array, depth: Array, affine: Array) -> Array:
    x, y, z = _grid_mm(csf.shape, affine)
    body = (np.abs(x) < 26) & (y > -45) & (y < 42) & (z > 2) & (z < 34)
    atrium = (np.abs(x) < 40) & (y > -72) & (y < -22) & (z > -8) & (z < 32) & (np.abs(x) > 8)
    third = (np.abs(x) < 5) & (y > -30) & (y < 10) & (z > -10) & (z < 14)
    region = (body | atrium | third) & (depth > 22) & (csf > 0.35)
    parts, _ = ndimage.label(region)
    keep = {int(parts[_index(affine, mm)]) for mm in ((9, 10, 18), (-9, 10, 18), (26, -45, 8), (-26, -45, 8))} - {0}
    mask = ndimage.binary_dilation(np.isin(parts, list(keep)), iterations=1)
    return np.where(mask, csf, 0).astype(np.float32)


def _index(affine: Array, mm: tuple[float, ...]) -> tuple[int, int, int]:
    i, j, k = np.rint(np.asarray(mm) - affine[:3, 3]).astype(int)
    return int(i), int(j), int(k)


def _inflation(ventricles: Array, sigma_mm: float = 13.0) -> Array:
    """Gradient of the smoothed ventricles: it decays within a few sigma, so distant tissue stays where it is."""
    smooth = ndimage.gaussian_filter(ventricles[::COARSE, ::COARSE, ::COARSE], sigma_mm / COARSE)
    field = np.stack([np.gradient(smooth, axis=axis) for axis in range(3)])
    return (field / np.sqrt((field**2).sum(0)).max()).astype(np.float32)


def _cortex(csf: Array, grey: Array) -> Array:
    coarse = (slice(None, None, COARSE),) * 3
    near = ndimage.gaussian_filter(csf[coarse], 3.0 / COARSE)
    mean = float((near * grey[coarse]).sum() / grey[coarse].sum())
    weight = ndimage.zoom(np.minimum(near / mean, 3.0), COARSE, order=1, grid_mode=True, mode="nearest")
    shape = grey.shape
    return weight[: shape[0], : shape[1], : shape[2]].astype(np.float32)


def _vessels(shape: tuple[int, ...], affine: Array, radius_mm: float = 1.6) -> Array:
    lines = [*VESSELS_MM, *(tuple((-x, y, z) for x, y, z in line) for line in VESSELS_MM), SINUS_MM]
    field = np.zeros(shape, np.float32)
    for line in lines:
        for start, end in pairwise(line):
            _add_tube(field, affine, np.asarray(start, float), np.asarray(end, float), radius_mm)
    return field


def _add_tube(field: Array, affine: Array, start: Array, end: Array, radius_mm: float) -> None:
    low = np.floor(np.minimum(start, end) - 4 - affine[:3, 3]).astype(int).clip(0)
    high = np.ceil(np.maximum(start, end) + 5 - affine[:3, 3]).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = [
        np.arange(a, min(b, n)) + affine[i, 3] for i, (a, b, n) in enumerate(zip(low, high, field.shape, strict=True))
    ]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    along = end - start
    t = np.clip((points - start) @ along / (along @ along), 0, 1)
    squared = ((points - start - t[..., None] * along) ** 2).sum(-1)
    np.maximum(field[box], np.exp(-0.5 * squared / radius_mm**2), out=field[box])


def _sites(tissue: Array, depth: Array, affine: Array, where: Any, depth_mm: float) -> Array:
    coarse = (slice(None, None, COARSE),) * 3
    x, y, z = _grid_mm(tissue.shape, affine, COARSE)
    found = np.argwhere((tissue[coarse] > 0.6) & (depth[coarse] > depth_mm) & where(x, y, z))
    return found * float(COARSE) + affine[:3, 3]
