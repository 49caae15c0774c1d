"""Fine-tuning for classification: pooled stage-4 features, linear layer, plain cross-entropy (no class weights).

Every case is cropped at the same place of the template grid, its centre, so that a position means the same anatomy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.config import ClassificationConfig, DataConfig, TrainingConfig
from models.networks.classification import ClassificationNet, classify
from models.objectives.base import Batch, CaseInfo, Clock, Metrics, Objective, Reader, sum_and_count
from models.objectives.supervised import (
    augment,
    channel_indices,
    check_input_channels,
    draw_augmentation,
    read_channels,
)
from models.records import PreprocessSpec


@dataclass(frozen=True)
class ClassificationSampler:
    """Crops the centre of the template grid."""

    channels: tuple[int, ...]
    classes: tuple[str, ...]
    data: DataConfig
    grid: tuple[int, int, int]

    def start(self, case: CaseInfo) -> list[int]:
        """Return the crop start in the case's voxels; negative where the case does not fill the crop."""
        axes = zip(self.grid, self.data.crop, case.origin, strict=True)
        return [(whole - crop) // 2 - origin for whole, crop, origin in axes]

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return the crop start and augmentation."""
        return {"start": self.start(case), **draw_augmentation(self.data, len(self.channels), rng, train)}

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Return `image` (C, x, y, z) and `target`, the class index; raises ValueError when it is no class."""
        image = read_channels(case, reader, self.channels, draw["start"], self.data.crop)
        return {"image": augment(image, draw), "target": self.class_index(case)}

    def class_index(self, case: CaseInfo) -> int:
        """Return the index of the case's target among the classes."""
        if case.target not in self.classes:
            raise ValueError(
                f"target of case {case.dataset}/{case.case} must be one of {', '.join(self.classes)}, "
                f"got {case.target!r}; correct the phenotype or leave the case out"
            )
        return self.classes.index(case.target)


class Classification(Objective):
    """Encoder and linear head. Raises ValueError for modalities that the store or the network does not have."""

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__()
        settings = config.objective
        if not isinstance(settings, ClassificationConfig):
            raise TypeError(f"Classification needs a ClassificationConfig, got {type(settings).__name__}")
        check_input_channels(config, settings.modalities)
        self.settings = settings
        self.data = config.data
        self.grid = spec.grid
        self.channels = channel_indices(settings.modalities, spec)
        network = ClassificationNet(config.network, len(settings.classes))
        self.encoder, self.head = network.encoder, network.head

    def sampler(self) -> ClassificationSampler:
        """Return what crops cases and finds their class."""
        return ClassificationSampler(self.channels, self.settings.classes, self.data, self.grid)

    def logits(self, image: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, classes)."""
        return classify(self.encoder, self.head, image).float()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return the cross-entropy `loss`."""
        return {"loss": F.cross_entropy(self.logits(batch["image"]), batch["target"])}

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return the loss and the accuracy."""
        logits, target = self.logits(batch["image"]), batch["target"]
        correct = (logits.argmax(1) == target).to(logits)
        losses = F.cross_entropy(logits, target, reduction="none")
        return {"loss": sum_and_count(losses), "accuracy": sum_and_count(correct)}

    @torch.no_grad()
    def predict(self, case: CaseInfo, reader: Reader) -> dict[str, NDArray[Any]]:
        """Return `probabilities` (K,) float32 in the order of the classes."""
        start = self.sampler().start(case)
        image = torch.from_numpy(read_channels(case, reader, self.channels, start, self.data.crop))[None]
        return {"probabilities": self.logits(image.to(self.device)).softmax(1)[0].cpu().numpy()}
