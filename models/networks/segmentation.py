"""UniUnet: UniFormer encoder, UnetrUpBlock decoder with skips, deep supervision at 1/2 and 1/4 resolution.

Source: BrainMVP's downstream code; 34,323,593 parameters for 4 channels and 3 regions, 34,316,355 for 1 and 1.
Decoder names are those of the pre-training decoder, so its transposed convolutions can be transferred.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import AnyNetwork, NetworkConfig, UNet3DConfig
from models.config_scratch import ScratchNetwork
from models.networks.build import build_encoder
from models.networks.scratch import build_scratch
from models.networks.unet3d import UNet3DSegmentationDecoder
from models.networks.uniformer import from_depth_first


class InputProjection(nn.Module):
    """Full-resolution skip: convolution 3^3 and channel LayerNorm of the input."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, 3, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, dim, D, H, W)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class SkipDecoder(nn.Module):
    """Residual up-blocks with instance norm from stage 4 to full resolution, and three heads of 1^3 convolutions."""

    def __init__(self, config: NetworkConfig, regions: int) -> None:
        super().__init__()
        one, two, three, four = config.embed_dims
        self.proj1 = InputProjection(config.in_channels, config.decoder_dim)
        self.decoder5 = _up(four, three)
        self.decoder4 = _up(three, two)
        self.decoder3 = _up(two, one)
        self.decoder2 = _up(one, config.decoder_dim)
        self.out = nn.Conv3d(config.decoder_dim, regions, 1)
        self.out_half = nn.Conv3d(one, regions, 1)
        self.out_quarter = nn.Conv3d(two, regions, 1)

    def forward(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """Outputs of `UniFormer` -> logits (B, regions, X, Y, Z) of full, 1/2 and 1/4 resolution, all at full size."""
        image, x1, x2, x3, x4 = features
        quarter = self.decoder4(self.decoder5(x4, x3), x2)
        half = self.decoder3(quarter, x1)
        full = self.decoder2(half, self.proj1(image))
        coarse = ((2, self.out_half(half)), (4, self.out_quarter(quarter)))
        upsampled = (F.interpolate(x, scale_factor=scale, mode="trilinear") for scale, x in coarse)
        return [from_depth_first(logits) for logits in (self.out(full), *upsampled)]


class SegmentationNet(nn.Module):
    """Encoder and skip decoder; all outputs are summed in the loss, only the first is used at inference.

    There are three outputs, of SwinUNETR one.
    """

    def __init__(self, config: AnyNetwork, regions: int) -> None:
        super().__init__()
        self.encoder: nn.Module
        self.decoder: nn.Module
        if isinstance(config, ScratchNetwork):
            self.encoder, self.decoder = build_scratch(config, regions)
            return
        self.encoder = build_encoder(config)
        if isinstance(config, UNet3DConfig):
            self.decoder = UNet3DSegmentationDecoder(config, regions)
        elif isinstance(config, NetworkConfig):
            self.decoder = SkipDecoder(config, regions)
        else:
            raise ValueError(f"network {config.kind!r} has no decoder; use 'uniformer' or 'unet3d'")

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """See `segment`."""
        return segment(self.encoder, self.decoder, x_BCXYZ)


def segment(encoder: nn.Module, decoder: nn.Module, x_BCXYZ: Tensor) -> list[Tensor]:
    """(B, C, X, Y, Z), edges multiples of the network's -> logits (B, regions, X, Y, Z), the full resolution first.

    Raises ValueError otherwise.
    """
    step = cast(AnyNetwork, encoder.config).edge_multiple
    if any(edge % step for edge in x_BCXYZ.shape[2:]):
        shape = tuple(x_BCXYZ.shape[2:])
        raise ValueError(f"edges must be multiples of {step} for the skips to fit, got {shape}; pad the input")
    return decoder(encoder(x_BCXYZ))


def _up(in_channels: int, out_channels: int) -> nn.Module:
    from monai.networks.blocks.unetr_block import UnetrUpBlock  # importing MONAI costs 6 s

    return UnetrUpBlock(3, in_channels, out_channels, 3, 2, "instance", res_block=True)
