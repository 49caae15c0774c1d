"""UNET3D: BrainMVP's second backbone, residual blocks of convolutions and group norm at four scales.

Source: reference code (`models/Unet.py`); 18,799,937 parameters with the pre-training decoder, 256 @ 12^3 for 96^3
voxels. Shapes: B batch, C channels, X Y Z space; unlike `UniFormer`, axes are never permuted. The pre-training
decoder has no skips (the reference has their sums commented out). How the reference fine-tunes this backbone for
segmentation was not released: here the same decoder with those sums, and heads at 1/2 and 1/4 as for UniFormer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import UNet3DConfig
from models.networks.decoder import Skip


class ResidualBlock(nn.Module):
    """Twice group norm, ReLU, convolution 3^3; then the input is added."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.gn1 = nn.GroupNorm(groups, dim)
        self.conv1 = nn.Conv3d(dim, dim, 3, padding=1)
        self.gn2 = nn.GroupNorm(groups, dim)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z), shape kept."""
        y = self.conv1(F.relu(self.gn1(x)))
        return x + self.conv2(F.relu(self.gn2(y)))


class UNet3D(nn.Module):
    """Encoder of four levels; a convolution of stride 2 leads from each to the next.

    Raises ValueError when a width is not a multiple of the number of groups.
    """

    def __init__(self, config: UNet3DConfig) -> None:
        super().__init__()
        for level, width in enumerate(config.widths, start=1):
            if width % config.groups:
                raise ValueError(
                    f"width of level {level} must be a multiple of groups: got {width} and {config.groups}; "
                    "change widths or groups"
                )
        self.config = config
        self.stem = nn.Conv3d(config.in_channels, config.widths[0], 3, padding=1)
        for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True), start=1):
            if level > 1:
                self.add_module(f"down{level}", nn.Conv3d(config.widths[level - 2], width, 3, stride=2, padding=1))
            self.add_module(
                f"level{level}", nn.Sequential(*(ResidualBlock(width, config.groups) for _ in range(blocks)))
            )

    def forward(self, x_BCXYZ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the input and the four levels as (B, C, X, Y, Z), at strides 1, 1, 2, 4 and 8."""
        one = self._level(1, self.stem(x_BCXYZ))
        two = self._level(2, self._down(2, one))
        three = self._level(3, self._down(3, two))
        return x_BCXYZ, one, two, three, self._level(4, self._down(4, three))

    def _level(self, level: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"level{level}")(x)

    def _down(self, level: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"down{level}")(x)


class Up(nn.Module):
    """Halve the channels, double the edges (nearest voxel), add what is given, one residual block."""

    def __init__(self, in_dim: int, dim: int, groups: int) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(in_dim, dim, 1)
        self.block = ResidualBlock(dim, groups)

    def forward(self, x: Tensor, stage: Tensor | None = None) -> Tensor:
        """(B, in_dim, X, Y, Z) -> (B, dim, 2 X, 2 Y, 2 Z)."""
        x = F.interpolate(self.reduce(x), scale_factor=2, mode="nearest")
        return self.block(x if stage is None else x + stage)


class UNet3DPretrainingDecoder(nn.Module):
    """Features of `UNet3D` to `outputs` channels at full resolution; `skips` is ours, as for UniFormer."""

    def __init__(self, config: UNet3DConfig, outputs: int = 1, skips: bool = False) -> None:
        super().__init__()
        _add_ups(self, config)
        self.out_1 = nn.Conv3d(config.widths[0], outputs, 1)  # not `out`: segmentation must not take it over
        self.skips = nn.ModuleList(Skip(dim) for dim in config.widths[2::-1]) if skips else None

    @property
    def head(self) -> nn.Conv3d:
        """The last convolution, with one row of weights per output."""
        return self.out_1

    def forward(self, features: Sequence[Tensor], chosen_BK: Tensor | None = None) -> Tensor:
        """Outputs of `UNet3D` -> (B, outputs, X, Y, Z), or (B, K, X, Y, Z) of the outputs chosen for each case."""
        x = features[-1]
        for step, level in enumerate((3, 2, 1)):
            x = self.get_submodule(f"up{level}")(x)
            if self.skips is not None:
                x = self.skips[step](x, features[level])
        return self.out_1(x) if chosen_BK is None else _chosen(self.out_1, x, chosen_BK)


class UNet3DSegmentationDecoder(nn.Module):
    """The same levels with the encoder's features added, and three heads of 1^3 convolutions."""

    def __init__(self, config: UNet3DConfig, regions: int) -> None:
        super().__init__()
        _add_ups(self, config)
        self.out = nn.Conv3d(config.widths[0], regions, 1)
        self.out_half = nn.Conv3d(config.widths[1], regions, 1)
        self.out_quarter = nn.Conv3d(config.widths[2], regions, 1)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of `UNet3D` -> logits (B, regions, X, Y, Z) of full, 1/2 and 1/4 resolution, all at full size."""
        _, one, two, three, four = features
        quarter = self.get_submodule("up3")(four, three)
        half = self.get_submodule("up2")(quarter, two)
        full = self.get_submodule("up1")(half, one)
        coarse = ((2, self.out_half(half)), (4, self.out_quarter(quarter)))
        return [self.out(full), *(F.interpolate(x, scale_factor=scale, mode="trilinear") for scale, x in coarse)]


def _add_ups(decoder: nn.Module, config: UNet3DConfig) -> None:
    for level in (3, 2, 1):
        decoder.add_module(f"up{level}", Up(config.widths[level], config.widths[level - 1], config.groups))


def _chosen(head: nn.Conv3d, x: Tensor, chosen_BK: Tensor) -> Tensor:
    """Return K outputs of a 1^3 convolution for each case: (B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
    assert head.bias is not None
    weight, bias = head.weight[chosen_BK].flatten(2), head.bias[chosen_BK]
    flat = torch.baddbmm(bias[:, :, None], weight, x.flatten(2))
    return flat.view(*flat.shape[:2], *x.shape[2:])
