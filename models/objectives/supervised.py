"""What the supervised objectives share: input channels by name, augmentation, learned templates, consistency.

Source: BrainMVP's downstream protocol; here only left and right are swapped (the reference flips all three axes at
once, which mixes lateralised anatomy), and background stays 0, so that a missing modality stays a channel of zeros.

With the template channel mix a training case is seen as two whole copies, in each of which other channels are replaced
by their learned templates; a squared distance keeps the stage-4 features of the copies together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.config import DataConfig, SupervisedConfig, TrainingConfig
from models.filling import Templates
from models.objectives.base import Batch, CaseInfo, Objective, Reader, read_size
from models.spec import PreprocessSpec

LEFT_RIGHT = 0
"""Stored axis that runs from left to right (RAS+)."""
TEMPLATES = "templates"
"""Name of the templates among the exported weights."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The input channels: where they are in the store, and what stands in for an image."""

    indices: tuple[int, ...]
    """Of the store's modalities, in input order."""
    fill: Templates | None = None
    """Stands in for channels that a case lacks; None: zeros."""
    mix: Templates | None = None
    """Replaces channels at random in training; None: no mix."""
    mix_at_most: int = 0
    """Largest number of replaced channels."""

    def present(self, case: CaseInfo) -> list[int]:
        """Return the channels that the case has."""
        return [k for k, index in enumerate(self.indices) if case.present[index]]

    def read(self, case: CaseInfo, reader: Reader, start: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        """Return (C, x, y, z). A channel that the case lacks is not read: it is its template, or zeros."""
        image = np.zeros((len(self.indices), *size), dtype=np.float32)
        here = self.present(case)
        if here:
            image[here] = reader.read([self.indices[k] for k in here], start, size)
        if self.fill is not None:
            absent = sorted(set(range(len(self.indices))) - set(here))
            image = replaced(image, absent, self.fill, np.add(case.origin, start).tolist())
        return image

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return `mixed`: for each of two copies the channels that templates replace. Empty without the mix.

        Their number is uniform in 0 .. min(mix_at_most, channels of the case - 1): one image stays real.
        """
        if not train or self.mix is None or len(self.indices) < 2:
            return {}
        here = self.present(case)
        most = max(0, min(self.mix_at_most, len(here) - 1))
        counts = rng.integers(0, most + 1, size=2)
        return {"mixed": [sorted(rng.choice(here, size=n, replace=False).tolist()) if n else [] for n in counts]}

    def load(
        self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any], start: Sequence[int], size: Sequence[int]
    ) -> dict[str, Any]:
        """Return `image` (C, x, y, z), augmented; with the mix it is the first copy and `second` the other one."""
        image = self.read(case, reader, start, size)
        if "mixed" not in draw or self.mix is None:
            return {"image": augment(image, draw)}
        corner = np.add(case.origin, start).tolist()
        one, two = (augment(replaced(image, channels, self.mix, corner), draw) for channels in draw["mixed"])
        return {"image": one, "second": two}


def replaced(
    image: NDArray[np.float32], channels: Sequence[int], templates: Templates, start: Sequence[int]
) -> NDArray[np.float32]:
    """Return a copy (C, x, y, z) in which some channels are the templates' windows; `start` in template voxels."""
    out = image.copy()
    for k in channels:
        out[k] = templates.window(k, start, image.shape[1:])
    return out


def channel_indices(modalities: Sequence[str], spec: PreprocessSpec) -> tuple[int, ...]:
    """Return where input modalities are in the store; raises ValueError naming one that it does not hold."""
    for name in modalities:
        if name not in spec.modalities:
            raise ValueError(f"the store has no modality {name!r}; it holds: {', '.join(spec.modalities)}")
    return tuple(spec.modalities.index(name) for name in modalities)


def check_input_channels(config: TrainingConfig, modalities: Sequence[str]) -> None:
    """Raise ValueError when the network's input does not have one channel per modality."""
    if config.network.in_channels != len(modalities):
        raise ValueError(
            f"network.in_channels must equal the number of modalities {tuple(modalities)}: "
            f"got {config.network.in_channels}, set it to {len(modalities)}"
        )


def draw_augmentation(data: DataConfig, channels: int, rng: np.random.Generator, train: bool) -> dict[str, Any]:
    """Return `flip`, and `scale` and `shift` per channel within +- intensity_jitter; neutral when not training."""
    flip = bool(rng.random() < 0.5)
    scale, shift = rng.uniform(-1, 1, size=(2, channels)) * data.intensity_jitter
    if not train:
        return {"flip": False, "scale": [0.0] * channels, "shift": [0.0] * channels}
    return {"flip": flip and data.flip, "scale": scale.tolist(), "shift": shift.tolist()}


def augment(image: NDArray[np.float32], draw: Mapping[str, Any]) -> NDArray[np.float32]:
    """Flip, then v (1 + scale) + shift where v is not 0. Shape (C, x, y, z) is kept."""
    scale, shift = (np.asarray(draw[name], dtype=np.float32)[:, None, None, None] for name in ("scale", "shift"))
    out = flip_left_right(image, draw["flip"])
    return np.where(out != 0, out * (1 + scale) + shift, 0).astype(np.float32)


def flip_left_right(volume: NDArray[Any], flip: bool) -> NDArray[Any]:
    """Mirror the axis three from the end of (..., x, y, z)."""
    return np.ascontiguousarray(np.flip(volume, axis=LEFT_RIGHT - 3)) if flip else volume


def both_copies(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return images (B, C, X, Y, Z) and targets; of mixed cases all first copies, then all second ones (2B)."""
    image, target = batch["image"], batch["target"]
    if "second" not in batch:
        return image, target
    return torch.cat([image, batch["second"]]), torch.cat([target, target])


class Supervised(Objective):
    """An objective with labels. Raises ValueError for modalities that the store or the network does not have."""

    selection_metric: str
    """What `summarise` returns; higher is better."""

    def __init__(self, config: TrainingConfig, settings: SupervisedConfig, spec: PreprocessSpec) -> None:
        super().__init__()
        check_input_channels(config, settings.modalities)
        self.settings = settings
        self.data = config.data.replace(crop=read_size(config.data.crop, spec.grid))
        self.indices = channel_indices(settings.modalities, spec)
        self.templates: Templates | None = None

    def use_templates(self, templates: Templates) -> None:
        """Take the learned templates of the input channels, before the first sampler is made."""
        self.templates = templates

    def use_missing(self, missing: str) -> None:
        """Choose what stands in for a channel that a case lacks: `zero`, or `template`."""
        self.settings = self.settings.replace(missing=missing)

    @property
    def channels(self) -> Channels:
        """Return the input channels; raises ValueError when the config asks for templates that were not given."""
        settings = self.settings
        if settings.uses_templates and self.templates is None:
            raise ValueError("template_mix and missing 'template' need learned templates: call use_templates first")
        fill = self.templates if settings.missing == "template" else None
        mix = self.templates if settings.template_mix else None
        return Channels(self.indices, fill, mix, settings.template_mix)

    def with_consistency(self, losses: dict[str, Tensor], bottleneck: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Add the weighted mean squared distance of the copies' stage-4 features (2B, dim, D, H, W) to the loss."""
        if "second" not in batch:
            return losses
        one, two = bottleneck.float().chunk(2)
        distance = F.mse_loss(one, two)
        loss = losses["loss"] + self.settings.weight_consistency * distance
        return {**losses, "loss": loss, "loss_consistency": distance.detach()}

    def exports(self) -> dict[str, Tensor]:
        """Return the weights and, when they were used, the templates (C, X, Y, Z) float16 of the input channels."""
        own = super().exports()
        return own if self.templates is None else {**own, TEMPLATES: torch.from_numpy(self.templates.images)}

    @abstractmethod
    def predict(self, case: CaseInfo, reader: Reader) -> dict[str, NDArray[Any]]:
        """Return what the network says of one whole case. A modality that is not `present` is not read."""

    @abstractmethod
    def assess(self, case: CaseInfo, reader: Reader) -> list[float]:
        """Return what `summarise` needs of one whole case, as plain numbers that ranks can exchange."""

    @abstractmethod
    def summarise(self, assessed: Sequence[list[float]]) -> float | None:
        """Return the selection metric over cases, or None where it is not defined."""
