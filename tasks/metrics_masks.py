"""All scores of one region of one case: overlap, distances, volumes and lesions, with the rules for empty masks.

| target | prediction | Dice, NSD, lesion Dice, lesion F1 | HD95 | volume error | lesion sensitivity | false lesions |
|---|---|---|---|---|---|---|
| empty | empty | 1 | undefined, `both empty` | 0 ml; 0 | undefined, `both empty` | 0 |
| empty | not empty | 0 | undefined, `target empty` | in ml; the share undefined | undefined | counted |
| not empty | empty | 0 | undefined, `prediction empty` | in ml; 1 | 0 | 0 |

An undefined score is NaN with its note: left out of means, and counted beside them. Where all true lesions are too
small to count, the lesion sensitivity is undefined too (`no lesion counts`), and lesion Dice and F1 are 1 without a
false one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tasks.benchmarks import LesionRule
from tasks.metrics_lesions import compare_lesions
from tasks.metrics_surface import Mask, surface_distances

Entry = tuple[str, float, str]
"""Metric, value, note."""
UNDEFINED: frozenset[str] = frozenset({"hd95", "hd95_pooled", "volume_error", "lesion_sensitivity"})
"""Metrics that may be NaN, by the rules above."""


def region_scores(
    prediction: Mask, target: Mask, spacing_mm: Sequence[float], tolerance_mm: float, lesions: LesionRule | None
) -> Iterator[Entry]:
    """Yield the scores of one region but its Dice: two masks (X, Y, Z), the edges of a voxel in mm.

    Lesions are scored when there is a rule for them.
    """
    empty = {(False, False): "both empty", (True, False): "prediction empty", (False, True): "target empty"}.get(
        (bool(target.any()), bool(prediction.any())), ""
    )
    yield from _distances(prediction, target, spacing_mm, tolerance_mm, empty)
    yield from _volumes(prediction, target, spacing_mm, empty)
    if lesions is not None:
        yield from _lesions(prediction, target, spacing_mm, lesions, empty)


def _distances(
    prediction: Mask, target: Mask, spacing_mm: Sequence[float], tolerance_mm: float, empty: str
) -> Iterator[Entry]:
    if empty:
        yield "hd95", float("nan"), empty
        yield "hd95_pooled", float("nan"), empty
        yield "nsd", float(empty == "both empty"), ""
        return
    found = surface_distances(prediction, target, spacing_mm)
    yield "hd95", found.hd95, ""
    yield "hd95_pooled", found.hd95_pooled, ""
    yield "nsd", found.surface_dice(tolerance_mm), ""


def _volumes(prediction: Mask, target: Mask, spacing_mm: Sequence[float], empty: str) -> Iterator[Entry]:
    true = int(np.count_nonzero(target))
    gap = abs(int(np.count_nonzero(prediction)) - true)
    yield "volume_error_ml", gap * float(np.prod(spacing_mm)) / 1000, ""
    if empty == "target empty":
        yield "volume_error", float("nan"), empty
    else:
        yield "volume_error", gap / true if true else 0.0, ""


def _lesions(
    prediction: Mask, target: Mask, spacing_mm: Sequence[float], rule: LesionRule, empty: str
) -> Iterator[Entry]:
    found = compare_lesions(prediction, target, rule, float(np.prod(spacing_mm)))
    yield "lesion_dice", found.dice, ""
    yield "lesion_f1", found.f1, ""
    yield "lesion_sensitivity", found.sensitivity, "" if found.overlaps else empty or "no lesion counts"
    yield "false_lesions", float(found.false), ""
