"""Samples of CINP: a whole image, its connectome where there is one, and every random choice of the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.masking import kept_blocks
from models.objectives.base import CaseInfo, Reader, centred_start
from models.objectives.contrast import identity_of

LEAST_REGIONS = 3


@dataclass(frozen=True)
class PairSampler:
    """Reads one modality around the middle of the grid, and the connectome; zeros outside the case."""

    modality: str
    channel: int
    """Of the modality in the store."""
    grid: tuple[int, int, int]
    size: tuple[int, int, int]
    """Voxels that are read, around the middle of the grid."""
    patches: int
    """Of an image."""
    mask_rate: float
    regions: int
    """Of the store's connectomes; 0: none are read."""

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return the start of the window, the visible patches, and two numbers in 0..1 that pick hard negatives.

        Raises ValueError for a case without the modality.
        """
        if not case.present[self.channel]:
            raise ValueError(
                f"case {case.dataset}/{case.case} has no modality {self.modality!r}; leave it out of the selection"
            )
        visible = rng.permutation(self.patches)[: kept_blocks(self.patches, self.mask_rate)]
        return {
            "start": centred_start(self.grid, self.size, case.origin),
            "visible": sorted(visible.tolist()),
            "pick": rng.random(2, dtype=np.float32).tolist(),
        }

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Return `image` (x, y, z), `visible` (K,), `identity` of the subject and, where connectomes are used,
        `network` (R, R) with NaN for missing regions, `paired` (1; 0 and zeros without a connectome), `pick` (2,).

        Raises ValueError for a connectome of another size, and for one without three regions.
        """
        sample: dict[str, Any] = {
            "image": reader.read((self.channel,), draw["start"], self.size)[0],
            "visible": np.asarray(draw["visible"], dtype=np.int64),
            "identity": identity_of(case.dataset, case.subject, case.person),
        }
        if not self.regions:
            return sample
        matrix = np.zeros((self.regions, self.regions), dtype=np.float32)
        if case.has_connectome:
            matrix = self._checked(case, reader.read_connectome())
        pick = np.asarray(draw["pick"], dtype=np.float32)
        return {**sample, "network": matrix, "paired": int(case.has_connectome), "pick": pick}

    def _checked(self, case: CaseInfo, matrix: np.ndarray) -> np.ndarray:
        if matrix.shape != (self.regions, self.regions):
            raise ValueError(
                f"case {case.dataset}/{case.case} has a connectome of shape {matrix.shape}, the store's spec says "
                f"{self.regions} regions; run `brainloom store verify`"
            )
        known = int((np.isfinite(matrix).sum(1) > 1).sum())
        if known < LEAST_REGIONS or np.isinf(matrix).any():
            raise ValueError(
                f"case {case.dataset}/{case.case} has a connectome with {known} regions that are known, and "
                f"{int(np.isinf(matrix).sum())} infinite values; {LEAST_REGIONS} or more and none are needed: leave "
                "the case out of the selection, or preprocess it again"
            )
        return matrix


def patches_of(size: tuple[int, int, int], patch: int, mask_rate: float) -> int:
    """Return the number of patches of an image; raises ValueError when the mask would leave none of them."""
    count = math.prod(edge // patch for edge in size)
    if not kept_blocks(count, mask_rate):
        raise ValueError(
            f"mask_rate {mask_rate:g} hides all {count} patches of {size} voxels; lower it, or use smaller patches"
        )
    return count
