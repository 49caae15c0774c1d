"""What the training loop knows of a method: cases to samples (`Sampler`), samples to losses (`Objective`).

A sample is drawn first, as a JSON-able dict from the sample's own random generator, and loaded second, so a failing
batch can be replayed and no result depends on the number of loader processes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import OptimiserConfig
from models.records import SelectedCase

LOG = logging.getLogger(__name__)

Batch = dict[str, Any]
Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CaseInfo:
    """What is known of a case without reading its voxels."""

    dataset: str
    row: int
    case: str
    subject: str
    present: tuple[bool, ...]
    """By modality, in the order of the preprocessing spec."""
    extent: tuple[int, int, int]
    """Stored size in voxels."""
    origin: tuple[int, int, int]
    """Index of voxel 0 in the template grid."""
    target: str = ""
    """Class name for classification."""
    person: str = ""
    """Shared by the subjects that are one person; empty: the subject stands alone."""
    age: float | None = None
    """In years."""
    has_connectome: bool = False


class Reader(Protocol):
    """Voxels of one case."""

    def read(self, modality_indices: Sequence[int], start: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        """Return (n, x, y, z); start may be negative, zero outside the extent."""
        ...

    def read_label(self, start: Sequence[int], size: Sequence[int]) -> NDArray[np.uint8]:
        """Return (x, y, z); zero outside the extent."""
        ...

    def read_descriptors(self, measures: Sequence[str], regions: Sequence[str]) -> NDArray[np.float32]:
        """Return (measures, regions) by name, in their own units; NaN where unknown."""
        ...

    def read_connectome(self) -> NDArray[np.float32]:
        """Return the matrix (R, R) of a case that has one; NaN for missing regions."""
        ...


class Sampler(Protocol):
    """Turns a case into one training sample; picklable and without networks, for loader processes."""

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return every random choice of the sample, JSON-able."""
        ...

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the sample: arrays, ints, floats and strings, which the loop stacks into a batch."""
        ...


@dataclass(frozen=True)
class Clock:
    """Where the training is. Epochs count from 0, optimiser steps too."""

    step: int
    epoch: int
    generator: torch.Generator | None = None


@dataclass
class Transfer:
    """What became of pre-trained tensors: names loaded, and why the others were not."""

    loaded: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """A method: its networks, losses, metrics and pictures."""

    encoder: nn.Module
    transfer: Transfer | None = None
    """Set by `load_pretrained`."""

    def fit(self, store: Any, train: Sequence[SelectedCase]) -> None:
        """Learn what is counted, not trained, from the training cases (`SelectedCase`) of a store, before the first
        sampler is made. What is kept belongs into buffers. Raises ValueError for cases that cannot be used."""

    @abstractmethod
    def sampler(self) -> Sampler:
        """Return what makes samples of cases."""

    @abstractmethod
    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return scalar losses; `loss` is the one to differentiate, the others are detached."""

    @abstractmethod
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return (sum, count) by metric, to be added over batches and ranks. No collective calls are made."""

    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return grey pictures (H, W) or colour ones (H, W, 3) by name."""
        return {}

    def idle_terms(self, cases: Sequence[CaseInfo]) -> list[str]:
        """Say which loss terms these training cases can never give."""
        return []

    def parameter_groups(self, optimiser: OptimiserConfig) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups."""
        return [
            {
                "name": "network",
                "params": list(self.parameters()),
                "lr": optimiser.lr,
                "weight_decay": optimiser.weight_decay,
            }
        ]

    def exports(self) -> dict[str, Tensor]:
        """Return the tensors of weights.safetensors: all weights and buffers, contiguous, on the CPU."""
        return {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}

    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy what fits from a finished training's tensors and return the names loaded.

        The rest is logged and kept in `transfer.left_out` with the reason. Raises ValueError for an encoder of
        another architecture.
        """
        self.transfer = transfer_tensors(self, tensors)
        return self.transfer.loaded

    def use_channels_last(self) -> None:
        """Lay out convolution weights as channels_last_3d; activations follow. Other tensors are not 5-dimensional."""
        for parameter in self.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return next(self.parameters()).device


STEMS = (
    *("encoder.patch_embed1.proj.weight", "encoder.stem.weight"),
    *("encoder.conv1.weight", "encoder.patch_embed.weight"),
)
"""Weights that read the image, by network."""


def transfer_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Transfer:
    """Copy tensors of equal name and shape into a module; its encoder must be that of the tensors.

    A first stem trained on one channel is repeated over the module's C channels and divided by C, which keeps the
    scale of its response (our choice; the reference drops it). Decoders, heads and templates may differ (`Transfer`).
    """
    own, result = module.state_dict(), Transfer()
    fitting: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name not in own:
            result.left_out[name] = "no such tensor here"
            continue
        if name in STEMS and value.shape[1] == 1 and own[name].shape[1] > 1:
            channels = own[name].shape[1]
            value = value.repeat(1, channels, 1, 1, 1) / channels
        if value.shape != own[name].shape:
            result.left_out[name] = f"shape {tuple(value.shape)} is not {tuple(own[name].shape)}"
            continue
        fitting[name] = value
    _check_encoder(own, fitting, result.left_out)
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    result.loaded = list(fitting)
    for name, why in result.left_out.items():
        LOG.info("pre-trained tensor not loaded: %s: %s", name, why)
    return result


def _check_encoder(own: Mapping[str, Tensor], fitting: Mapping[str, Tensor], left_out: Mapping[str, str]) -> None:
    """Refuse an encoder of another architecture: half of it would be random without a word."""
    mine = [name for name in own if name.startswith("encoder.")]
    wrong = {name: why for name, why in left_out.items() if name.startswith("encoder.") and name not in STEMS}
    absent = {name: "absent from the pre-training" for name in mine if name not in fitting and name not in left_out}
    if wrong or absent:
        name, why = next(iter({**wrong, **absent}.items()))
        raise ValueError(
            f"the pre-training has another encoder: {name}: {why} ({len(wrong) + len(absent)} such tensors, "
            f"{len(mine)} are expected); use the NetworkConfig of the pre-training"
        )


def draw_start(extent: Sequence[int], crop: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Return a uniform crop start per axis; a crop larger than the case is centred (negative start)."""
    return [
        int(rng.integers(0, have - want + 1)) if have >= want else -((want - have) // 2)
        for have, want in zip(extent, crop, strict=True)
    ]


def centred_start(grid: Sequence[int], crop: Sequence[int], origin: Sequence[int]) -> list[int]:
    """Return the start of a crop in the middle of the template grid, in voxels of the case at `origin`."""
    return [(whole - want) // 2 - corner for whole, want, corner in zip(grid, crop, origin, strict=True)]


def read_size(crop: tuple[int, int, int], grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the voxels that a training reads: its crop, or the whole grid for a crop of (0, 0, 0)."""
    return crop if any(crop) else grid


def sum_and_count(values: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (sum, count) of per-case values (B,), of the valid ones only."""
    keep = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    return values.detach()[keep].sum(), keep.sum().to(values.dtype)
