"""T1s of phantoms with a known cortex: brains whose cortex ends where its latent volume says.

The MNI152 maps are averages, whose grey matter is nowhere sharp: scaled, they would only look like another mean
intensity. So tissue is cut out of them. White matter begins where its share passes a half; the cortex reaches out to a
level of the shares of grey and white matter together, and the level of each region is the one at which it has the
subject's volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from scipy import ndimage, sparse

from models.spec import find_spec
from tasks.atlas import FINE_MM, fine_factor, priors_on, region_weights, subdivide, voxel_mm3
from tasks.phantom.acquire import BIDS_FIELD_MM, SCANNERS, Volume, acquire, make_grid
from tasks.phantom.anatomy import load_atlas, sample
from tasks.phantom.contrasts import TEXTURE_SHARE, Tissue, signal, texture
from tasks.phantom.cortex import SMOOTH_MM
from tasks.phantom.deform import Warp, voxel_centres, warp_grid
from tasks.phantom.subject import BRAIN_THRESHOLD
from tasks.volumes import Grid, template_grid

Array = np.ndarray[Any, np.dtype[Any]]

EDGE = 0.2
"""Width of an edge in shares of tissue."""
LEVELS = np.linspace(0.95, 0.05, 16)


class Cortex(Protocol):
    """What a T1 shows of a person."""

    @property
    def site(self) -> str:
        """Whose scanner took it."""

    @property
    def thickness(self) -> tuple[float, ...]:
        """By region, as in DESIKAN_KILLIANY: share of the average."""

    @property
    def area(self) -> tuple[float, ...]:
        """The same of the surface area."""


@dataclass(frozen=True)
class Levels:
    """How much grey matter each region has at each level, on a grid of FINE_MM."""

    grid: Grid
    weights: sparse.csr_matrix
    """(68, voxels)."""
    volumes_mm3: Array
    """(levels, 68), rising along LEVELS."""
    usual_mm3: Array
    """(68,) of the average map."""


@lru_cache(maxsize=1)
def levels() -> Levels:
    """Return the calibration, made once per process."""
    coarse = template_grid(find_spec("vbm_tiny"))
    grid = subdivide(coarse, fine_factor(coarse))
    priors, weights = priors_on(grid), region_weights(grid)
    volumes = [weights @ cut_out(priors.grey, priors.white, level)[0].ravel() for level in LEVELS]
    mm3 = voxel_mm3(grid)
    return Levels(grid, weights, np.stack(volumes).astype(float) * mm3, weights @ priors.grey.ravel() * mm3)


def cut_out(grey: Array, white: Array, level: Array | float) -> tuple[Array, Array]:
    """Return grey and white matter with edges out of their shares in the average; level: of both together."""
    inner = np.clip((white - 0.5) / EDGE + 0.5, 0, 1)
    outer = np.clip((grey + white - level) / EDGE + 0.5, 0, 1)
    return np.maximum(outer - inner, 0), np.minimum(inner, outer)


def level_map(traits: Cortex) -> Array:
    """Return the level of the subject's cortex on the grid of `levels`, (x, y, z) float32."""
    found = levels()
    wanted = found.usual_mm3 * np.array(traits.thickness) * np.array(traits.area)
    regional = [np.interp(volume, found.volumes_mm3[:, n], LEVELS) for n, volume in enumerate(wanted)]
    sigma = SMOOTH_MM / FINE_MM
    spread = ndimage.gaussian_filter((found.weights.T @ np.array(regional)).reshape(found.grid.shape), sigma)
    covered = ndimage.gaussian_filter(np.asarray(found.weights.sum(axis=0)).reshape(found.grid.shape), sigma)
    return np.where(covered > 1e-3, spread / np.maximum(covered, 1e-3), 0.5).astype(np.float32)


def t1_scan(traits: Cortex, warp: Warp, spacing_mm: float, rng: np.random.Generator) -> Volume:
    """Return the subject's skull-stripped T1 in MNI space, as the site's scanner takes it.

    Head size is not in it, as after an affine normalisation; nor is the grey matter outside the cortex.
    """
    grid = make_grid(BIDS_FIELD_MM, (spacing_mm, spacing_mm, spacing_mm), "RAS", rng)
    value, inside = t1_signal(traits, warp, grid.affine, grid.shape, rng)
    return acquire(value, inside, grid, SCANNERS[traits.site].replace(spacing=(1.0, 1.0, 1.0)), rng)


def t1_signal(
    traits: Cortex, warp: Warp, affine: Array, shape: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return the relative signal (n,) of a T1 at the voxel centres of a grid, and their flat indices (n,).

    affine: voxel -> RAS+ mm of MNI space. Voxels outside the brain are left out.
    """
    atlas = load_atlas()
    points = warp_grid(warp, affine, shape, atlas).reshape(3, -1)
    inside = np.flatnonzero(atlas.sample("brain", points) > BRAIN_THRESHOLD)
    places = points[:, inside]
    level = sample(level_map(traits), levels().grid.affine, places)
    grey, white = cut_out(atlas.sample("grey", places), atlas.sample("white", places), level)
    tissue = Tissue(grey, white, 1 - grey - white)
    world = voxel_centres(affine, shape).reshape(3, -1)[:, inside]
    return signal("t1", tissue, np.zeros_like(grey)) * (1 + TEXTURE_SHARE * texture(world, rng)), inside
