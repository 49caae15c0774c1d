"""Checks that decide whether the voxels of a volume can be used: finite, not constant, label values."""

from __future__ import annotations

import math

import torch

from models.records import Reason
from tasks.affines import BadScanError
from tasks.memory_order import extremes
from tasks.nifti import Volume

LABEL_MAX = 255
KEPT_MIN, KEPT_MAX = 1e-7, 65504.0
"""About the smallest and the largest positive number of float16."""
ROUNDING = 1e-3
"""A label may be this far from an integer: 3 can read as 2.9999999993 through the header's scaling."""


def finite(volume: Volume, share_max: float) -> Volume:
    """Replace NaN and infinities by 0 and count them in the flags; above share_max raises BadScanError."""
    data = volume.data
    # One pass over the voxels: the extremes are finite only if all voxels are.
    if not data.is_floating_point() or all(map(math.isfinite, extremes(data))):
        return volume
    good = torch.isfinite(data)
    count = data.numel() - int(good.sum())
    share = count / data.numel()
    if share > share_max:
        raise BadScanError(
            Reason.NOT_FINITE, f"{volume.name}: {share:.2%} of the voxels are NaN or infinite, at most {share_max:.2%}"
        )
    return volume.replace(data=torch.where(good, data, 0), flags={**volume.flags, "nan_replaced": count})


def varied(volume: Volume) -> Volume:
    """Return the volume unchanged; raises BadScanError when it is all zero or has one value everywhere."""
    low, high = extremes(volume.data)
    if low == high == 0:
        raise BadScanError(Reason.EMPTY, f"{volume.name}: all voxels are zero")
    if low == high:
        raise BadScanError(Reason.CONSTANT, f"{volume.name}: all voxels are {low:g}")
    return volume


def storable(volume: Volume) -> Volume:
    """Return intensities that are kept as they are: negative ones become 0 and are counted in the flags.

    Raises BadScanError for values that half precision cannot hold, and when nothing is left.
    """
    low, high = extremes(volume.data)
    if high < KEPT_MIN:
        raise BadScanError(Reason.EMPTY, f"{volume.name}: no value above {KEPT_MIN:g}, the smallest that is kept")
    if high > KEPT_MAX:
        raise BadScanError(
            Reason.INTENSITIES,
            f"{volume.name}: values up to {high:g} are to be kept, the store holds up to {KEPT_MAX:g}",
        )
    if low >= 0:
        return volume
    negative = int((volume.data < 0).sum())
    return volume.replace(data=volume.data.clamp_min(0), flags={**volume.flags, "negative_replaced": negative})


def as_label(volume: Volume) -> Volume:
    """Return a label image as uint8; raises BadScanError when values are not integers of 0..255."""
    data = volume.data
    rounded = data.round() if data.is_floating_point() else data
    off = float((data - rounded).abs().max()) if data.is_floating_point() else 0.0
    low, high = extremes(rounded)
    if off > ROUNDING or low < 0 or high > LABEL_MAX:
        raise BadScanError(
            Reason.LABEL_VALUES,
            f"{volume.name}: labels must be integers of 0..255, found values {low:g}..{high:g}, "
            f"up to {off:.3g} from an integer",
        )
    return volume.replace(data=rounded.to(torch.uint8))
