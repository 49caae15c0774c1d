"""Fine-tuning for classification: pooled stage-4 features, linear layer, plain cross-entropy (no class weights).

Every case is cropped at the same place of the template grid, its centre, so that a position means the same anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.config import ClassificationConfig, DataConfig, TrainingConfig
from models.networks.build import pool
from models.networks.classification import ClassificationNet
from models.objectives.base import Batch, CaseInfo, Clock, Metrics, Reader, centred_start, sum_and_count
from models.objectives.supervised import Channels, Supervised, both_copies, draw_augmentation
from models.scoring import auroc
from models.spec import PreprocessSpec


@dataclass(frozen=True)
class ClassificationSampler:
    """Crops the centre of the template grid."""

    channels: Channels
    classes: tuple[str, ...]
    data: DataConfig
    grid: tuple[int, int, int]

    def start(self, case: CaseInfo) -> list[int]:
        """Return the crop start in the case's voxels; negative where the case does not fill the crop."""
        return centred_start(self.grid, self.data.crop, case.origin)

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return the crop start and augmentation."""
        return {
            "start": self.start(case),
            **draw_augmentation(self.data, len(self.channels.indices), rng, train),
            **self.channels.draw(case, rng, train),
        }

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Return `image` (C, x, y, z), `second` (the other mixed copy) and `target`, the class index.

        Raises ValueError when the target is no class.
        """
        images = self.channels.load(case, reader, draw, draw["start"], self.data.crop)
        return {**images, "target": self.class_index(case)}

    def class_index(self, case: CaseInfo) -> int:
        """Return the index of the case's target among the classes."""
        if case.target not in self.classes:
            raise ValueError(
                f"target of case {case.dataset}/{case.case} must be one of {', '.join(self.classes)}, "
                f"got {case.target!r}; correct the phenotype or leave the case out"
            )
        return self.classes.index(case.target)


class Classification(Supervised):
    """Encoder and linear head. Raises ValueError for modalities that the store or the network does not have."""

    settings: ClassificationConfig
    selection_metric = "auroc"

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        settings = config.objective
        if not isinstance(settings, ClassificationConfig):
            raise TypeError(f"Classification needs a ClassificationConfig, got {type(settings).__name__}")
        super().__init__(config, settings, spec)
        self.grid = spec.grid
        network = ClassificationNet(config.network, len(settings.classes))
        self.encoder, self.head = network.encoder, network.head

    def sampler(self) -> ClassificationSampler:
        """Return what crops cases and finds their class."""
        return ClassificationSampler(self.channels, self.settings.classes, self.data, self.grid)

    def logits(self, image: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, classes)."""
        return self.head(pool(self.encoder(image))).float()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return the cross-entropy `loss`; of mixed cases that of both copies, with the consistency."""
        image, target = both_copies(batch)
        features = self.encoder(image)
        losses = {"loss": F.cross_entropy(self.head(pool(features)).float(), target)}
        return self.with_consistency(losses, features[-1], batch)

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
        image = torch.from_numpy(self.channels.read(case, reader, start, self.data.crop))[None]
        return {"probabilities": self.logits(image.to(self.device)).softmax(1)[0].cpu().numpy()}

    def assess(self, case: CaseInfo, reader: Reader) -> list[float]:
        """Return the index of the true class, then the probability of each class."""
        probabilities = self.predict(case, reader)["probabilities"]
        return [float(self.sampler().class_index(case)), *map(float, probabilities)]

    def summarise(self, assessed: Sequence[list[float]]) -> float | None:
        """Return the AUROC (macro one-vs-rest for more than two classes); None when a class is absent."""
        values = np.array(assessed, dtype=np.float64).reshape(-1, 1 + len(self.settings.classes))
        found = auroc(values[:, 0].astype(np.int64), values[:, 1:])
        return None if math.isnan(found) else found
