"""What the supervised objectives share: input channels by name, and augmentation that is drawn before it is applied.

Source: BrainMVP's downstream protocol; here only left and right are swapped (the reference flips all three axes at
once, which mixes lateralised anatomy), and background stays 0, so that a missing modality stays a channel of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.config import DataConfig, TrainingConfig
from models.objectives.base import CaseInfo, Reader
from models.records import PreprocessSpec

LEFT_RIGHT = 0
"""Stored axis that runs from left to right (RAS+)."""


def channel_indices(modalities: Sequence[str], spec: PreprocessSpec) -> tuple[int, ...]:
    """Return where input modalities are in the store; raises ValueError naming one that it does not hold."""
    for name in modalities:
        if name not in spec.modalities:
            raise ValueError(f"the store has no modality {name!r}; it holds: {', '.join(spec.modalities)}")
    return tuple(spec.modalities.index(name) for name in modalities)


def check_input_channels(config: TrainingConfig, modalities: Sequence[str]) -> None:
    """Raise ValueError when the network's input does not have one channel per modality."""
    if config.network.in_channels != len(modalities):
        raise ValueError(
            f"network.in_channels must equal the number of modalities {tuple(modalities)}: "
            f"got {config.network.in_channels}, set it to {len(modalities)}"
        )


def read_channels(
    case: CaseInfo, reader: Reader, channels: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> NDArray[np.float32]:
    """Return (C, x, y, z); a modality that the case lacks is a channel of zeros and is not read."""
    image = np.zeros((len(channels), *size), dtype=np.float32)
    here = [i for i, channel in enumerate(channels) if case.present[channel]]
    if here:
        image[here] = reader.read([channels[i] for i in here], start, size)
    return image


def draw_augmentation(data: DataConfig, channels: int, rng: np.random.Generator, train: bool) -> dict[str, Any]:
    """Return `flip`, and `scale` and `shift` per channel within +- intensity_jitter; neutral when not training."""
    flip = bool(rng.random() < 0.5)
    scale, shift = rng.uniform(-1, 1, size=(2, channels)) * data.intensity_jitter
    if not train:
        return {"flip": False, "scale": [0.0] * channels, "shift": [0.0] * channels}
    return {"flip": flip and data.flip, "scale": scale.tolist(), "shift": shift.tolist()}


def augment(image: NDArray[np.float32], draw: Mapping[str, Any]) -> NDArray[np.float32]:
    """Flip, then v (1 + scale) + shift where v is not 0. Shape (C, x, y, z) is kept."""
    scale, shift = (np.asarray(draw[name], dtype=np.float32)[:, None, None, None] for name in ("scale", "shift"))
    out = flip_left_right(image, draw["flip"])
    return np.where(out != 0, out * (1 + scale) + shift, 0).astype(np.float32)


def flip_left_right(volume: NDArray[Any], flip: bool) -> NDArray[Any]:
    """Mirror the axis three from the end of (..., x, y, z)."""
    return np.ascontiguousarray(np.flip(volume, axis=LEFT_RIGHT - 3)) if flip else volume
