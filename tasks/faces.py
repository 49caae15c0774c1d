"""Which voxels of a head show the face, by a plane that falls from the forehead to the jaw.

A rule for pictures, not an anonymisation of data: nothing that is stored is changed. Two cases are known:

- In template (MNI152) millimetres the plane z = 0.92 (y - 93) mm lies below the frontal lobe and above the eyes.
- In any other frame the same plane is placed by the head itself: its front-to-back length L and its top. In a head of
  the MNI template's size (L = 220 mm) the two planes agree. A box without a neck or nose moves the plane upwards, so it
  rather hides some frontal lobe than shows an eye.

Which one holds is told by the spec (`frame_of`): a grid of its own is not MNI, whatever its millimetres say.

A skull-stripped image needs no mask. It is recognised by its volume: adult brains stay below 2.0 litres, the inside of
the smallest adult head is above 2.5.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from models.spec import PreprocessSpec

Frame = Literal["template", "image", "none"]

SLOPE = 0.92
TEMPLATE_FRONT_MM = 93.0
"""Where the plane crosses z = 0 in front of the anterior commissure."""
HEAD_VOLUME_ML = 2200.0
DEPTH_SHARE = 0.386
FRONT_SHARE = 0.932
"""The plane passes DEPTH_SHARE L below the top of the head at FRONT_SHARE L in front of its back."""
VERTEX_RADIUS_MM = 85.0
"""Of the top of a head, taken as a sphere."""

Mask = npt.NDArray[np.bool_]


def frame_of(spec: PreprocessSpec) -> Frame:
    """Return how faces of a store are found: by MNI millimetres only where preprocessing made sure of them.

    That is a spec that refuses what is not in MNI space, or registers to the MNI152 template itself. Any other grid
    (the demo's, an own one, an own template) may lie anywhere in its world: the head's own box decides.
    """
    sure = spec.space == "mni" or (spec.registration != "none" and spec.template == "mni152")
    return "template" if sure else "image"


def face_mask(image: npt.NDArray[np.floating], affine: npt.NDArray[np.float64], frame: Frame) -> Mask:
    """Return the voxels to hide, (X, Y, Z) bool, of an image (M, X, Y, Z) and its voxel -> RAS+ mm affine (4, 4).

    `template`: the affine leads to MNI millimetres. `image`: by the head's own box, nothing when the image is
    skull-stripped. `none`: nothing.
    """
    shape = image.shape[1:]
    if frame == "none":
        return np.zeros(shape, dtype=bool)
    # How far a voxel lies above the sloping plane through the origin, in mm.
    height = _along(shape, affine[2] - SLOPE * affine[1])
    if frame == "template":
        return height < -SLOPE * TEMPLATE_FRONT_MM
    foreground = foreground_of(image)
    if _volume_ml(foreground, affine) < HEAD_VOLUME_ML:
        return np.zeros(shape, dtype=bool)
    # The head's box to the voxel: every plane of the grid counts.
    places = np.stack([axis.ravel() for axis in np.nonzero(_hull(foreground))])
    y, z = (affine[row, :3] @ places + affine[row, 3] for row in (1, 2))
    back, front = float(y.min()), float(y.max())
    top = float(z.max()) + _cut_off_mm(foreground, affine)
    length = front - back
    return height < top - DEPTH_SHARE * length - SLOPE * (FRONT_SHARE * length + back)


def foreground_of(image: npt.NDArray[np.floating]) -> Mask:
    """Return where any channel of (M, X, Y, Z) exceeds a tenth of its 99th percentile of positive voxels."""
    result = np.zeros(image.shape[1:], dtype=bool)
    for channel in image:
        positive = channel[channel > 0]
        if positive.size:
            result |= channel > 0.1 * np.percentile(positive[:: max(len(positive) // 100_000, 1)], 99)
    return result


def _cut_off_mm(foreground: Mask, affine: npt.NDArray[np.float64]) -> float:
    """Return how much of the head's top is missing, in mm: a vertex that is whole ends in a small slice.

    The area of a slice at depth d of a sphere of radius R is nearly 2 pi R d.
    """
    step = float(np.abs(affine[2, :3]).max())
    rise = _along(foreground.shape, affine[2])
    top = float(rise[foreground].max())
    area = float((foreground & (rise > top - step)).sum()) * abs(float(np.linalg.det(affine[:3, :3]))) / step
    return max(0.0, area / (2 * np.pi * VERTEX_RADIUS_MM) - 2 * step)


def _hull(mask: Mask) -> Mask:
    """Return the voxels of a mask beside air along the first axis; they hold the extremes of any direction."""
    before, after = np.zeros_like(mask), np.zeros_like(mask)
    before[1:], after[:-1] = mask[:-1], mask[1:]
    return mask & ~(before & after)


def _along(shape: tuple[int, ...], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return weights[:3] . (i, j, k) + weights[3] of every voxel."""
    i, j, k = np.ogrid[tuple(slice(n) for n in shape)]
    return np.asarray(weights[0] * i + weights[1] * j + (weights[2] * k + weights[3]))


def _volume_ml(foreground: Mask, affine: npt.NDArray[np.float64]) -> float:
    return float(foreground.sum()) * abs(float(np.linalg.det(affine[:3, :3]))) / 1000
