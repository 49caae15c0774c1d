"""SimCLR on crops: two augmented crops of one image attract each other, crops of other people repel.

Source: SimCLR (Chen et al., ICML 2020): NT-Xent over all views of all ranks, a head of two layers that is dropped
afterwards. Here a view is a crop that starts anywhere, flipped left-right, bent in intensity, with noise and a box cut
out; both views are of the same modality, drawn anew for each sample. Crops of other modalities are easy negatives, as
different as they look: the reason why pre-training methods for multi-modal images do more than this.
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

from models.config import CropContrastConfig, TrainingConfig
from models.networks.build import build_encoder, pool, projection_head
from models.objectives.base import Batch, CaseInfo, Clock, Metrics, Objective, Reader, draw_start
from models.objectives.contrast import check_two_cases, collapse_metrics, identity_of, nt_xent, ranks
from models.objectives.crops import check_one_channel, of_one_person, usable_modalities
from models.objectives.embedding_pictures import matrices
from models.objectives.pictures import middle_slice, montage
from models.objectives.supervised import augment
from models.objectives.whole_map import apply_view, draw_view
from models.records import MODALITIES
from models.spec import PreprocessSpec


@dataclass(frozen=True)
class CropPairSampler:
    """Draws one modality of a case and two views of it."""

    modalities: tuple[str, ...]
    """Channel order of the store."""
    crop: tuple[int, int, int]
    settings: CropContrastConfig

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return channel and views; raises ValueError for a case without a usable modality."""
        usable = usable_modalities(case, self.modalities)
        return {"channel": int(rng.choice(usable)), "views": [self._draw_crop(case, rng) for _ in range(2)]}

    def _draw_crop(self, case: CaseInfo, rng: np.random.Generator) -> dict[str, Any]:
        settings = self.settings
        scale, shift = rng.uniform(-1, 1, size=2) * settings.intensity
        return {
            "start": draw_start(case.extent, self.crop, rng),
            "gamma": math.exp(rng.uniform(-settings.gamma, settings.gamma)),
            "scale": [float(scale)],
            "shift": [float(shift)],
            "view": draw_view(settings.views, self.crop, 1.0, rng),
        }

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the two views `image` (2, x, y, z), the place of their modality in the template order, and who it
        is."""
        return {
            "image": np.stack([self._load_crop(reader, draw["channel"], view) for view in draw["views"]]),
            "modality": MODALITIES.index(self.modalities[draw["channel"]]),
            "identity": identity_of(case.dataset, case.subject, case.person),
        }

    def _load_crop(self, reader: Reader, channel: int, view: Mapping[str, Any]) -> NDArray[np.float32]:
        image = reader.read((channel,), view["start"], self.crop)
        bent = np.sign(image) * np.abs(image) ** view["gamma"]
        return apply_view(augment(bent, {"flip": False, **view})[0], view["view"])


class CropContrast(Objective):
    """Encoder and a head of two linear layers, which is dropped afterwards.

    Raises ValueError for several input channels and a contrast of one case.
    """

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__()
        settings = config.objective
        if not isinstance(settings, CropContrastConfig):
            raise TypeError(f"CropContrast needs a CropContrastConfig, got {type(settings).__name__}")
        check_one_channel(config)
        check_two_cases(config.data.batch_size, config.world_size if settings.gather_negatives else 1)
        self.settings, self.crop, self.modalities = settings, config.data.crop, spec.modalities
        self.encoder = build_encoder(config.network)
        self.head = projection_head(config.network.feature_dim, settings.head_dim)

    def sampler(self) -> CropPairSampler:
        """Return what draws modalities and views."""
        return CropPairSampler(self.modalities, self.crop, self.settings)

    def idle_terms(self, cases: Sequence[CaseInfo]) -> list[str]:
        """Say so when all cases are of one person."""
        return of_one_person(cases)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return `loss`; raises ValueError when the ranks at hand are too few to give it a negative."""
        across = self.settings.gather_negatives
        check_two_cases(len(batch["identity"]), ranks() if across else 1)
        return {"loss": nt_xent(self.embed(batch), batch["identity"], self.settings.temperature, across)}

    def embed(self, batch: Batch) -> Tensor:
        """Return the L2-normalised embeddings (2B, D) of all first views, then all second ones."""
        views = torch.cat(batch["image"].unbind(1))
        return F.normalize(self.head(pool(self.encoder(views[:, None]))).float(), dim=1)

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return the loss within the batch and collapse metrics; nothing for one case, which has no negatives."""
        embeddings = self.embed(batch)
        count = torch.tensor(float(len(batch["identity"])), device=embeddings.device)
        if len(batch["identity"]) < 2:
            return {}
        loss = nt_xent(embeddings, batch["identity"], self.settings.temperature)
        values = {"loss": float(loss), **collapse_metrics(*embeddings.chunk(2))}
        return {name: (value * count, count) for name, value in values.items()}

    @torch.no_grad()
    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return `views`, both crops of at most 4 cases, axial middle slices, and `view_cosines`, of first views
        (rows) and second ones (columns), -1 black and 1 white."""
        one, two = self.embed(batch).chunk(2)
        rows = [[middle_slice(view) for view in views] for views in batch["image"][:4]]
        names = [MODALITIES[int(k)] for k in batch["modality"][: len(rows)]]
        return {
            "views": montage(rows, titles=("first view", "second view"), names=names),
            "view_cosines": matrices({"cosine": (one @ two.T + 1) / 2}),
        }
