"""Grey-matter maps of the anatomical cohort: the MNI152 map with each region's amount of grey matter changed.

The maps lie in MNI space, as after CAT12's normalisation: what remains of a person's shape is a smooth residual warp,
made good by its Jacobian so that no tissue is gained or lost, and the amount of grey matter, which is what the latents
say. Nothing is rendered anew for a subject: a region's change is a factor of its part of the average map.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import ndimage, sparse

from models.anatomy import DESIKAN_KILLIANY, MEASURES
from models.spec import find_spec
from tasks.atlas import priors_on, region_weights, voxel_mm3
from tasks.phantom import effects_cortex as effects
from tasks.phantom.acquire import Volume
from tasks.phantom.anatomy import load_atlas, sample
from tasks.phantom.deform import Warp, draw_waves, jacobian, warp_grid
from tasks.phantom.effects_cortex import CorticalTraits
from tasks.volumes import Grid, template_grid

Array = np.ndarray[Any, np.dtype[Any]]

SMOOTH_MM = 3.0
"""Standard deviation of the smoothing between the factors (or levels) of neighbouring regions."""


@dataclass(frozen=True)
class GreyTemplate:
    """The average grey-matter map in parts, on the grid of a spec."""

    grid: Grid
    parts: sparse.csr_matrix
    """(69, voxels) float32: grey matter of each region, and last of all that is outside the cortex."""
    volumes_mm3: Array
    """(68,) of the template's regions, in mm^3."""
    smoothed: Array
    """(x, y, z): the whole map, smoothed."""


@lru_cache(maxsize=2)
def grey_template(spec: str) -> GreyTemplate:
    """Return the average map of a registered spec's grid. Raises AtlasError when the atlas is not installed."""
    grid = template_grid(find_spec(spec))
    grey = priors_on(grid).grey.ravel()
    regional = region_weights(grid).multiply(grey).tocsr()
    other = np.maximum(grey - np.asarray(regional.sum(axis=0)).ravel(), 0)
    parts = sparse.vstack([regional, other], format="csr").astype(np.float32)
    volumes = np.asarray(regional.sum(axis=1)).ravel().astype(float) * voxel_mm3(grid)
    return GreyTemplate(grid, parts, volumes, _smooth(grey.reshape(grid.shape), grid))


def _smooth(values: Array, grid: Grid) -> Array:
    return np.asarray(ndimage.gaussian_filter(values, SMOOTH_MM / np.linalg.norm(grid.affine[:3, :3], axis=0)))


def latent_descriptors(traits: CorticalTraits, template: GreyTemplate) -> Array:
    """Return the true thickness (mm), grey-matter volume (mm^3) and area (mm^2) of each region, (3, 68).

    Volume is thickness times area; the mean area is the template's volume over the mean thickness.
    """
    mean = effects.mean_thickness_mm()
    thickness = mean * np.array(traits.thickness)
    area = template.volumes_mm3 / mean * np.array(traits.area) * traits.head_scale**3
    values = {
        "cortical_thickness_mm": thickness,
        "grey_matter_volume_mm3": thickness * area,
        "surface_area_mm2": area,
    }
    return np.stack([values[measure] for measure in MEASURES])


def measured_descriptors(latent: Array, site: str, rng: np.random.Generator) -> Array:
    """Return descriptors as a site would report them, (3, 68): with its offsets and errors of measurement."""
    offset = {"cortical_thickness_mm": effects.SITE_THICKNESS[site], "grey_matter_volume_mm3": effects.SITE_GREY[site]}
    noise = rng.standard_normal((len(MEASURES), len(DESIKAN_KILLIANY)))
    factors = [
        (1 + offset.get(measure, 0.0)) * (1 + effects.MEASURED_SD[measure] * row)
        for measure, row in zip(MEASURES, noise, strict=True)
    ]
    return np.asarray(latent * np.stack(factors))


def draw_residual(rng: np.random.Generator) -> Warp:
    """Draw what the normalisation left."""
    return Warp(np.eye(4), *draw_waves(rng, effects.RESIDUAL_MM), 0.0)


def amounts(traits: CorticalTraits, template: GreyTemplate) -> Array:
    """Return by which factor the subject's grey matter differs from the template's, (x, y, z), without head size."""
    factors = np.append(np.array(traits.thickness) * np.array(traits.area), traits.other_grey)
    changed = (factors.astype(np.float32) @ template.parts).reshape(template.grid.shape)
    smoothed = _smooth(changed, template.grid)
    some = template.smoothed > 1e-3
    return np.where(some, smoothed / np.where(some, template.smoothed, 1), 1).astype(np.float32)


def modulated_map(traits: CorticalTraits, template: GreyTemplate, warp: Warp) -> Array:
    """Return the modulated map, (x, y, z) float32: mm^3 of the subject's grey matter per mm^3 of MNI space."""
    affine = template.grid.affine
    whole = np.asarray(template.parts.sum(axis=0)).reshape(template.grid.shape)
    own = (whole * amounts(traits, template)).astype(np.float32)
    if len(warp.waves):
        points = warp_grid(warp, affine, template.grid.shape, load_atlas())
        own = sample(own, affine, points.reshape(3, -1)).reshape(own.shape) * jacobian(points, affine)
    return np.asarray(own * traits.head_scale**3, dtype=np.float32)


def scanned_map(modulated: Array, site: str, rng: np.random.Generator) -> Array:
    """Return a map as a site's scanner and its segmentation would give it: offset and noise; never negative."""
    noise = rng.standard_normal(modulated.shape, dtype=np.float32)
    factor = (1 + effects.SITE_GREY[site]) * (1 + effects.SITE_NOISE[site] * noise)
    return np.maximum(modulated * factor, 0).astype(np.float32)


def map_file(values: Array, grid: Grid) -> Volume:
    """Return a map as CAT12 writes it: float32, x from right to left."""
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = grid.shape[0] - 1
    return Volume(np.ascontiguousarray(values[::-1]), grid.affine @ flip)
