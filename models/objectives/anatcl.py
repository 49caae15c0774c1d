"""AnatCL: contrast of whole maps whose positives are weighted by age and by anatomy.

Source: Barbano et al., "Anatomical Foundation Models for Brain MRIs", Pattern Recognition Letters 199 (2026) 178-184
(arXiv 2408.07079), and the code of its parent, "Contrastive learning for regression in multi-site brain age prediction"
(ISBI 2023). Training code was not released; what is inferred or chosen is in docs/anatcl.md.

    L = weight_age L(age weights) + weight_anatomy L(anatomical weights) + weight_self L(other view alone)

with the contrast L of models.objectives.similarity over all views of all cases. The baselines are parts of this sum:
SimCLR (the last term alone), y-Aware (the first), ExpW (the first, with form expw).

To itself an image differs by 0 years and has the same anatomy, whether age and descriptors are known or not: the other
view of an anchor always has the weight of a difference of 0. Other weights of a case without age (or descriptors) are
0, so it is no one's positive by age (by anatomy) and only a negative; no row of weights is ever empty.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.anatomy import ATLASES
from models.config import TrainingConfig
from models.config_anatcl import AnatCLConfig, ViewConfig
from models.descriptors import fit_scale
from models.networks.build import pool, projection_head
from models.objectives.base import Batch, Clock, Metrics
from models.objectives.contrast import alone, check_two_cases, collapse_metrics, compare_views, ranks
from models.objectives.embedding_pictures import embedding_plot, matrices
from models.objectives.similarity import age_weights, anatomical_weights, kernel_of, weighted_contrast
from models.objectives.whole_map import WholeMap, WholeMapSampler, check_ages
from models.records import SelectedCase
from models.spec import PreprocessSpec

log = logging.getLogger(__name__)

PRESETS: dict[str, AnatCLConfig] = {
    # The paper's text and, where it is silent, the run name of the released weights: both weights 1, rbf of 2 years,
    # T = 0.1, two views that are one image. Candidates from all ranks are our choice.
    "paper": AnatCLConfig(),
    # The parent code: candidates of the local batch.
    "code": AnatCLConfig(gather_negatives=False),
    # Ours. With equal views the positive of an image with itself is trivial and half of the pairs repeat the others.
    # Shifts, noise and a box cut out make the views differ and leave local volume, which a modulated map means, as it
    # is: so no scaling of intensities and no zoom. No flips: descriptors tell the hemispheres apart.
    "recommended": AnatCLConfig(views=ViewConfig(shift_mm=6.0, noise_std=0.05, cutout_share=0.25)),
}
"""Named values of the objective: the paper's, the parent code's and ours."""


class AnatCL(WholeMap):
    """Encoder and a head of two linear layers, which is dropped afterwards; the scale of the descriptors.

    Raises ValueError for a store without the modality, a network of several channels, and a contrast of one case.
    """

    descriptor_mean: Tensor
    descriptor_std: Tensor

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        settings = config.objective
        if not isinstance(settings, AnatCLConfig):
            raise TypeError(f"AnatCL needs an AnatCLConfig, got {type(settings).__name__}")
        check_two_cases(config.data.batch_size, config.world_size if settings.gather_negatives else 1)
        super().__init__(config, settings.modality, spec)
        self.settings = settings
        self.head = projection_head(config.network.feature_dim, settings.head_dim)
        self.regions = ATLASES[settings.atlas]
        if settings.weight_anatomy:
            shape = (len(settings.measures), len(self.regions))
            self.register_buffer("descriptor_mean", torch.zeros(shape))
            self.register_buffer("descriptor_std", torch.zeros(shape))

    def fit(self, store: Any, train: Sequence[SelectedCase]) -> None:
        """Fit the descriptors' scale to the training cases, and look for their ages.

        Raises ValueError when no case has an age, and as `fit_scale` does, where the loss needs them.
        """
        settings = self.settings
        if settings.weight_age:
            check_ages(train, "set weight_age to 0")
            if missing := sum(case.age is None for case in train):
                log.warning("%d of %d training cases have no age: they are negatives alone there", missing, len(train))
        if settings.weight_anatomy:
            scale = fit_scale(store, train, settings.measures, settings.atlas)
            self.descriptor_mean.copy_(torch.from_numpy(scale.mean))
            self.descriptor_std.copy_(torch.from_numpy(scale.std))
            if missing := len(train) - scale.cases:
                log.warning("%d of %d training cases have no descriptors: negatives alone there", missing, len(train))

    def sampler(self) -> WholeMapSampler:
        """Return what reads whole maps, ages and descriptors."""
        settings = self.settings
        if not settings.weight_anatomy:
            return self.reading(settings.views)
        return self.reading(settings.views, measures=settings.measures, regions=self.regions)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return the weighted sum `loss` and its terms.

        Raises ValueError when the ranks at hand are too few to give the contrast a negative.
        """
        settings = self.settings
        check_two_cases(len(batch["identity"]), ranks() if settings.gather_negatives else 1)
        terms = self.terms(self.embed(batch), batch, settings.gather_negatives)
        loss = torch.stack([getattr(settings, f"weight_{name}") * term for name, term in terms.items()]).sum()
        return {"loss": loss, **{f"loss_{name}": term.detach() for name, term in terms.items()}}

    def embed(self, batch: Batch) -> Tensor:
        """Return the L2-normalised embeddings (2B, D) of all first views, then all second ones.

        Two views that are one image are encoded once in training: embeddings and batch statistics are the same.
        """
        views = batch["image"].unbind(1)
        if len(views) == 1 and not self.training:
            views = views * 2  # the look at collapse wants both
        embeddings = self._embeddings(pool(self.encoder(torch.cat(views)[:, None])))
        return embeddings if len(views) == 2 else embeddings.repeat(2, 1)

    def _embeddings(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.head(pooled).float(), dim=1)

    def terms(self, embeddings: Tensor, batch: Batch, across_ranks: bool = False) -> dict[str, Tensor]:
        """Return the loss terms by name (age, anatomy, self), without their weights.

        `across_ranks` takes the views of all ranks as candidates. Similarities keep the precision of the embeddings
        under autocast.
        """
        settings, found = self.settings, {}
        with torch.autocast(embeddings.device.type, enabled=False):
            views = compare_views(embeddings, settings.temperature, across_ranks)
            for name, weights in self._weights(batch, views.join).items():
                weights[views.rows, views.other] = self._of_itself(name)
                kept = views.keep & ~views.same_person(batch["identity"]) if name == "self" else views.keep
                found[name] = weighted_contrast(views.logits, weights, kept, settings.form)
        factor = settings.temperature / settings.base_temperature
        return {name: factor * value for name, value in found.items()}

    def _weights(self, batch: Batch, join: Any) -> dict[str, Tensor]:
        """Return the weights (2B, candidates) of each term that counts."""
        settings, found = self.settings, {}
        age = batch["age"].repeat(2)
        ages = join(age).flatten()
        if settings.weight_age:
            found["age"] = age_weights(age, ages, settings.kernel, settings.sigma_years)
        if settings.weight_anatomy:
            scored = self.scored(batch["descriptors"]).repeat(2, 1, 1)
            everyone = join(scored).flatten(0, 1)
            found["anatomy"] = anatomical_weights(scored, everyone, settings.variant, settings.negative)
        if settings.weight_self:
            found["self"] = age.new_zeros(len(age), len(ages))
        return found

    def scored(self, descriptors: Tensor) -> Tensor:
        """Return the z-scores (B, M, R); NaN where a value is unknown or does not vary over the training cases."""
        scores = (descriptors - self.descriptor_mean) / self.descriptor_std
        return torch.where(self.descriptor_std > 0, scores, torch.nan)

    def _of_itself(self, name: str) -> float:
        if name != "age":
            return 1.0
        return kernel_of(torch.zeros(()), self.settings.kernel, self.settings.sigma_years).item()

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return the loss and its terms within the batch, and collapse metrics of the embeddings; nothing for one
        case, which has no negatives."""
        embeddings = self.embed(batch)
        if len(batch["identity"]) < 2:
            return {}
        terms = self.terms(embeddings, batch)
        count = torch.tensor(float(len(batch["identity"])), device=embeddings.device)
        loss = sum(getattr(self.settings, f"weight_{name}") * float(term) for name, term in terms.items())
        one, two = embeddings.chunk(2)
        values = {"loss": loss, **{f"loss_{name}": float(term) for name, term in terms.items()}}
        return {name: (value * count, count) for name, value in (values | collapse_metrics(one, two)).items()}

    @torch.no_grad()
    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return `similarity` and `embedding` of a batch of two or more cases.

        Similarity: the cosines of the cases' first views beside the weights of each term, cases by rising age.
        Embedding: the first two principal components of the pooled features, coloured by age.
        """
        cases = len(batch["identity"])
        if cases < 2:
            return {}
        order = torch.argsort(torch.nan_to_num(batch["age"], nan=torch.inf))
        pooled = pool(self.encoder(batch["image"][:, :1]))
        embeddings = self._embeddings(pooled)[order]
        shown = {"cosine of embeddings": (embeddings @ embeddings.T + 1) / 2}
        for name, weights in self._weights(batch, alone).items():
            if name != "self":
                shown[f"weights by {name}"] = weights[:cases, :cases][order][:, order] / self._of_itself(name)
        plot = embedding_plot(pooled.float().cpu().numpy(), batch["age"].cpu().numpy())
        return {"similarity": matrices(shown), "embedding": plot}
