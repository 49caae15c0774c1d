"""Embeddings of whole images by a frozen encoder: the mean over positions of its coarsest stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import AnyNetwork
from models.config_cinp import ViT3DConfig
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder.to(device).eval()
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(rows), BATCH):
        images = [_image(dataset, row, channels, size) for row in rows[start : start + BATCH]]
        found.append(_embed(encoder, torch.from_numpy(np.stack(images)).to(device)))
        if not np.isfinite(found[-1]).all():
            bad = int(np.flatnonzero(~np.isfinite(found[-1]).all(axis=1))[0])
            case = dataset.case_info(rows[start + bad]).case
            raise ValueError(f"the embedding of case {dataset.name}/{case} is not finite; the encoder has diverged")
        done(min(start + BATCH, len(rows)))
    return np.concatenate(found)


@torch.inference_mode()
def _embed(encoder: nn.Module, images: Tensor) -> NDArray[np.float32]:
    return pool(encoder(images)).float().cpu().numpy()


def _image(
    dataset: StoredDataset, row: int, channels: Sequence[int], size: tuple[int, int, int]
) -> NDArray[np.float32]:
    start = centred_start(dataset.spec.grid, size, dataset.case_info(row).origin)
    return dataset.read_crop(row, channels, start, size)
