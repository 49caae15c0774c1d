"""Descriptors of regions for training: chosen by name, and z-scored with the spread of the training cases.

Shapes: N cases, M measures, R regions. Unknown values are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.anatomy import ATLASES, Atlas
from models.records import SelectedCase


class NoDescriptorsError(ValueError):
    """Descriptors that a training needs are not in the store, and which."""


@dataclass(frozen=True)
class DescriptorScale:
    """What turns stored descriptors into z-scores."""

    mean: NDArray[np.float32]
    """(M, R) over the training cases that have the value, in the measure's unit."""
    std: NDArray[np.float32]
    """(M, R); 0 where the value does not vary over the training cases or none has it: it is left out everywhere."""
    cases: int
    """Training cases with any descriptor."""


def values_of(stored: Any, rows: Sequence[int], measures: Sequence[str], regions: Sequence[str]) -> NDArray[np.float32]:
    """Return (N, M, R) of rows of a `StoredDataset`, by name; all NaN when the dataset has no descriptors.

    Raises NoDescriptorsError naming a measure or region that the dataset's descriptors do not have.
    """
    found = stored.descriptors
    if found is None:
        return np.full((len(rows), len(measures), len(regions)), np.nan, np.float32)
    m, r = (
        _places(stored, what, wanted, held)
        for what, wanted, held in (("measure", measures, found.measures), ("region", regions, found.regions))
    )
    return np.asarray(found.values[np.ix_(list(rows), m, r)], dtype=np.float32)


def _places(stored: Any, what: str, wanted: Sequence[str], held: Sequence[str]) -> list[int]:
    places = {name: place for place, name in enumerate(held)}
    for name in wanted:
        if name not in places:
            raise NoDescriptorsError(
                f"dataset {stored.name} of {stored.url} has no {what} {name!r} in its descriptors; it has: "
                f"{', '.join(held)}"
            )
    return [places[name] for name in wanted]


def fit_scale(store: Any, train: Sequence[SelectedCase], measures: Sequence[str], atlas: Atlas) -> DescriptorScale:
    """Return mean and spread of the descriptors over training cases, and those alone.

    Raises NoDescriptorsError when no dataset of the cases has descriptors, when they differ in atlas or basis, or lack
    a measure, and when no region of a measure has two different values.
    """
    opened = {name: store.dataset(name) for name in sorted({case.dataset for case in train})}
    _check_layout(store, opened, atlas)
    parts = [
        values_of(opened[name], [case.row for case in train if case.dataset == name], measures, ATLASES[atlas])
        for name in opened
    ]
    values = np.concatenate(parts).astype(np.float64)
    known = np.isfinite(values)
    counts = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0).sum(axis=0) / counts
    std = np.sqrt(np.square(np.where(known, values - mean, 0)).sum(axis=0) / counts)
    varies = std > 1e-6 * np.abs(mean)
    for measure, some in zip(measures, varies.any(axis=1), strict=True):
        if not some:
            raise NoDescriptorsError(
                f"no region has two different values of {measure!r} among the {len(train)} training cases of "
                f"{store.url}, so the anatomical term has nothing to compare; leave it out of `measures`, or add cases "
                "with descriptors"
            )
    return DescriptorScale(
        np.where(varies, mean, 0).astype(np.float32),
        np.where(varies, std, 0).astype(np.float32),
        int(known.any(axis=(1, 2)).sum()),
    )


def _check_layout(store: Any, opened: dict[str, Any], atlas: str) -> None:
    having = {name: found for name, stored in opened.items() if (found := stored.descriptors) is not None}
    if not having:
        raise NoDescriptorsError(
            f"no dataset of {store.url} that is trained on ({', '.join(opened)}) has descriptors, which the anatomical "
            "term needs; catalog and preprocess them (docs/sources.md), or set weight_anatomy to 0"
        )
    for name, found in having.items():
        if found.atlas != atlas:
            raise NoDescriptorsError(
                f"dataset {name} of {store.url} has descriptors on atlas {found.atlas!r}, the training asks for "
                f"{atlas!r}; set `atlas`, or leave the dataset out"
            )
    bases = {found.basis: name for name, found in having.items()}
    if len(bases) > 1:
        said = ", ".join(f"{name}: {basis}" for basis, name in sorted(bases.items()))
        raise NoDescriptorsError(
            f"descriptors of {store.url} differ in basis ({said}): what different software measured is not comparable; "
            "train on datasets of one basis"
        )
