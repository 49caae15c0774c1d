"""Segmentation, fine-tuned or from scratch: soft Dice and cross-entropy per region, deep supervision, sliding windows.

Source: BrainMVP's downstream code: per output 0.7 Dice (squared denominators, smooth 1, over the batch) + 0.3 BCE, mean
over regions, summed over the three outputs; with the template channel mix of both copies, and 0.1 times the distance of
their stage-4 features. Regions come from the dataset's label scheme, never from a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models import scoring
from models.config import DataConfig, Region, SegmentationConfig, TrainingConfig
from models.networks.segmentation import SegmentationNet, segment
from models.objectives.base import Batch, CaseInfo, Clock, Metrics, Reader, draw_start, sum_and_count
from models.objectives.pictures import middle_slice, montage
from models.objectives.supervised import Channels, Supervised, both_copies, draw_augmentation, flip_left_right
from models.spec import PreprocessSpec


def to_regions(label: NDArray[np.uint8], regions: Sequence[Region]) -> NDArray[np.uint8]:
    """Return (R, x, y, z) of 0 and 1: each region is the union of its label values."""
    return np.stack([np.isin(label, region.labels) for region in regions]).astype(np.uint8)


def start_around(voxel: Sequence[int], extent: Sequence[int], crop: Sequence[int]) -> list[int]:
    """Return the crop start that centres a voxel and stays inside the case; a crop larger than it is centred."""
    return [
        min(max(v - want // 2, 0), have - want) if have >= want else -((want - have) // 2)
        for v, have, want in zip(voxel, extent, crop, strict=True)
    ]


@dataclass(frozen=True)
class SegmentationSampler:
    """Crops around labelled voxels or uniformly; outside training always around the same labelled voxel."""

    channels: Channels
    regions: tuple[Region, ...]
    data: DataConfig
    foreground_share: float

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return the uniform crop start, whether and around which labelled voxel (rank in 0..1), and augmentation."""
        return {
            "start": draw_start(case.extent, self.data.crop, rng),
            "around_label": bool(rng.random() < self.foreground_share) or not train,
            "labelled_voxel": float(rng.random()) if train else 0.5,
            **draw_augmentation(self.data, len(self.channels.indices), rng, train),
            **self.channels.draw(case, rng, train),
        }

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Return `image` (C, x, y, z) and `target` (R, x, y, z), and `second`, the other mixed copy of the image.

        Without labelled voxels the crop is uniform.
        """
        start = self._around_label(case, reader, draw) if draw["around_label"] else draw["start"]
        images = self.channels.load(case, reader, draw, start, self.data.crop)
        target = to_regions(reader.read_label(start, self.data.crop), self.regions)
        return {**images, "target": flip_left_right(target, draw["flip"])}

    def _around_label(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> list[int]:
        label = reader.read_label((0, 0, 0), case.extent)
        voxels = np.flatnonzero(np.isin(label, [value for region in self.regions for value in region.labels]))
        if not len(voxels):
            return draw["start"]
        chosen = voxels[min(int(draw["labelled_voxel"] * len(voxels)), len(voxels) - 1)]
        return start_around([int(i) for i in np.unravel_index(chosen, label.shape)], case.extent, self.data.crop)


class Segmentation(Supervised):
    """Encoder with skip decoder. Raises ValueError for modalities that the store or the network does not have."""

    settings: SegmentationConfig
    selection_metric = "mean_dice"

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        settings = config.objective
        if not isinstance(settings, SegmentationConfig):
            raise TypeError(f"Segmentation needs a SegmentationConfig, got {type(settings).__name__}")
        super().__init__(config, settings, spec)
        from monai.losses import DiceLoss  # importing MONAI costs 6 s

        network = SegmentationNet(config.network, len(settings.regions))
        self.encoder, self.decoder = network.encoder, network.decoder
        self.dice = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=1.0, smooth_dr=1.0, batch=True)

    def sampler(self) -> SegmentationSampler:
        """Return what crops cases."""
        return SegmentationSampler(self.channels, self.settings.regions, self.data, self.settings.foreground_share)

    def logits(self, image: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> logits (B, R, X, Y, Z) of the full, 1/2 and 1/4 resolution; SwinUNETR: the full one."""
        return segment(self.encoder, self.decoder, image)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return `loss`, summed over the outputs and with the consistency of mixed copies, and its terms."""
        image, target = both_copies(batch)
        features = self.encoder(image)
        losses = self._losses(self.decoder(features), target.float())
        return self.with_consistency(losses, features[-1], batch)

    def _losses(self, outputs: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        dice = torch.stack([self.dice(logits.float(), target) for logits in outputs]).sum()
        bce = torch.stack([F.binary_cross_entropy_with_logits(logits.float(), target) for logits in outputs]).sum()
        loss = self.settings.weight_dice * dice + self.settings.weight_bce * bce
        return {"loss": loss, "loss_dice": dice.detach(), "loss_bce": bce.detach()}

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return the loss and, per region, Dice on the crop around the label, for cases where it has the region.

        A quick look only: scores of whole cases come from `predict`.
        """
        outputs = self.logits(batch["image"])
        count = torch.tensor(float(len(batch["image"])), device=self.device)
        losses = self._losses(outputs, batch["target"].float())
        metrics = {name: (value * count, count) for name, value in losses.items()}
        target, found = batch["target"].bool(), outputs[0] > 0
        both, sizes = (target & found).sum((2, 3, 4)), target.sum((2, 3, 4)) + found.sum((2, 3, 4))
        for r, region in enumerate(self.settings.regions):
            dice = 2 * both[:, r] / sizes[:, r].clamp_min(1)
            metrics[f"dice_{region.name}"] = sum_and_count(dice, target[:, r].any(3).any(2).any(1))
        return metrics

    @torch.no_grad()
    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return `segmentation`: a row per case (at most 4): first channel, first region's truth and probability."""
        found = torch.sigmoid(self.logits(batch["image"])[0])
        columns = (batch["image"], batch["target"], found)
        rows = [[middle_slice(column[i, 0]) for column in columns] for i in range(min(4, len(found)))]
        return {"segmentation": montage(rows, titles=("image", "truth", "probability"))}

    @torch.no_grad()
    def predict(self, case: CaseInfo, reader: Reader) -> dict[str, NDArray[Any]]:
        """Return `regions` (R, x, y, z) uint8 on the stored extent: sliding windows, constant blending, p > 0.5."""
        from monai.inferers import sliding_window_inference

        image = torch.from_numpy(self.channels.read(case, reader, (0, 0, 0), case.extent))[None]
        logits = sliding_window_inference(
            image.to(self.device), self.data.crop, 1, lambda x: self.logits(x)[0], overlap=self.settings.overlap
        )
        return {"regions": (logits[0] > 0).to(torch.uint8).cpu().numpy()}

    def assess(self, case: CaseInfo, reader: Reader) -> list[float]:
        """Return the Dice of each region of the whole case, as the scores have it."""
        found = self.predict(case, reader)["regions"].astype(bool)
        truth = to_regions(reader.read_label((0, 0, 0), case.extent), self.settings.regions).astype(bool)
        return scoring.dice(found, truth)

    def summarise(self, assessed: Sequence[list[float]]) -> float | None:
        """Return the mean Dice over cases and regions."""
        return float(np.mean(assessed)) if assessed else None
