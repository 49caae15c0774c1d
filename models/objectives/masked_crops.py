"""Masked autoencoder of crops of one modality: cubes are hidden, the network restores them.

Sources: MAE (He et al., CVPR 2022) for the task, the rate of 75 % and the loss on hidden voxels alone; SimMIM (Xie et
al., CVPR 2022) for how a dense network sees the mask: hidden voxels have one learned value and stay in the image. MAE
itself drops them, which a convolution cannot; SparK (Tian et al., ICLR 2023) drops them with sparse convolutions, which
are not used here, and its decoder with skips is: the masked image itself never enters the decoder. Squared error of
intensities in [0, 1], without a norm of each cube.

The samples are BrainMVP's: of a case two modalities of one crop (or twice the one that it has), each with a mask of its
own. So both methods send the same number of crops through the encoder.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import MaskedCropsConfig, TrainingConfig
from models.masking import check_kept, to_voxels
from models.networks.build import build_encoder, build_pretraining_decoder
from models.objectives.base import Batch, Clock, Metrics, Objective, sum_and_count
from models.objectives.brainmvp import BrainMVPSampler, psnr
from models.objectives.crops import check_one_channel
from models.objectives.pictures import middle_slice, montage
from models.records import MODALITIES
from models.spec import PreprocessSpec


class MaskedCrops(Objective):
    """Encoder, pre-training decoder and the value of hidden voxels.

    Raises ValueError for several input channels, and a crop that is not made of whole cubes or of too few.
    """

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__()
        settings = config.objective
        if not isinstance(settings, MaskedCropsConfig):
            raise TypeError(f"MaskedCrops needs a MaskedCropsConfig, got {type(settings).__name__}")
        check_one_channel(config)
        check_kept(config.data.crop, settings.mask_block, settings.mask_rate)
        self.settings, self.crop, self.modalities = settings, config.data.crop, spec.modalities
        self.encoder = build_encoder(config.network)
        self.decoder = build_pretraining_decoder(config.network, skips=settings.decoder_skips)
        self.mask_token = nn.Parameter(torch.zeros(()))

    def sampler(self) -> BrainMVPSampler:
        """Return what draws crops, modalities and masks."""
        return BrainMVPSampler(self.modalities, self.crop, self.settings.mask_block, self.settings.mask_rate)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return `loss`, the mean squared error of hidden voxels."""
        return {"loss": masked_errors(*self.restore(batch)).mean()}

    def restore(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return restored images, true ones and where they were hidden, each (2B, x, y, z): all first, then all second
        modalities."""
        target = torch.cat(batch["image"].unbind(1))
        hidden = to_voxels(torch.cat(batch["mask"].unbind(1)), self.settings.mask_block)
        restored = self.decoder(self.encoder(self.masked(target, hidden)[:, None]))[:, 0].float()
        return restored, target, hidden

    def masked(self, target: Tensor, hidden: Tensor) -> Tensor:
        """Return the images as the encoder sees them."""
        return torch.where(hidden, self.mask_token.to(target.dtype), target)

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return the loss, and the PSNR (dB, data range 1) over the hidden foreground (target > 0) of each image."""
        restored, target, hidden = self.restore(batch)
        region = hidden & (target > 0)
        some = region.any(dim=3).any(dim=2).any(dim=1)
        return {
            "loss": sum_and_count(masked_errors(restored, target, hidden)),
            "psnr_model": sum_and_count(psnr(restored, target, region), some),
        }

    @torch.no_grad()
    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return `restored`, a row per case (at most 4), axial middle slices: input, output, output in place of
        what was hidden, target."""
        restored, target, hidden = self.restore(batch)
        columns = (self.masked(target, hidden), restored, torch.where(hidden, restored, target), target)
        rows = [[middle_slice(column[i]) for column in columns] for i in range(min(4, len(batch["image"])))]
        names = [MODALITIES[int(k)] for k in batch["template"][: len(rows)]]
        titles = ("masked", "restored", "restored where masked", "target")
        return {"restored": montage(rows, titles=titles, names=names)}


def masked_errors(restored: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Return the mean squared error (N,) of each image (N, x, y, z) over its hidden voxels."""
    errors = (restored - target).square() * hidden
    return errors.sum(dim=(1, 2, 3)) / hidden.sum(dim=(1, 2, 3))
