"""Cases of a store as a torch dataset, and the loaders that deal them to ranks.

The store is opened lazily in each process: zarr's event loop and the Rust codec's threads do not survive a fork.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from models.descriptors import values_of
from models.objectives.base import CaseInfo, Sampler
from models.records import SelectedCase
from models.sampler import SampleKey, sample_rng
from models.selection import Role, of_role, read_selection
from models.store import StoredCase, StoredDataset, open_store

# Samples outside training draw from a stream of their own, the same at every validation.
_FIXED_EPOCH = 0x7FFF_FFFF
LOADER_TIMEOUT_SECONDS = 300.0
"""A loader process that gives nothing for so long fails the training instead of hanging it; shorter than the patience
of the launcher, so that the rank itself says why."""


@dataclass(frozen=True)
class CaseReader:
    """Reads voxels of one case of a stored dataset."""

    stored: StoredDataset
    row: int

    def read(self, modality_indices: Sequence[int], start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Return float32 (n, x, y, z) of the given channels; zeros outside the case's extent."""
        return self.stored.read_crop(self.row, modality_indices, tuple(start), tuple(size))

    def read_label(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Return uint8 (x, y, z); zeros outside the case's extent."""
        return self.stored.read_label(self.row, tuple(start), tuple(size))

    def read_descriptors(self, measures: Sequence[str], regions: Sequence[str]) -> np.ndarray:
        """Return float32 (measures, regions) by name; NaN where unknown."""
        return values_of(self.stored, [self.row], measures, regions)[0]

    def read_connectome(self) -> np.ndarray:
        """Return float32 (R, R); NaN for missing regions."""
        return self.stored.read_connectome(self.row)


class CaseDataset(Dataset[dict[str, Any]]):
    """Map-style dataset over the selected cases of one role.

    Keys are `SampleKey(epoch, position, case)`; an integer i means `SampleKey(0, i, i)`. A sample is what the
    objective's sampler loads (arrays, integers, floats, strings) plus `case`, the case's id.

    >>> dataset = CaseDataset("demo.zarr", "selection.parquet", objective.sampler())  # doctest: +SKIP
    >>> dataset[0]["case"]  # doctest: +SKIP
    """

    def __init__(
        self,
        store: str,
        selection: Sequence[SelectedCase] | str | Path,
        sampler: Sampler,
        role: Role = "train",
        seed: int = 0,
    ) -> None:
        cases = read_selection(selection) if isinstance(selection, str | Path) else selection
        self.store_url = store
        self.cases = of_role(cases, role)
        self.sampler = sampler
        self.role = role
        self.seed = seed
        self._datasets: dict[str, StoredDataset] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_datasets": {}}

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        if isinstance(key, int):
            key = SampleKey(0, key, key)
        train = self.role == "train"
        rng = sample_rng(self.seed, key.epoch if train else _FIXED_EPOCH, key.position)
        info, reader = self.info(key.case), self.reader(key.case)
        draw = self.sampler.draw(info, rng, train)
        return {**self.sampler.load(info, reader, draw), "case": info.case}

    def info(self, index: int) -> CaseInfo:
        """Return what is known of a case without reading voxels."""
        case, stored = self.cases[index], self.stored(index)
        return CaseInfo(
            dataset=case.dataset,
            row=case.row,
            case=case.case,
            subject=case.subject,
            present=stored.present,
            extent=stored.extent,
            origin=stored.origin,
            target=case.target,
            person=case.person,
            age=case.age,
            has_connectome=self._open(case.dataset).has_connectome(case.row),
        )

    def stored(self, index: int) -> StoredCase:
        """Return what the store publishes of a case: its digest and where its voxels lie."""
        case = self.cases[index]
        return self._open(case.dataset).case_info(case.row)

    def reader(self, index: int) -> CaseReader:
        """Return the voxel reader of a case."""
        case = self.cases[index]
        return CaseReader(self._open(case.dataset), case.row)

    def _open(self, dataset: str) -> StoredDataset:
        if dataset not in self._datasets:
            self._datasets[dataset] = open_store(self.store_url).dataset(dataset)
        return self._datasets[dataset]


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch: arrays -> tensors, int -> int64, float -> float32, str -> list.

    Raises ValueError when the samples of a batch have different keys.
    """
    keys = list(samples[0])
    for sample in samples:
        if set(sample) != set(keys):
            raise ValueError(f"samples of one batch must have the same keys; {sorted(set(keys) ^ set(sample))} differ")
    return {key: _stack([sample[key] for sample in samples]) for key in keys}


def _stack(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.stack(values))
    if isinstance(first, str):
        return list(values)
    return torch.tensor(values, dtype=torch.float32 if isinstance(first, float) else torch.int64)


def make_loader(
    dataset: CaseDataset, batches: Iterable[list[SampleKey]], workers: int, pin_memory: bool = False
) -> DataLoader[dict[str, Any]]:
    """Return a loader over keyed batches; the samples do not depend on the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,
        timeout=LOADER_TIMEOUT_SECONDS if workers else 0,
        # Without its own generator a loader takes a number from torch's global one and changes what follows.
        generator=torch.Generator().manual_seed(dataset.seed),
    )


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on a device."""
    if device.type == "cpu":
        return dict(batch)
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
