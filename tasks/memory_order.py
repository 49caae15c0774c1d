"""Tensors as they lie in memory. Files have their first axis fast, torch expects the last: reductions over a view
whose axes are out of order take up to a hundred times longer."""

from __future__ import annotations

import torch


def axes_by_stride(data: torch.Tensor) -> list[int]:
    """Return the axes from the slowest in memory to the fastest."""
    strides = data.stride()
    return sorted(range(data.dim()), key=lambda axis: -strides[axis])


def flat(data: torch.Tensor) -> torch.Tensor:
    """Return the voxels as one row in the order of memory, which costs no copy for a dense tensor."""
    return data.permute(axes_by_stride(data)).reshape(-1)


def extremes(data: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest voxel; NaN if any voxel is NaN."""
    low, high = torch.aminmax(flat(data))
    return float(low), float(high)
