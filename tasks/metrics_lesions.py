"""Lesion by lesion: which were found, how well they overlap, and how many predicted ones are none.

A lesion is a set of voxels that touch, corners included (26 neighbours). True lesions whose dilations touch are one
lesion. A predicted component belongs to every true lesion whose dilation it meets. A true lesion has the Dice of its
voxels with all predicted components that belong to it, 0 when there is none; a predicted component that belongs to none
is a false lesion. True lesions at or below the smallest volume do not count, predicted components always do.

Sources: the lesion-wise Dice of BraTS 2023 (Saluja et al., BraTS-2023-Metrics), whose outputs on phantoms are kept as a
golden file; with no dilation and no smallest volume, detection is that of ISLES 2022 (de la Rosa et al.).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tasks.benchmarks import LesionRule
from tasks.metrics_surface import Mask, union_box

TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""26 neighbours."""
STEP = ndimage.generate_binary_structure(3, 2)
"""One step of a dilation, 18 neighbours, as BraTS 2023 has it."""


@dataclass(frozen=True)
class Lesions:
    """What a prediction makes of the true lesions of one region."""

    overlaps: tuple[float, ...]
    """Dice of each true lesion that counts."""
    found: int
    """True lesions that count and that a predicted component meets."""
    false: int
    """Predicted components that meet no true lesion."""

    @property
    def dice(self) -> float:
        """Mean Dice over true lesions and false ones, which have 0; 1 when there is neither."""
        total = len(self.overlaps) + self.false
        return sum(self.overlaps) / total if total else 1.0

    @property
    def sensitivity(self) -> float:
        """Share of true lesions that were found; NaN without one."""
        return self.found / len(self.overlaps) if self.overlaps else float("nan")

    @property
    def f1(self) -> float:
        """2 found / (2 found + missed + false); 1 when there is nothing to find and nothing false."""
        total = self.found + len(self.overlaps) + self.false
        return 2 * self.found / total if total else 1.0


def compare_lesions(prediction: Mask, target: Mask, rule: LesionRule, voxel_mm3: float) -> Lesions:
    """Return how the lesions of a true mask (X, Y, Z) were found; voxel_mm3: volume of a voxel."""
    box = union_box([prediction, target], margin=rule.dilation + 1)
    if box is None:
        return Lesions((), 0, 0)
    predicted, _ = ndimage.label(prediction[box], TOUCHING)
    sizes = np.bincount(predicted.ravel())
    matched = np.zeros(len(sizes), dtype=bool)
    overlaps, found = [], 0
    for lesion, near in _true_lesions(target[box], rule):
        meets = np.unique(predicted[near])
        meets = meets[meets > 0]
        matched[meets] = True
        size = int(lesion[0].size)
        if size * voxel_mm3 <= rule.min_volume_mm3:
            continue
        inside = int(np.isin(predicted[lesion], meets).sum())
        overlaps.append(2 * inside / (size + int(sizes[meets].sum())))
        found += bool(meets.size)
    return Lesions(tuple(overlaps), found, int((~matched[1:]).sum()))


Voxels = tuple[npt.NDArray[np.intp], ...]


def _true_lesions(target: Mask, rule: LesionRule) -> list[tuple[Voxels, Voxels]]:
    """Return the voxels of each true lesion and those of its dilation."""
    wide = _dilated(target, rule.dilation)
    groups, _ = ndimage.label(wide, TOUCHING)
    lesions = []
    for number, box in enumerate(ndimage.find_objects(groups), start=1):
        near = groups[box] == number  # the dilation of a merged lesion is the whole of its group
        starts = [s.start for s in box]
        lesions.append((_moved(near & target[box], starts), _moved(near, starts)))
    return lesions


def _dilated(mask: Mask, steps: int) -> Mask:
    return np.asarray(ndimage.binary_dilation(mask, STEP, iterations=steps)) if steps else mask


def _moved(mask: Mask, starts: list[int]) -> Voxels:
    return tuple(axis + start for axis, start in zip(np.nonzero(mask), starts, strict=True))
