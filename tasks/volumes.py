"""Steps from scans to stored voxels as pure functions: orientation, resampling, crop, intensities.

Coordinates: a voxel index is the centre of its voxel; an affine maps voxel indices to RAS+ mm.
Source of the order and the constants of frame `image`: BrainMVP's input pipeline (RAS, isotropic linear resampling
as MONAI's Spacing does it, symmetric crop, percentiles over the cropped volume, symmetric crop).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from models.records import PreprocessSpec, Reason
from tasks.nifti import BadScanError, Volume

if TYPE_CHECKING:
    import torch

Box = tuple[slice, slice, slice]
Shape3 = tuple[int, int, int]
AFFINE_TOLERANCE = 1e-3
"""Grids that differ by less are one grid (MONAI's AFFINE_TOL)."""
SLAB = 16
"""Output planes that are interpolated at once: bounds the memory of the sampling grid."""


@dataclass(frozen=True)
class Grid:
    """A voxel grid in the world."""

    shape: Shape3
    affine: np.ndarray
    """(4, 4) float64: voxel -> RAS+ mm."""

    def corners(self) -> np.ndarray:
        """Return the homogeneous voxel coordinates of the eight outer corners, (4, 8)."""
        ends = [(-0.5, n - 0.5) for n in self.shape]
        return np.array(np.meshgrid(*ends, (1.0,), indexing="ij")).reshape(4, -1)


def grid_of(volume: Volume) -> Grid:
    """Return the grid on which a volume was read."""
    return Grid(volume.shape, volume.affine)


def to_ras(volume: Volume) -> Volume:
    """Flip and permute axes so that they point nearest to right, anterior, superior; no interpolation."""
    orientation = nib.orientations.io_orientation(volume.affine)
    data = np.ascontiguousarray(nib.orientations.apply_orientation(volume.data, orientation))
    affine = volume.affine @ nib.orientations.inv_ornt_aff(orientation, volume.shape)
    return Volume(data, affine, volume.name, volume.flags)


def isotropic_grid(grid: Grid, spacing_mm: float) -> Grid:
    """Return the grid of cubic voxels over the same field of view: voxel 0 and the axes stay where they are.

    As MONAI's Spacing (bilinear, diagonal=False, scale_extent=False): n' = round((n - 1) old / new + 1); shear is
    removed by the Cholesky factor of the voxel axes.
    """
    axes = grid.affine[:3, :3]
    zoom = np.linalg.cholesky(axes.T @ axes).T
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.linalg.inv(zoom) @ np.diag(np.sign(np.diag(zoom)) * spacing_mm)
    affine[:3, 3] = grid.affine[:3, 3]
    edges_mm = np.linalg.norm(axes, axis=0)
    x, y, z = (round((n - 1) * float(mm) / spacing_mm + 1) for n, mm in zip(grid.shape, edges_mm, strict=True))
    return Grid((x, y, z), affine)


def template_grid(spec: PreprocessSpec) -> Grid:
    """Return the fixed grid of frame `template`."""
    return Grid(spec.grid, np.asarray(spec.grid_affine, dtype=np.float64))


def same_grid(a: Grid, b: Grid) -> bool:
    """Say whether two grids agree in shape and place every corner within a thousandth of a voxel of each other."""
    return a.shape == b.shape and largest_shift(a, b) < AFFINE_TOLERANCE * max(a.shape)


def largest_shift(a: Grid, b: Grid) -> float:
    """Return how far apart two grids of one shape place the same corner, in voxels of b."""
    return float(np.linalg.norm(((_voxel_map(b, a) - np.eye(4)) @ a.corners())[:3], axis=0).max())


def overlap_share(source: Grid, target: Grid) -> float:
    """Return the share of the target's field of view that the source's bounding box covers, 0..1."""
    reached = (np.linalg.inv(target.affine) @ source.affine @ source.corners())[:3]
    low = np.maximum(reached.min(axis=1), -0.5)
    high = np.minimum(reached.max(axis=1), np.array(target.shape) - 0.5)
    return float(np.prod(np.maximum(high - low, 0) / np.array(target.shape)))


def resample(volume: Volume, target: Grid, *, nearest: bool = False) -> np.ndarray:
    """Interpolate a volume at the voxel centres of a grid, (X, Y, Z) float32; trilinear, or nearest for labels.

    No anti-aliasing when voxels grow, as MONAI. Voxels outside the source's field of view are 0; in the half voxel
    between the outermost centres and the border the outermost value holds. Raises BadScanError when the two
    fields of view do not overlap.
    """
    source = grid_of(volume)
    if same_grid(source, target):
        return volume.data
    if overlap_share(source, target) == 0:
        raise BadScanError(
            Reason.NO_OVERLAP,
            f"{volume.name}: centre at {_centre(source)} mm, field of view does not reach the grid of the case "
            f"with centre {_centre(target)} mm",
        )
    return _sample(volume.data, _voxel_map(source, target), target.shape, nearest)


def _voxel_map(source: Grid, target: Grid) -> np.ndarray:
    """Return the matrix from voxels of the target to voxels of the source."""
    return np.linalg.solve(source.affine, target.affine)


def _sample(data: np.ndarray, matrix: np.ndarray, shape: Shape3, nearest: bool) -> np.ndarray:
    import torch

    edges = np.array(data.shape, dtype=np.float64)
    # torch counts from -1 at the first voxel centre to 1 at the last (align_corners).
    linear = matrix[:3, :3] * (2 / (edges - 1))[:, None]
    offset = matrix[:3, 3] * (2 / (edges - 1)) - 1
    bound = torch.tensor(edges / (edges - 1) + 1e-6, dtype=torch.float32)
    volume = torch.from_numpy(np.ascontiguousarray(data))[None, None]
    out = np.empty(shape, dtype=np.float32)
    for begin in range(0, shape[0], SLAB):
        planes = range(begin, min(begin + SLAB, shape[0]))
        points = _points(linear, offset, planes, shape)
        sampled = torch.nn.functional.grid_sample(
            volume,
            points.flip(-1)[None],  # torch names the last axis first
            mode="nearest" if nearest else "bilinear",
            padding_mode="border",
            align_corners=True,
        )[0, 0]
        inside = (points.abs() <= bound).all(dim=-1)
        out[planes.start : planes.stop] = (sampled * inside).numpy()
    return out


def _points(linear: np.ndarray, offset: np.ndarray, planes: range, shape: Shape3) -> torch.Tensor:
    """Return the normalised source coordinates of some output planes, (planes, Y, Z, 3) float32."""
    import torch

    x, y, z = (torch.arange(r.start, r.stop, dtype=torch.float64) for r in (planes, range(shape[1]), range(shape[2])))
    columns = [torch.from_numpy(np.ascontiguousarray(linear[:, axis])) for axis in range(3)]
    in_plane = (y[:, None, None] * columns[1] + z[None, :, None] * columns[2]).float()
    along = (x[:, None] * columns[0] + torch.from_numpy(offset)).float()
    return along[:, None, None, :] + in_plane[None]


def foreground_box(image: np.ndarray) -> Box:
    """Return the box of voxels above zero in any channel; image: (M, X, Y, Z). Raises BadScanError if empty."""
    mask = np.asarray((image > 0).any(axis=0))
    slices = []
    for projection in (mask.any(axis=(1, 2)), mask.any(axis=(0, 2)), mask.any(axis=(0, 1))):
        hit = np.flatnonzero(projection)
        if not hit.size:
            raise BadScanError(Reason.EMPTY, f"no voxel above zero in {image.shape[0]} x {mask.shape} voxels")
        slices.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return slices[0], slices[1], slices[2]


def symmetric(box: Box, shape: Shape3) -> Box:
    """Widen a box until it is symmetric about the centre of the volume, so that the centre stays fixed."""
    margins = [min(s.start, n - s.stop) for s, n in zip(box, shape, strict=True)]
    x, y, z = (slice(m, n - m) for m, n in zip(margins, shape, strict=True))
    return x, y, z


def shift_affine(affine: np.ndarray, box: Box) -> np.ndarray:
    """Return the affine of the voxels inside a box."""
    out = np.array(affine, dtype=np.float64)
    out[:3, 3] = affine[:3, :3] @ np.array([s.start for s in box], dtype=np.float64) + affine[:3, 3]
    return out


def intensity_range(channel: np.ndarray, spec: PreprocessSpec, name: str) -> tuple[float, float]:
    """Return the intensities at the spec's percentiles of a cropped modality; raises BadScanError if they coincide."""
    values = channel[channel > 0] if spec.percentile_region == "foreground" else channel
    if not values.size:
        raise BadScanError(Reason.EMPTY, f"{name}: no voxel above zero inside the crop {channel.shape}")
    low, high = (float(v) for v in np.percentile(values, spec.percentiles))
    if not high > low:
        raise BadScanError(
            Reason.CONSTANT, f"{name}: percentiles {spec.percentiles[0]:g} and {spec.percentiles[1]:g} are both {low:g}"
        )
    return low, high


def scale(channel: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low to 0 and high to 1, clip to [0, 1]; float32, and never minus zero (it would not survive the store)."""
    scaled = (channel - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0, 1) + np.float32(0)


def snr_estimate(channel: np.ndarray) -> float:
    """Return mean foreground over noise; the noise is the robust spread of differences of neighbours along x.

    sigma = median |x_i - x_(i+1)| / (0.6745 sqrt 2) for Gaussian noise; anatomy raises it, so this is a lower bound.
    """
    inside = (channel[1:] > 0) & (channel[:-1] > 0)
    if not inside.any():
        return 0.0
    sigma = float(np.median(np.abs(np.diff(channel, axis=0)[inside]))) / (0.6745 * 2**0.5)
    return float(channel[channel > 0].mean()) / sigma if sigma > 0 else 0.0


def _centre(grid: Grid) -> tuple[float, ...]:
    centre = grid.affine @ np.array([*((n - 1) / 2 for n in grid.shape), 1.0])
    return tuple(round(float(v), 1) for v in centre[:3])
