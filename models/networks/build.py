"""Networks by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.config import AnyNetwork, NetworkConfig, ResNet3DConfig, UNet3DConfig
from models.config_cinp import ViT3DConfig
from models.config_scratch import ScratchNetwork
from models.networks.decoder import PretrainingDecoder
from models.networks.resnet import ResNet3D
from models.networks.unet3d import UNet3D, UNet3DPretrainingDecoder
from models.networks.uniformer import UniFormer
from models.networks.vit import ViT3D

Encoder = UniFormer | UNet3D | ResNet3D | ViT3D


def build_encoder(config: AnyNetwork) -> Encoder:
    """Return the encoder; it takes (B, C, X, Y, Z) and returns the input and four stages, fine to coarse.

    Raises ValueError for the networks of others, which are whole ones (models.networks.scratch).
    """
    if isinstance(config, ScratchNetwork):
        raise ValueError(
            f"network {config.kind!r} is for segmentation from scratch only: it has no encoder to use by itself; use "
            "the encoder of a pre-training"
        )
    if isinstance(config, ResNet3DConfig):
        return ResNet3D(config)
    if isinstance(config, ViT3DConfig):
        return ViT3D(config)
    return UNet3D(config) if isinstance(config, UNet3DConfig) else UniFormer(config)


def build_pretraining_decoder(
    config: AnyNetwork, outputs: int = 1, skips: bool = False
) -> PretrainingDecoder | UNet3DPretrainingDecoder:
    """Return the decoder that makes images (B, outputs, X, Y, Z) of the encoder's features.

    Raises ValueError for networks that have none.
    """
    if not isinstance(config, NetworkConfig | UNet3DConfig):
        raise ValueError(f"network {config.kind!r} has no decoder; use 'uniformer' or 'unet3d'")
    if isinstance(config, UNet3DConfig):
        return UNet3DPretrainingDecoder(config, outputs, skips)
    return PretrainingDecoder(config, outputs, skips)


def projection_head(dim: int, out: int) -> nn.Sequential:
    """Return the head that a contrast compares: linear, ReLU, linear; the names are those of AnatCL's files."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))


def pool(stages: Sequence[Tensor]) -> Tensor:
    """Return the mean over positions (B, dim) of the coarsest of an encoder's stages (B, dim, ...)."""
    return stages[-1].mean(dim=(2, 3, 4))
