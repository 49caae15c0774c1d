"""Intensities: exact percentiles by counting, scaling to [0, 1], and what quality control wants to know.

No step sorts a volume: integer images have at most 65,536 values, so a histogram holds everything; real-valued ones
are counted in bins, and only the one bin that holds the wanted rank is looked into. Steps run where their tensor is.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from models.records import Reason
from models.spec import PreprocessSpec
from tasks.affines import BadScanError
from tasks.memory_order import axes_by_stride, extremes, flat

BINS = 8192
"""Of one counting pass over real values: the counters fit a core's second cache."""
FEW = 65_536
"""Values that are sorted instead of counted again."""
SLAB_VOXELS = 1 << 18
"""Voxels that are scaled at once: they stay in the cache between the operations."""
NOISE_ROWS = 8
"""Rows along y on which the noise is measured: some 100,000 differences of neighbours are enough for a median."""


def intensity_range(data: torch.Tensor, zeros: int, spec: PreprocessSpec, name: str) -> tuple[float, float]:
    """Return the intensities at the spec's percentiles of a cropped modality.

    data: its voxels, any shape; zeros: how many more voxels the crop has, all 0. A spec that keeps intensities has 0
    and 1. Raises BadScanError if the two percentiles coincide.
    """
    if spec.intensity == "keep":
        return 0.0, 1.0
    values = flat(data)
    if spec.percentile_region == "foreground":
        values, zeros = values[values > 0], 0
    if not values.numel():
        raise BadScanError(Reason.EMPTY, f"{name}: no voxel above zero inside the crop {tuple(data.shape)}")
    low, high = percentiles(values, spec.percentiles, zeros)
    if not high > low:
        raise BadScanError(
            Reason.CONSTANT, f"{name}: percentiles {spec.percentiles[0]:g} and {spec.percentiles[1]:g} are both {low:g}"
        )
    return low, high


def percentiles(values: torch.Tensor, wanted: tuple[float, ...], zeros: int = 0) -> tuple[float, ...]:
    """Return the exact percentiles of 1-D values and `zeros` more values 0, as `numpy.percentile` (linear) has them.

    Source: Hyndman and Fan (1996), type 7.
    """
    places = [percent / 100 * (values.numel() + zeros - 1) for percent in wanted]
    ranks = sorted({rank for place in places for rank in (math.floor(place), math.ceil(place))})
    pick = _of_reals if values.is_floating_point() else _of_integers
    found = dict(zip(ranks, pick(values, ranks, zeros), strict=True))
    ends = [(found[math.floor(place)], found[math.ceil(place)], place % 1) for place in places]
    return tuple(low + (high - low) * share for low, high, share in ends)


def _of_integers(values: torch.Tensor, ranks: list[int], zeros: int) -> list[float]:
    """Return the values at some ranks (0 is the smallest) of a histogram with one bin per value."""
    low, high = (int(end) for end in extremes(values))
    if zeros:
        low, high = min(low, 0), max(high, 0)
    shifted = values.int() - low if low < 0 else values
    base = min(low, 0)
    counts = torch.bincount(shifted, minlength=high - base + 1)
    if zeros:
        counts[-base] += zeros
    return [float(place + base) for place in _bins_of(counts, ranks)[0]]


