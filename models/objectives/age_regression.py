"""Age regression: a baseline of AnatCL, the age from pooled features and one linear layer, mean absolute error.

The layer predicts standardised ages, with mean and spread of the training cases, so that its start is a sensible guess;
the loss is in years.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import TrainingConfig
from models.config_anatcl import AgeRegressionConfig, ViewConfig
from models.networks.build import pool
from models.objectives.base import Batch, Clock, Metrics, sum_and_count
from models.objectives.embedding_pictures import embedding_plot
from models.objectives.whole_map import WholeMap, WholeMapSampler, check_ages
from models.records import SelectedCase
from models.spec import PreprocessSpec


class AgeRegression(WholeMap):
    """Encoder and linear head. Every case must have an age: those without are refused by name."""

    age_mean: Tensor
    age_std: Tensor

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        settings = config.objective
        if not isinstance(settings, AgeRegressionConfig):
            raise TypeError(f"AgeRegression needs an AgeRegressionConfig, got {type(settings).__name__}")
        super().__init__(config, settings.modality, spec)
        self.head = nn.Linear(config.network.feature_dim, 1)
        self.register_buffer("age_mean", torch.zeros(()))
        self.register_buffer("age_std", torch.ones(()))

    def fit(self, store: Any, train: Sequence[SelectedCase]) -> None:
        """Take mean and spread of the training cases' ages; raises ValueError when no case has one."""
        check_ages(train, "use another recipe")
        ages = np.array([case.age for case in train if case.age is not None])
        self.age_mean.fill_(float(ages.mean()))
        self.age_std.fill_(max(float(ages.std()), 1.0))

    def sampler(self) -> WholeMapSampler:
        """Return what reads whole maps and refuses cases without an age."""
        return self.reading(ViewConfig(), needs_age=True)

    def years(self, image_BXYZ: Tensor) -> Tensor:
        """Return the predicted ages (B,) in years."""
        out = self.head(pool(self.encoder(image_BXYZ[:, None]))).float()[:, 0]
        return self.age_mean + self.age_std * out

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return the mean absolute error in years as `loss`."""
        return {"loss": (self.years(batch["image"][:, 0]) - batch["age"]).abs().mean()}

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return the mean absolute error in years."""
        error = (self.years(batch["image"][:, 0]) - batch["age"]).abs()
        return {"mae_years": sum_and_count(error)}

    @torch.no_grad()
    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return `embedding`: two principal components of the pooled features, coloured by age."""
        if len(batch["age"]) < 2:
            return {}
        features = pool(self.encoder(batch["image"][:, :1])).float().cpu().numpy()
        return {"embedding": embedding_plot(features, batch["age"].cpu().numpy())}
