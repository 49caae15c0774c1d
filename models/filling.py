"""Learned templates in place of images: for channels that a case lacks, and mixed into fine-tuning.

Source: BrainMVP's downstream code ("template channel mix"). Unlike there, a template is found by the name of its
modality, scaled to [0, 1] over its whole image as in pre-training, and cut where the crop lies in the template grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.finished import BANK, FinishedTraining
from models.records import MODALITIES
from models.spec import PreprocessSpec
from models.template import EPSILON, overlap

GEOMETRY = ("grid", "spacing_mm", "frame", "grid_affine")
"""Settings of a spec that say where in a head a voxel of the template grid is."""


@dataclass(frozen=True, eq=False)
class Templates:
    """One image per input channel, in the order of the channels."""

    images: NDArray[np.float16]
    """(C, X, Y, Z) in [0, 1] on the template grid; half precision, as the images of a store."""

    def window(self, channel: int, start: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        """Return a window (x, y, z) of one channel's template, zero outside the grid; `start` in template voxels."""
        out = np.zeros(tuple(size), np.float32)
        if where := overlap(start, size, self.images.shape[1:]):
            out[where[1]] = self.images[channel][where[0]]
        return out


def learned_templates(pretraining: FinishedTraining, modalities: Sequence[str], spec: PreprocessSpec) -> Templates:
    """Return the learned templates of a pre-training for input modalities on the grid of a store.

    Raises ValueError as `templates_of` does and when the pre-training's template grid lies elsewhere.
    """
    origin = str(pretraining.folder)
    check_geometry(pretraining.spec, spec, origin)
    return templates_of(pretraining.tensors, modalities, spec.grid, origin)


def templates_of(
    tensors: Mapping[str, Tensor], modalities: Sequence[str], grid: Sequence[int], origin: str
) -> Templates:
    """Return the templates of some modalities from the weights of a pre-training, scaled as in pre-training.

    Raises ValueError when the weights have no bank, the bank has another grid, a modality has no place in it, or its
    template was never learned. `origin` is named in the messages.
    """
    bank = tensors.get(BANK)
    if bank is None:
        raise ValueError(
            f"{origin} has no template bank ({BANK}): it is no BrainMVP pre-training; give one as init_from, or set "
            "template_mix to 0 and missing to 'zero'"
        )
    expected = (len(MODALITIES), *grid)
    if tuple(bank.shape) != expected:
        raise ValueError(
            f"the template bank of {origin} has shape {tuple(bank.shape)}, the store needs {expected} (modality, x, y, "
            "z); pre-train on a store with the same preprocessing spec"
        )
    return Templates(np.stack([_normalised(bank, name, origin) for name in modalities]))


def _normalised(bank: Tensor, modality: str, origin: str) -> NDArray[np.float16]:
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r} has no template; those that have: {', '.join(MODALITIES)}")
    image = bank[MODALITIES.index(modality)].float().numpy()
    low, high = image.min(), image.max()
    if high <= low:
        raise ValueError(
            f"{origin} never learned a template of {modality!r} (its image is flat): no training case had that "
            "modality; pre-train with it, or set template_mix to 0 and missing to 'zero'"
        )
    return ((image - low) / (high - low + EPSILON)).astype(np.float16)


def check_geometry(learned: PreprocessSpec, spec: PreprocessSpec, origin: str) -> None:
    """Raise ValueError unless templates learned on one spec lie on the grid of another; `origin` is named."""
    for name in GEOMETRY:
        theirs, ours = getattr(learned, name), getattr(spec, name)
        if theirs != ours:
            raise ValueError(
                f"the templates of {origin} lie on another grid: {name} is {theirs}, in the store {ours}; "
                "pre-train on a store with the same preprocessing spec"
            )
