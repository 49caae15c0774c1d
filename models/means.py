"""The mean image of each modality over the training cases, in the template grid."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infra import storage
from models.records import SelectedCase, digest_of

FILE_NAME = "means.npz"
MAX_CASES = 256
"""A mean image of so many brains does not change visibly with more."""


def training_means(store: Any, cases: Sequence[SelectedCase], max_cases: int = MAX_CASES) -> np.ndarray:
    """Return float32 (M, X, Y, Z): per modality the voxel-wise mean over the cases that have it; zeros when none has.

    Cases lie in the grid at their stored origin; voxels outside a case's extent count as background. Of more than
    `max_cases` cases every k-th is taken.
    """
    modalities, grid = len(store.spec.modalities), tuple(store.spec.grid)
    total = np.zeros((modalities, *grid), np.float32)
    counts = np.zeros(modalities, np.int64)
    opened: dict[str, Any] = {}
    for case in _spread(cases, max_cases):
        stored = opened.get(case.dataset) or opened.setdefault(case.dataset, store.dataset(case.dataset))
        info = stored.case_info(case.row)
        present = [m for m in range(modalities) if info.present[m]]
        # The window is the whole grid seen from the case: what overhangs the grid is cut at its border.
        start = tuple(-voxel for voxel in info.origin)
        total[present] += stored.read_crop(case.row, present, start, grid)
        counts[present] += 1
    return total / np.maximum(counts, 1)[:, None, None, None].astype(np.float32)


def cached_training_means(folder: Path, store: Any, cases: Sequence[SelectedCase]) -> np.ndarray:
    """Return the training means, kept in the training's folder for the next start."""
    key = digest_of([store.spec.content_digest(), MAX_CASES, sorted(case.digest for case in cases)])
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


def _spread(cases: Sequence[SelectedCase], limit: int) -> list[SelectedCase]:
    step = -(-len(cases) // limit) if cases else 1
    return list(cases[::step])
