"""Embeddings by a frozen encoder, the mean over positions of its coarsest stage: of whole images, or of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.config import AnyNetwork
from models.config_cinp import ViT3DConfig
from models.gpu_turn import need_gpus
from models.networks.build import pool
from models.objectives.base import centred_start
from models.store import StoredDataset

BATCH = 4
"""Images in one forward pass: the result does not depend on it."""


def window_size(network: AnyNetwork, grid: Sequence[int]) -> tuple[int, int, int]:
    """Return the voxels that an encoder is given: its image size, or the whole grid, with edges rounded up to what it
    can take."""
    if isinstance(network, ViT3DConfig):
        return network.image_size
    step = network.edge_multiple
    x, y, z = (-(-int(edge) // step) * step for edge in grid)
    return x, y, z


def tile_starts(extent: Sequence[int], window: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return where the fewest evenly spaced windows start that cover an extent; on an axis that is shorter than the
    window there is one around its middle, which may start below 0."""
    axes = []
    for edge, want in zip(extent, window, strict=True):
        count = -(-int(edge) // want)
        last = int(edge) - want
        axes.append([last // 2] if count <= 1 else [round(k * last / (count - 1)) for k in range(count)])
    return [(x, y, z) for x in axes[0] for y in axes[1] for z in axes[2]]


def embed_windows(
    encoder: nn.Module,
    dataset: StoredDataset,
    rows: Sequence[int],
    channels: Sequence[int],
    window: tuple[int, int, int],
    done: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float32]:
    """Return the embeddings (N, dim) of stored rows by an encoder that was trained on crops of `window` voxels.

    The mean over the windows of `tile_starts` on the stored extent; windows of zeros alone are left out (a case without
    any other has the embedding of one such window). Arguments and errors are those of `embed_cases`.
    """
    encoder = encoder.to(inference_device()).eval()
    found: list[NDArray[np.float32]] = []
    for number, row in enumerate(rows):
        starts = tile_starts(dataset.case_info(row).extent, window)
        crops = (dataset.read_crop(row, channels, start, window) for start in starts)
        parts = [_embed(encoder, batch) for batch in _batches(crops)]
        parts = parts or [_embed(encoder, dataset.read_crop(row, channels, starts[0], window)[None])]
        found.append(np.concatenate(parts).mean(axis=0))
        _check_finite(found[-1][None], dataset, [row])
        done(number + 1)
    return np.stack(found)


def _batches(crops: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Yield crops (C, X, Y, Z) that are not all zeros, BATCH at a time: no more of them are in memory."""
    some: list[NDArray[np.float32]] = []
    for crop in crops:
        if crop.any():
            some.append(crop)
        if len(some) == BATCH:
            yield np.stack(some)
            some = []
    if some:
        yield np.stack(some)


def embed_cases(
    encoder: nn.Module,
    dataset: StoredDataset,
    rows: Sequence[int],
    channels: Sequence[int],
    size: tuple[int, int, int],
    done: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float32]:
    """Return the embeddings (N, dim) of stored rows, computed on the GPU if there is one.

    `channels` are the modalities of the store that the encoder gets, `size` the window around the middle of the grid;
    what a case does not fill is zeros. `done` is told how many cases are finished. Raises ValueError when an embedding
    is not finite.
    """
    encoder = encoder.to(inference_device()).eval()
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(rows), BATCH):
        images = [_image(dataset, row, channels, size) for row in rows[start : start + BATCH]]
        found.append(_embed(encoder, np.stack(images)))
        _check_finite(found[-1], dataset, rows[start : start + BATCH])
        done(min(start + BATCH, len(rows)))
    return np.concatenate(found)


def inference_device() -> torch.device:
    """Return where a frozen network computes: on a GPU if there is one, when it is this code's turn."""
    need_gpus()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def _embed(encoder: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return pool(encoder(torch.from_numpy(images).to(inference_device()))).float().cpu().numpy()


def _check_finite(found: NDArray[np.float32], dataset: StoredDataset, rows: Sequence[int]) -> None:
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        case = dataset.case_info(rows[int(np.flatnonzero(~finite)[0])]).case
        raise ValueError(f"the embedding of case {dataset.name}/{case} is not finite; the encoder has diverged")


def _image(
    dataset: StoredDataset, row: int, channels: Sequence[int], size: tuple[int, int, int]
) -> NDArray[np.float32]:
    start = centred_start(dataset.spec.grid, size, dataset.case_info(row).origin)
    return dataset.read_crop(row, channels, start, size)
