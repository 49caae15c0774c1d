"""Volumes as grey pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def middle_slice(volume_XYZ: Tensor, axis: int = 2) -> NDArray[np.uint8]:
    """Return the middle slice of a volume in [0, 1] (values outside are clipped), the anterior or upper side on top."""
    plane = volume_XYZ.detach().float().cpu().select(axis, volume_XYZ.shape[axis] // 2)
    grey = torch.nan_to_num(plane).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return np.ascontiguousarray(np.rot90(grey))


def montage(rows: Sequence[Sequence[NDArray[np.uint8]]], gap: int = 2) -> NDArray[np.uint8]:
    """Return pictures in rows and columns on a dark ground, each centred in its cell, `gap` pixels apart.

    Raises ValueError when there are none.
    """
    if not rows or not rows[0]:
        raise ValueError("a montage needs at least one picture")
    height = max(picture.shape[0] for row in rows for picture in row)
    width = max(picture.shape[1] for row in rows for picture in row)
    columns = max(len(row) for row in rows)
    out = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap), 32, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top = i * (height + gap) + (height - picture.shape[0]) // 2
            left = j * (width + gap) + (width - picture.shape[1]) // 2
            out[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return out
