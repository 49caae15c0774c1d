"""The mean image of each modality over the training cases, in the template grid."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infra import storage
from models.heartbeat import beat
from models.records import SelectedCase, digest_of

FILE_NAME = "means.npz"
MAX_CASES = 256
"""A mean image of so many brains does not change visibly with more."""


def training_means(store: Any, cases: Sequence[SelectedCase], max_cases: int = MAX_CASES) -> np.ndarray:
    """Return float32 (M, X, Y, Z): per modality the voxel-wise mean over the cases that have it; zeros when none has.

    Cases lie in the grid at their stored origin; voxels outside a case's extent count as background. Of more than
    `max_cases` cases that have a modality every k-th is taken, so that a rare modality is averaged over its own cases.
    """
    modalities, grid = len(store.spec.modalities), tuple(store.spec.grid)
    total = np.zeros((modalities, *grid), np.float32)
    counts = np.zeros(modalities, np.int64)
    opened = {name: store.dataset(name) for name in sorted({case.dataset for case in cases})}
    infos = [opened[case.dataset].case_info(case.row) for case in cases]
    wanted = _spread([info.present for info in infos], modalities, max_cases)
    for number, (index, chosen) in enumerate(sorted(wanted.items()), start=1):
        beat(f"averaging images, case {number} of {len(wanted)}")
        # The window is the whole grid seen from the case: what overhangs the grid is cut at its border.
        start = tuple(-voxel for voxel in infos[index].origin)
        total[chosen] += opened[cases[index].dataset].read_crop(cases[index].row, chosen, start, grid)
        counts[chosen] += 1
    return total / np.maximum(counts, 1)[:, None, None, None].astype(np.float32)


def cached_training_means(folder: Path, store: Any, cases: Sequence[SelectedCase]) -> np.ndarray:
    """Return the training means, kept in the training's folder for the next start."""
    key = digest_of([store.spec.content_digest(), "by modality", MAX_CASES, sorted(case.digest for case in cases)])
    path = folder / FILE_NAME
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return kept["means"]
    means = training_means(store, cases)
    buffer = io.BytesIO()
    np.savez(buffer, means=means, key=np.asarray(key))
    storage.write_bytes(str(path), buffer.getvalue())
    return means


def _spread(present: Sequence[Sequence[bool]], modalities: int, limit: int) -> dict[int, list[int]]:
    """Return the modalities to read by case: of each modality's cases every k-th, at most `limit`."""
    wanted: dict[int, list[int]] = {}
    for m in range(modalities):
        having = [index for index, channels in enumerate(present) if channels[m]]
        for index in having[:: max(1, -(-len(having) // limit))]:
            wanted.setdefault(index, []).append(m)
    return wanted
