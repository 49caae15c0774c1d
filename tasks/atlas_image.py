"""The label image of an atlas: read, checked against the spec, laid on the grid of an image, and described."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from infra import storage
from models.connectomes import ConnectomeSpec
from tasks.affines import BadScanError
from tasks.connectome import listed
from tasks.integrity import ROUNDING
from tasks.nifti import parse_nifti

Labels = npt.NDArray[np.int32]
LARGEST = 1 << 20
"""Of a label: FreeSurfer's go to 14175."""


class AtlasImageError(ValueError):
    """A label image that cannot be used, or is not the one that the spec names."""


def require_atlas(spec: ConnectomeSpec) -> None:
    """Raise AtlasImageError when the spec's label image is not there, is another one, or lacks a region."""
    if spec.atlas_image:
        _spec_labels(spec.atlas_image, spec.atlas_sha256, spec.values)


def labels_on(spec: ConnectomeSpec, shape: tuple[int, int, int], affine: np.ndarray) -> Labels:
    """Return the atlas on a grid, (x, y, z): 1 + place of the region, 0 outside; the nearest label at voxel centres.

    Read-only, for it is shared by the cases of a worker. Raises AtlasImageError.
    """
    key = (spec.atlas_image, spec.atlas_sha256, spec.values)
    return _on_grid(key, shape, tuple(np.asarray(affine, float).ravel().tolist()))


def region_centres(spec: ConnectomeSpec) -> np.ndarray:
    """Return the centre of mass of every region, (R, 3) RAS+ mm; raises AtlasImageError."""
    labels, affine = _spec_labels(spec.atlas_image, spec.atlas_sha256, spec.values)
    return centres_in(labels, affine, len(spec.values))


def centres_in(labels: Labels, affine: np.ndarray, count: int) -> np.ndarray:
    """Return the centres of mass of the labels 1 to count, (count, 3) in the world of the affine."""
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, count + 1)))
    return np.asarray(centres @ affine[:3, :3].T + affine[:3, 3])


def read_labels(url: str) -> tuple[Labels, np.ndarray, str]:
    """Return a label image (x, y, z), its affine and the SHA-256 of its file; raises AtlasImageError."""
    try:
        raw = storage.read_bytes(url)
    except FileNotFoundError:
        raise AtlasImageError(f"the atlas image {url} does not exist") from None
    try:
        image = parse_nifti(raw, url.rsplit("/", 1)[-1])
    except BadScanError as bad:
        raise AtlasImageError(f"{url} is no NIfTI label image ({bad.detail})") from None
    values = image.data.double().numpy()
    labels = np.rint(values)
    if not np.abs(values - labels).max() < ROUNDING or not 0 <= labels.min() <= labels.max() < LARGEST:
        raise AtlasImageError(
            f"{url} is no label image: whole numbers from 0 to {LARGEST - 1} are needed, it has values from "
            f"{values.min():g} to {values.max():g}"
        )
    return labels.astype(np.int32), image.affine, hashlib.sha256(raw).hexdigest()


def values_in(labels: Labels) -> list[int]:
    """Return the labels of an image, ascending, without 0."""
    return [int(value) for value in np.flatnonzero(np.bincount(labels.ravel())) if value]


@lru_cache(maxsize=2)
def _spec_labels(url: str, sha256: str, values: Sequence[int]) -> tuple[Labels, np.ndarray]:
    """Return the label image with 1 + place of the region in the spec, and its affine."""
    labels, affine, found = read_labels(url)
    if found != sha256:
        raise AtlasImageError(f"the atlas image {url} has the SHA-256 {found}, the spec says {sha256}; correct one")
    if absent := sorted(set(values) - set(values_in(labels))):
        raise AtlasImageError(
            f"the atlas image {url} has no voxel of {len(absent)} of {len(values)} values of the spec: {listed(absent)}"
        )
    places = np.zeros(max(int(labels.max()), *values) + 1, np.int32)
    places[list(values)] = np.arange(1, len(values) + 1)
    placed = places[labels]
    placed.flags.writeable = False
    return placed, affine


@lru_cache(maxsize=2)
def _on_grid(key: tuple[str, str, tuple[int, ...]], shape: tuple[int, int, int], affine: tuple[float, ...]) -> Labels:
    from nilearn.image import resample_img  # here: it takes 2 s, and few need it
    from nilearn.image.resampling import BoundingBoxError

    labels, source = _spec_labels(*key)
    target = np.array(affine).reshape(4, 4)
    if shape == labels.shape and np.allclose(source, target, atol=1e-4):
        return labels
    try:
        found = resample_img(
            nib.Nifti1Image(labels, source),
            target_affine=target,
            target_shape=shape,
            interpolation="nearest",
            copy_header=True,
            force_resample=True,
        )
    except BoundingBoxError:  # they have nothing in common
        return np.zeros(shape, np.int32)
    placed = np.asarray(found.dataobj).astype(np.int32)
    placed.flags.writeable = False
    return placed
