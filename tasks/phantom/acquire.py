"""Scanners: grids and orientations, bias field, Rician noise, intensity scale and number format.

Site effects are part of the phantom (see `SCANNERS`): a method that reads the site instead of the anatomy should be
caught. Sites are drawn independently of diagnosis and of the control group.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation

from models.records import Record
from tasks.phantom.anatomy import BRAIN_CENTRE_MM
from tasks.phantom.config import Orientation, PhantomConfig
from tasks.phantom.deform import fill

Array = np.ndarray[Any, np.dtype[Any]]

BIDS_FIELD_MM = (180.0, 216.0, 180.0)
DATALIST_FIELD_MM = (240.0, 240.0, 155.0)
"""As BraTS: 240 x 240 x 155 voxels of 1 mm."""
KNOWN_GAIN = 1000.0
"""Intensity scale of an undeformed subject."""
THICK_SLICES = 1.8
"""Slice thickness of the second grid, relative to the first."""


class Scanner(Record):
    """What one site does to every image."""

    spacing: tuple[float, float, float]
    """Relative to the cohort's nominal voxel size."""
    dtype: Literal["int16", "float32"]
    slope: float = 1.0
    """Powers of two, so that a stored background of 0 is exactly 0."""
    offset: int = 0
    """Stored number of the intensity 0; the header's intercept is -offset * slope."""
    gain: float
    """Intensity of relative signal 1."""
    bias: float
    """Standard deviation of the log bias field."""
    noise: float
    """Of the Rician noise, relative to signal 1."""


SCANNERS: dict[str, Scanner] = {
    "A": Scanner(spacing=(1.0, 1.0, 1.0), dtype="int16", slope=0.5, gain=900.0, bias=0.06, noise=0.02),
    "B": Scanner(spacing=(0.92, 0.92, 1.08), dtype="float32", gain=3.0, bias=0.10, noise=0.03),
    "C": Scanner(spacing=(1.0, 1.0, 1.09), dtype="int16", slope=0.125, offset=1024, gain=350.0, bias=0.14, noise=0.04),
}
QUIET = Scanner(spacing=(1.0, 1.0, 1.0), dtype="float32", gain=KNOWN_GAIN, bias=0.0, noise=0.0)


@dataclass(frozen=True)
class Grid:
    """Where the voxels are."""

    affine: Array
    """Voxel -> RAS+ mm."""
    shape: tuple[int, int, int]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclass(frozen=True)
class Volume:
    """One file before compression: stored numbers and how to read them."""

    stored: Array
    affine: Array
    slope: float = 1.0
    intercept: float = 0.0

    def to_bytes(self) -> bytes:
        """Return the .nii.gz; equal volumes give equal bytes (no time stamp)."""
        image = nib.Nifti1Image(self.stored, self.affine, dtype=self.stored.dtype)
        image.header.set_xyzt_units("mm", "sec")
        image.set_qform(self.affine, code=1)
        image.set_sform(self.affine, code=1)
        if self.stored.dtype == np.int16:
            image.header.set_slope_inter(self.slope, self.intercept)
        return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def scanner_of(config: PhantomConfig, site: str, anisotropic: bool) -> Scanner:
    """Return a site's scanner; isotropic and quiet where the config says so."""
    scanner = QUIET if config.undeformed else SCANNERS[site]
    spacing = SCANNERS[site].spacing if anisotropic and config.anisotropic else (1.0, 1.0, 1.0)
    return scanner.replace(spacing=spacing)


def make_grid(
    field_mm: tuple[float, float, float],
    spacing_mm: tuple[float, float, float],
    orientation: Orientation,
    rng: np.random.Generator,
) -> Grid:
    """Return a grid about the brain's centre. RAS and LPS grids start at whole millimetres; an oblique one is sagittal
    (voxel axes anterior, superior, right) and tilted by 6 to 14 degrees about two axes."""
    field = np.asarray(field_mm)
    if orientation == "oblique":
        tilt = rng.uniform(6, 14, 2) * rng.choice([-1, 1], 2)
        turn = Rotation.from_euler("xz", tilt, degrees=True).as_matrix()
        axes = turn @ np.eye(3)[:, [1, 2, 0]]
        field = field[[1, 2, 0]]
    else:
        axes = np.diag([1.0, 1.0, 1.0] if orientation == "RAS" else [-1.0, -1.0, 1.0])
    spacing = np.asarray(spacing_mm)
    shape = np.rint(field / spacing).astype(int)
    half = spacing * (shape - 1) / 2
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    if orientation == "oblique":
        affine[:3, 3] = BRAIN_CENTRE_MM - axes @ half
    else:
        low = np.floor(BRAIN_CENTRE_MM - half)
        affine[:3, 3] = np.where(np.diag(axes) > 0, low, low + 2 * half)
    # NIfTI keeps float32: generate on the grid that readers will see.
    return Grid(affine.astype(np.float32).astype(float), (int(shape[0]), int(shape[1]), int(shape[2])))


def acquire(value: Array, inside: Array, grid: Grid, scanner: Scanner, rng: np.random.Generator) -> Volume:
    """Return the scan of a relative signal (n,) at the flat voxel indices `inside`; outside is exactly 0.

    Rician noise: the modulus of the signal with complex Gaussian noise (Gudbjartsson and Patz 1995, MRM 34:910-914).
    """
    if scanner.bias:
        value = value * np.exp(scanner.bias * _bias(grid.shape, rng).ravel()[inside])
    if scanner.noise:
        real, imaginary = rng.standard_normal((2, value.size), dtype=np.float32) * np.float32(scanner.noise)
        value = np.hypot(value + real, imaginary)
    gain = scanner.gain * (float(np.exp(rng.normal(0, 0.12))) if scanner.noise else 1.0)
    if scanner.dtype == "float32":
        stored = np.zeros(grid.shape, np.float32)
        stored.ravel()[inside] = value * np.float32(gain)
        return Volume(stored, grid.affine)
    stored = np.full(grid.shape, scanner.offset, np.int16)
    # At least one step above the background: a voxel of the brain never reads as background.
    counts = np.maximum(np.rint(value * (gain / scanner.slope)), 1)
    stored.ravel()[inside] = np.minimum(counts + scanner.offset, np.iinfo(np.int16).max).astype(np.int16)
    return Volume(stored, grid.affine, scanner.slope, -scanner.offset * scanner.slope)


def _bias(shape: tuple[int, int, int], rng: np.random.Generator) -> Array:
    """Smooth field (X, Y, Z) with standard deviation about 1: cubic splines through 4 x 4 x 4 random nodes."""
    x, y, z = (max(1, -(-(n - 1) // 3)) for n in shape)
    return fill(rng.standard_normal((4, 4, 4)), shape, (x, y, z))
