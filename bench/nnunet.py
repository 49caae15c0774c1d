"""The peer for reading: a case in a blosc2 file laid out as nnU-Net v2 does (float32, Zstandard at level 8).

Blocks hold all channels and fit the L1 cache, chunks are made of blocks and fit a share of the L3 cache; the constants
are nnU-Net's. Source: nnU-Net v2, its dataset class for blosc2; the rule is written anew here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

L1_BYTES, L3_BYTES, SAFETY = 32768, 1441792, 0.8
MAX_OF_PATCH = 1.5
"""Mean edge of a chunk, in edges of the patch."""
ITEM = 4
"""Bytes of float32."""

Shape4 = tuple[int, int, int, int]


def layout(shape: Shape4, patch: Sequence[int]) -> tuple[Shape4, Shape4]:
    """Return blocks and chunks, both (channels, x, y, z), for an image of a shape and patches of training."""
    channels, *size = shape
    block = [2 ** math.ceil(math.log2(edge)) for edge in patch]
    while channels * math.prod(block) * ITEM > L1_BYTES * SAFETY:
        # The axis that is longest for its patch; the last one of equals.
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / patch[a], a))
        block[axis] = min(2 ** math.floor(math.log2(block[axis] - 1)), size[axis])
    block = [min(edge, length) for edge, length in zip(block, size, strict=True)]
    chunk = list(block)
    while channels * math.prod(chunk) * ITEM < L3_BYTES * SAFETY:
        free = [a for a in range(3) if chunk[a] < size[a]]
        if not free:
            break
        axis = min(free, key=lambda a: (chunk[a] / block[a], a))
        before = chunk[axis]
        chunk[axis] = min(before + block[axis], size[axis])
        if sum(c / p for c, p in zip(chunk, patch, strict=True)) / 3 > MAX_OF_PATCH:
            chunk[axis] = before
            break
    return (channels, *block), (channels, *chunk)


def write(path: Path, image: np.ndarray, patch: Sequence[int]) -> Path:
    """Write (channels, x, y, z) as nnU-Net would."""
    blosc2.set_nthreads(1)
    blocks, chunks = layout(image.shape, patch)
    packing = {"codec": blosc2.Codec.ZSTD, "clevel": 8}
    data = np.ascontiguousarray(image, dtype=np.float32)
    blosc2.asarray(data, urlpath=str(path), chunks=chunks, blocks=blocks, cparams=packing, mmap_mode="w+")
    return path


def read(path: Path, window: Sequence[slice]) -> Any:
    """Return a window of all channels; the file is opened for each sample, as nnU-Net's loader does."""
    data = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
    return data[(slice(None), *window)]
