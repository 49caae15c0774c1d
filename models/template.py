"""BrainMVP's template bank: one learnable image per modality in template space.

Per use the modality's whole image is normalised, (T - min) / (max - min + 1e-9), then a window is cut (reference code).
Its gradient is exact and compact: the window, and the two voxels that hold the minimum and the maximum. With ties the
first voxel counts, so a flat image (the reference's zero start) does not spread gradient over millions of voxels.

In training the gradient is sparse, in rows along z: ranks send, and the optimiser moves, only the rows that a step has
touched. Moments are lazy: see `models.optimiser.Mixed`.

A flat image has a range of 0, so its gradient is 1e9 times the window's: the first optimiser step is arbitrary and
Adam's second moment remembers it for thousands of steps. Start from mean images (`template_init="mean"`) to avoid it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.records import MODALITIES

EPSILON = 1e-9

Slices = tuple[slice, slice, slice]


def overlap(start: Sequence[int], size: Sequence[int], grid: Sequence[int]) -> tuple[Slices, Slices] | None:
    """Return where a window lies in the grid and in itself, or None when they do not meet.

    `start` may be negative and the window may be larger than the grid.
    """
    low = [max(0, s) for s in start]
    high = [min(g, s + n) for s, n, g in zip(start, size, grid, strict=True)]
    if any(b <= a for a, b in zip(low, high, strict=True)):
        return None
    inside = [slice(a, b) for a, b in zip(low, high, strict=True)]
    window = [slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True)]
    return (inside[0], inside[1], inside[2]), (window[0], window[1], window[2])


def cut(image: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return the window of a (X, Y, Z) image, zero outside it."""
    out = image.new_zeros(tuple(size))
    if where := overlap(start, size, image.shape):
        out[where[1]] = image[where[0]]
    return out


class NormalisedWindows(torch.autograd.Function):
    """Windows of min-max normalised images, with a gradient that touches only what they depend on."""

    @staticmethod
    def forward(
        ctx: Any, bank: Tensor, modality: list[int], start: list[list[int]], size: tuple[int, int, int], sparse: bool
    ) -> Tensor:
        """Bank (M, X, Y, Z), B modality indices and B window starts in voxels -> (B, *size)."""
        flat = bank.detach().flatten(1)
        extremes = {m: (int(flat[m].argmin()), int(flat[m].argmax())) for m in sorted(set(modality))}
        windows = bank.new_zeros((len(modality), *size))
        ranges = []
        for window, m, corner in zip(windows, modality, start, strict=True):
            low, high = (flat[m, voxel] for voxel in extremes[m])
            ranges.append(high - low + EPSILON)
            if where := overlap(corner, size, bank.shape[1:]):
                window[where[1]] = (bank[m][where[0]] - low) / ranges[-1]
        ctx.save_for_backward(windows, torch.stack(ranges))
        ctx.extremes, ctx.modality, ctx.start, ctx.sparse, ctx.shape = extremes, modality, start, sparse, bank.shape
        return windows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the bank, dense or as a sparse COO tensor of rows along z."""
        windows, ranges = ctx.saved_tensors
        grid = ctx.shape[1:]
        rows = [torch.zeros(0, dtype=torch.long, device=windows.device)]
        values = [windows.new_zeros((0, grid[2]))]
        for b, (m, corner) in enumerate(zip(ctx.modality, ctx.start, strict=True)):
            where = overlap(corner, windows.shape[1:], grid)
            if where is None:
                continue
            gradient, y = gradients[0][b][where[1]] / ranges[b], windows[b][where[1]]
            inside = windows.new_zeros((*gradient.shape[:2], grid[2]))
            inside[..., where[0][2]] = gradient
            # dy/dmin = (y - 1) / range, dy/dmax = -y / range
            two = torch.stack([(gradient * (y - 1)).sum(), -(gradient * y).sum()])
            pair = torch.tensor(ctx.extremes[m], device=y.device)
            row, z = pair // grid[2], pair % grid[2]
            values += [inside.flatten(0, 1), windows.new_zeros((2, grid[2])).scatter_(1, z[:, None], two[:, None])]
            rows += [at + m * grid[0] * grid[1] for at in (_rows(where[0], grid, y.device), row)]
        places = torch.stack(torch.unravel_index(torch.cat(rows), ctx.shape[:3]))
        sparse = torch.sparse_coo_tensor(places, torch.cat(values), ctx.shape, check_invariants=False)
        return sparse if ctx.sparse else sparse.to_dense(), None, None, None, None


def _rows(where: Slices, grid: torch.Size, device: torch.device) -> Tensor:
    x, y = (torch.arange(axis.start, axis.stop, device=device) for axis in where[:2])
    return (x[:, None] * grid[1] + y).reshape(-1)


class TemplateBank(nn.Module):
    """One learnable image per modality of `MODALITIES`, in the voxels of the template grid.

    `sparse` makes the gradient a sparse COO tensor, for optimisers that take one (as in nn.Embedding).
    """

    def __init__(self, grid: tuple[int, int, int], sparse: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.sparse = sparse
        self.bank = nn.Parameter(torch.zeros(len(MODALITIES), *grid))

    def start_from(self, images: NDArray[np.float32]) -> None:
        """Set the bank to images (8, X, Y, Z) in the order of `MODALITIES`; raises ValueError on another shape."""
        if images.shape != tuple(self.bank.shape):
            raise ValueError(f"templates must have shape {tuple(self.bank.shape)} (modality, x, y, z): {images.shape}")
        with torch.no_grad():
            self.bank.copy_(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)))

    def forward(self, modality: Tensor, start: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Template indices (B,) and window starts (B, 3) in template voxels -> normalised windows (B, *size).

        Zero outside the bank. Raises IndexError for an index that is no modality.
        """
        chosen = [int(m) for m in modality.tolist()]
        if bad := [m for m in chosen if not 0 <= m < len(MODALITIES)]:
            known = f"0..{len(MODALITIES) - 1} ({', '.join(MODALITIES)})"
            raise IndexError(f"template index must be in {known}, got {bad[0]}")
        return NormalisedWindows.apply(self.bank, chosen, start.tolist(), size, self.sparse)

    @torch.no_grad()
    def normalised(self) -> Tensor:
        """Return all templates, each scaled to [0, 1], as (8, X, Y, Z)."""
        low = self.bank.amin(dim=(1, 2, 3), keepdim=True)
        high = self.bank.amax(dim=(1, 2, 3), keepdim=True)
        return (self.bank - low) / (high - low + EPSILON)
