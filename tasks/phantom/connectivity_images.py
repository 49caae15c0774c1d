"""T1s and resting-state BOLD images of the connectivity cohort, on grids of MNI space."""

from __future__ import annotations

import gzip
import math
from functools import lru_cache
from typing import Any

import nibabel as nib
import numpy as np

from models.spec import find_spec
from tasks.atlas import pool, priors_on, region_weights, subdivide
from tasks.phantom import acquire
from tasks.phantom.acquire import QUIET, SCANNERS, Volume
from tasks.phantom.cortex_t1 import t1_signal
from tasks.phantom.deform import Warp
from tasks.phantom.effects_connectivity import ConnectivityTraits
from tasks.phantom.signals import Recording
from tasks.volumes import Grid, template_grid

Array = np.ndarray[Any, np.dtype[Any]]

RENDER_MM = 3.0
"""T1s are rendered on voxels no larger than this and averaged: larger ones hold parts of several tissues."""
T1_MIN = 0.05
"""Relative signal below which a voxel is background."""
BOLD_MEAN = 1000.0
BOLD_PER_UNIT = 10.0
"""Intensity of a signal of 1 over the mean: one per cent."""
MASK_MIN = 0.5
"""Share of brain of a voxel inside the mask."""
VOXEL_SD = 0.5
"""White noise of a voxel, in units of the signal."""


def mni_grid(spacing_mm: float) -> Grid:
    """Return the field of view of spec `cinp_tiny` with another spacing; at 6 mm its grid exactly."""
    tiny = template_grid(find_spec("cinp_tiny"))
    scale = spacing_mm / float(tiny.affine[0, 0])
    affine = tiny.affine @ np.diag([scale, scale, scale, 1.0])
    x, y, z = (math.ceil(n / scale - 1e-6) for n in tiny.shape)
    return Grid((x, y, z), affine)


def t1_image(
    traits: ConnectivityTraits, warp: Warp, spacing_mm: float, rng: np.random.Generator, quiet: bool = False
) -> Volume:
    """Return the subject's skull-stripped T1, voxels averaged over what lies in them, as the site's scanner takes it.

    quiet: no bias field, noise or intensity scale of a site.
    """
    grid = mni_grid(spacing_mm)
    factor = math.ceil(spacing_mm / RENDER_MM - 1e-6)
    fine = subdivide(grid, factor)
    value, inside = t1_signal(traits, warp, fine.affine, fine.shape, rng)
    whole = np.zeros(fine.shape, np.float32)
    whole.ravel()[inside] = value
    pooled = pool(whole, factor)
    kept = np.flatnonzero(pooled > T1_MIN)
    scanner = QUIET if quiet else SCANNERS[traits.site].replace(spacing=(1.0, 1.0, 1.0))
    return acquire.acquire(pooled.ravel()[kept], kept, acquire.Grid(grid.affine, grid.shape), scanner, rng)


def brain_mask(spacing_mm: float) -> Volume:
    """Return the mask of the template's brain, uint8; the residual warp hardly moves its edge."""
    grid = mni_grid(spacing_mm)
    return Volume((priors_on(grid).brain > MASK_MIN).astype(np.uint8), grid.affine)


def atlas_image(spacing_mm: float) -> Volume:
    """Return the regions as a label image, uint8: 1 to 68 in the order of DESIKAN_KILLIANY, 0 outside."""
    grid = mni_grid(spacing_mm)
    weights = region_weights(grid)
    largest = np.asarray(weights.max(axis=0).todense()).ravel()
    label = np.where(largest > 0, np.asarray(weights.argmax(axis=0)).ravel() + 1, 0)
    return Volume(label.astype(np.uint8).reshape(grid.shape), grid.affine)


def bold_image(recording: Recording, spacing_mm: float, tr_s: float, rng: np.random.Generator) -> bytes:
    """Return a BOLD image in MNI space as .nii.gz: what regions do, mixed where a voxel holds several, and noise.

    What of a voxel is no cortex shows the signals of CSF and white matter. int16 on a mean of BOLD_MEAN; outside the
    brain 0.
    """
    grid = mni_grid(spacing_mm)
    inside, cortex, tissue = _shares(spacing_mm)
    signal = recording.raw() @ cortex + recording.tissue @ tissue  # (frames, voxels inside)
    signal += VOXEL_SD * rng.standard_normal(signal.shape, dtype=np.float32)
    stored = np.zeros((math.prod(grid.shape), len(signal)), np.int16)
    stored[inside] = np.rint(BOLD_MEAN + BOLD_PER_UNIT * signal.T).astype(np.int16)
    image = nib.Nifti1Image(stored.reshape(*grid.shape, -1), grid.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = tr_s
    image.set_qform(grid.affine, code=4)
    image.set_sform(grid.affine, code=4)
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


@lru_cache(maxsize=1)
def _shares(spacing_mm: float) -> tuple[Array, Array, Array]:
    """Return the flat indices of the brain's voxels (n,), the share of each region (68, n), of CSF and white matter."""
    grid = mni_grid(spacing_mm)
    priors, regions = priors_on(grid), region_weights(grid)
    inside = np.flatnonzero(priors.brain > MASK_MIN)
    cortex = np.asarray(regions[:, inside].todense(), np.float32)
    other = np.clip(1 - cortex.sum(axis=0), 0, 1)
    csf, white = priors.csf.ravel()[inside], priors.white.ravel()[inside]
    return inside, cortex, other * np.stack([csf, white]) / np.maximum(csf + white, 1e-3)