def _of_reals(values: torch.Tensor, ranks: list[int], zeros: int) -> list[float]:
    """Return the values at some ranks: find the bin of each by counting, then look among its few values only."""
    low, high = extremes(values)
    if low == high and (not zeros or low == 0):
        return [low] * len(ranks)
    if values.numel() <= FEW:
        return _of_few(values, ranks, zeros)
    low, high = (min(low, 0.0), max(high, 0.0)) if zeros else (low, high)
    # Rounding keeps the order of values, so bins hold consecutive ranks whatever the rounding errors.
    factor = torch.tensor((BINS - 1) / (high - low), dtype=torch.float32, device=values.device)
    bins = torch.empty(values.shape, dtype=torch.int16, device=values.device)
    for part, out in zip(values.split(SLAB_VOXELS), bins.split(SLAB_VOXELS), strict=True):
        out.copy_(part.sub(low).mul_(factor).clamp_(0, BINS - 1))
    counts = torch.bincount(bins, minlength=BINS)
    nought = int(torch.zeros((), device=values.device).sub(low).mul(factor).clamp(0, BINS - 1)) if zeros else -1
    if zeros:
        counts[nought] += zeros
    found = dict.fromkeys(ranks, 0.0)
    places, inner = _bins_of(counts, ranks)
    for place in set(places):
        mine = [n for n, other in enumerate(places) if other == place]
        members = _members(values, bins, place)
        if members.numel():
            exact = _of_reals(members, [inner[n] for n in mine], zeros if place == nought else 0)
            found.update(zip((ranks[n] for n in mine), exact, strict=True))
    return list(found.values())


def _members(values: torch.Tensor, bins: torch.Tensor, place: int) -> torch.Tensor:
    """Return the values in one bin. On the CPU numpy picks the few true places five times faster than torch."""
    if values.is_cuda:
        return values[bins == place]
    return torch.from_numpy(values.numpy()[np.flatnonzero(bins.numpy() == place)])


def _of_few(values: torch.Tensor, ranks: list[int], zeros: int) -> list[float]:
    ordered = torch.sort(values).values
    below = int((ordered < 0).sum())
    found = []
    for rank in ranks:
        if below <= rank < below + zeros:
            found.append(0.0)
        else:
            found.append(float(ordered[rank if rank < below else rank - zeros]))
    return found


def _bins_of(counts: torch.Tensor, ranks: list[int]) -> tuple[list[int], list[int]]:
    """Return for each rank the bin that holds it and its rank inside the bin."""
    above = counts.cumsum(0)
    places = torch.searchsorted(above, torch.tensor(ranks, device=counts.device), right=True)
    before = (above - counts)[places]
    return [int(p) for p in places], [rank - int(b) for rank, b in zip(ranks, before, strict=True)]


def scale(data: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Map low to 0 and high to 1, clip to [0, 1]; float16 in the same order in memory.

    Never minus zero: it would not survive the store.
    """
    out = torch.empty_like(data, dtype=torch.float16)
    if not data.numel():
        return out
    slow = axes_by_stride(data)[0]
    planes = max(1, SLAB_VOXELS * data.shape[slow] // data.numel())
    for part, target in zip(data.split(planes, slow), out.split(planes, slow), strict=True):
        # A division instead of a product with the reciprocal: `high` becomes exactly 1.
        target.copy_(part.float().sub_(low).div_(high - low).clamp_(0, 1).add_(0.0))
    return out


def signal(channel: np.ndarray) -> tuple[float, int]:
    """Return the sum of the voxels of a channel and how many are above zero; channel: (x, y, z) float16 of 0..1."""
    rows = flat(torch.from_numpy(channel))
    total = sum(float(part.float().sum()) for part in rows.split(SLAB_VOXELS))
    # Above zero is the same as any bit set: there is neither a minus zero nor a negative voxel.
    return total, int(np.count_nonzero(channel.view(np.int16)))


def noise(channel: np.ndarray) -> float:
    """Return the noise of a channel: the robust spread of the differences of neighbours along x.

    channel: (x, y, z) float16 of 0..1. sigma = median |x_i - x_(i+1)| / (0.6745 sqrt 2) for Gaussian noise; anatomy
    raises it, so this is an upper bound. The median is taken over some NOISE_ROWS evenly spaced rows along y; 0 without
    any pair of neighbours above zero.
    """
    rows = channel[:, :: max(1, channel.shape[1] // NOISE_ROWS)].astype(np.float32)
    steps = np.abs(np.diff(rows, axis=0))[(rows[1:] > 0) & (rows[:-1] > 0)]
    return float(np.median(steps)) / (0.6745 * 2**0.5) if steps.size else 0.0
