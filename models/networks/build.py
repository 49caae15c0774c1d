"""Networks by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from models.config import AnyNetwork, UNet3DConfig
from models.networks.decoder import PretrainingDecoder
from models.networks.unet3d import UNet3D, UNet3DPretrainingDecoder
from models.networks.uniformer import UniFormer

Encoder = UniFormer | UNet3D


def build_encoder(config: AnyNetwork) -> Encoder:
    """Return the encoder; it takes (B, C, X, Y, Z) and returns the input and four stages, fine to coarse."""
    return UNet3D(config) if isinstance(config, UNet3DConfig) else UniFormer(config)


def build_pretraining_decoder(
    config: AnyNetwork, outputs: int = 1, skips: bool = False
) -> PretrainingDecoder | UNet3DPretrainingDecoder:
    """Return the decoder that makes images (B, outputs, X, Y, Z) of the encoder's features."""
    if isinstance(config, UNet3DConfig):
        return UNet3DPretrainingDecoder(config, outputs, skips)
    return PretrainingDecoder(config, outputs, skips)


def pool(stages: Sequence[Tensor]) -> Tensor:
    """Return the mean over positions (B, dim) of the coarsest of an encoder's stages (B, dim, ...)."""
    return stages[-1].mean(dim=(2, 3, 4))
