"""Small cases in memory, for tests of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.config import AnyNetwork, BrainMVPConfig, DataConfig, NetworkConfig, ObjectiveConfig, TrainingConfig
from models.objectives.base import Batch, CaseInfo, Sampler
from models.records import MODALITIES
from models.spec import PreprocessSpec

GRID = (40, 44, 36)
SPEC = PreprocessSpec(name="test", spacing_mm=4.0, grid=GRID)
NETWORK = NetworkConfig(embed_dims=(4, 8, 16, 32), depths=(1, 1, 1, 1), head_dim=8, decoder_dim=4)
RECOMMENDED = BrainMVPConfig(
    weight_contrast=0.02, contrast_from_epoch=0, temperature=0.1, projector_dim=8, template_init="mean"
)


@dataclass(frozen=True)
class MemoryReader:
    """Reads a case from arrays and remembers which channels were asked for."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    asked: list[int]

    def read(self, modality_indices: Sequence[int], start: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        self.asked.extend(modality_indices)
        return np.stack([_window(self.image[m], start, size) for m in modality_indices])

    def read_label(self, start: Sequence[int], size: Sequence[int]) -> NDArray[np.uint8]:
        return _window(self.label, start, size)


def _window(volume: NDArray, start: Sequence[int], size: Sequence[int]) -> NDArray:
    edge = max(size)
    padded = np.pad(volume, edge)
    return padded[tuple(slice(s + edge, s + edge + n) for s, n in zip(start, size, strict=True))]


def make_case(
    number: int,
    present: Sequence[str] = MODALITIES,
    extent: tuple[int, int, int] = (36, 40, 34),
    origin: tuple[int, int, int] = (2, 2, 1),
    target: str = "",
) -> tuple[CaseInfo, MemoryReader]:
    """An ellipsoid 'brain' whose modalities are different functions of one smooth field; label 1 and 2 in a corner."""
    rng = np.random.default_rng(number)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in extent), indexing="ij")
    phase = rng.uniform(0, 6, size=3)
    field = sum(np.sin(3 * axis + p) for axis, p in zip(axes, phase, strict=True)) / 6 + 0.5
    brain = sum(axis**2 for axis in axes) < 0.9
    image = np.stack([brain * (field ** (1 + 0.4 * m) * 0.9 + 0.1) for m in range(8)]).astype(np.float32)
    image *= np.isin(MODALITIES, present)[:, None, None, None]
    label = np.zeros(extent, np.uint8)
    label[8:16, 8:16, 8:16], label[10:14, 10:14, 10:14] = 1, 2
    info = CaseInfo("test", number, f"case{number}", f"subject{number}", tuple(m in present for m in MODALITIES),
                    extent, origin, target)  # fmt: skip
    return info, MemoryReader(image, label, [])


def make_config(objective: ObjectiveConfig, network: AnyNetwork = NETWORK, **data: object) -> TrainingConfig:
    values: dict = {"store": "", "selection": "", "crop": (32, 32, 32), "batch_size": 4, **data}
    return TrainingConfig(
        name="test", recipe="test", network=network, objective=objective, data=DataConfig(**values), epochs=1
    )


def make_means() -> NDArray[np.float32]:
    """Mean images of four cases in the template grid."""
    means = np.zeros((8, *GRID), np.float32)
    for number in range(4):
        info, reader = make_case(number)
        means += reader.read(range(8), [-o for o in info.origin], GRID) / 4
    return means


def make_batch(
    sampler: Sampler, cases: Sequence[tuple[CaseInfo, MemoryReader]], train: bool = True, seed: int = 0
) -> Batch:
    """Draw and load every case and stack, as the training loop does."""
    samples = []
    for position, (info, reader) in enumerate(cases):
        draw = sampler.draw(info, np.random.default_rng([seed, position]), train)
        samples.append(sampler.load(info, reader, draw))
    return {key: _stack([sample[key] for sample in samples]) for key in samples[0]}


def _stack(values: list) -> torch.Tensor:
    return torch.from_numpy(np.stack(values)) if isinstance(values[0], np.ndarray) else torch.tensor(values)
