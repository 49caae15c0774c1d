"""MONAI's SwinUNETR and DynUNet, taken apart into an encoder and a decoder, as all networks of segmentation are here.

Modules, names inside them and results are MONAI's. Sources: Hatamizadeh et al., "Swin UNETR" (BrainLes 2021); Isensee
et al., "nnU-Net" (Nature Methods 2021), of which only the network is meant: plan, loss, augmentation and schedule are
those of every row of a table. Shapes: B batch, C channels, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.config_scratch import DynUNetConfig, ScratchNetwork, SwinUNETRConfig

GROUPS = 4
DEEP = 2
"""Outputs at 1/2 and 1/4 resolution of DynUNet beside the full one."""


def build_scratch(config: ScratchNetwork, regions: int) -> tuple[nn.Module, nn.Module]:
    """Return the encoder, (B, C, X, Y, Z) to stages from fine to coarse, and the decoder, stages to a list of logits
    (B, regions, X, Y, Z): one of SwinUNETR, three of DynUNet."""
    if isinstance(config, SwinUNETRConfig):
        whole = swin_unetr(config, regions)
        return SwinEncoder(config, whole), SwinDecoder(whole)
    whole = dynunet(config, regions)
    return DynEncoder(config, whole), DynDecoder(whole)


def swin_unetr(config: SwinUNETRConfig, regions: int) -> nn.Module:
    """Return MONAI's SwinUNETR."""
    from monai.networks.nets.swin_unetr import SwinUNETR  # importing MONAI costs 6 s

    return SwinUNETR(
        in_channels=config.in_channels,
        out_channels=regions,
        feature_size=config.feature_size,
        depths=config.depths,
        num_heads=config.heads,
        window_size=config.window,
        norm_name="instance" if config.norm == "instance" else ("group", {"num_groups": GROUPS}),
    )


def dynunet(config: DynUNetConfig, regions: int) -> nn.Module:
    """Return MONAI's DynUNet: kernels of 3^3, affine instance norm, leaky ReLU."""
    from monai.networks.nets.dynunet import DynUNet

    levels = len(config.widths)
    strides = [1] + [2] * (levels - 1)
    return DynUNet(
        spatial_dims=3,
        in_channels=config.in_channels,
        out_channels=regions,
        kernel_size=[3] * levels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=config.widths,
        deep_supervision=True,
        deep_supr_num=DEEP,
        res_block=config.residual,
    )


class SwinEncoder(nn.Module):
    """The Swin transformer: the input, then stages at 1/2 to 1/32 resolution.

    MONAI's own forward pass moves the channels with einops, a package that nothing else here needs.
    """

    def __init__(self, config: SwinUNETRConfig, whole: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.swin = whole.get_submodule("swinViT")

    def forward(self, x_BCXYZ: Tensor) -> tuple[Tensor, ...]:
        """Return the input and five stages, each normalised over its channels."""
        x = self.swin.get_submodule("patch_embed")(x_BCXYZ).permute(0, 2, 3, 4, 1)
        stages = [_normalised(x)]
        for level in (1, 2, 3, 4):
            x = _attend(self.swin.get_submodule(f"layers{level}.0"), x.contiguous())
            stages.append(_normalised(x))
        return x_BCXYZ, *stages


def _attend(layer: Any, x_BXYZC: Tensor) -> Tensor:
    """Return the output of one of MONAI's layers: its blocks in shifted windows, then half the edges."""
    from monai.networks.nets.swin_unetr import compute_mask, get_window_size

    edges = x_BXYZC.shape[1:4]
    window, shift = get_window_size(edges, layer.window_size, layer.shift_size)
    padded = [-(-edge // width) * width for edge, width in zip(edges, window, strict=True)]
    mask = compute_mask(padded, window, shift, x_BXYZC.device)
    for block in layer.blocks:
        x_BXYZC = block(x_BXYZC, mask)
    return layer.downsample(x_BXYZC)


def _normalised(x_BXYZC: Tensor) -> Tensor:
    return F.layer_norm(x_BXYZC, x_BXYZC.shape[4:]).permute(0, 4, 1, 2, 3)


class SwinDecoder(nn.Module):
    """The convolutional blocks of SwinUNETR around its transformer."""

    NAMES = (
        *("encoder1", "encoder2", "encoder3", "encoder4", "encoder10"),
        *("decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "out"),
    )

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, whole.get_submodule(name))

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of `SwinEncoder` -> one logits (B, regions, X, Y, Z)."""
        part = self.get_submodule
        image, half, quarter, eighth, sixteenth, last = stages
        x = part("decoder5")(part("encoder10")(last), sixteenth)
        x = part("decoder4")(x, part("encoder4")(eighth))
        x = part("decoder3")(x, part("encoder3")(quarter))
        x = part("decoder2")(x, part("encoder2")(half))
        return [part("out")(part("decoder1")(x, part("encoder1")(image)))]


class DynEncoder(nn.Module):
    """The contracting half of DynUNet."""

    def __init__(self, config: DynUNetConfig, whole: nn.Module) -> None:
        super().__init__()
        self.config = config
        ends = whole.get_submodule("input_block"), whole.get_submodule("bottleneck")
        self.levels = nn.ModuleList([ends[0], *whole.get_submodule("downsamples").children(), ends[1]])

    def forward(self, x_BCXYZ: Tensor) -> tuple[Tensor, ...]:
        """Return the input and every level."""
        stages = [x_BCXYZ]
        for level in self.levels:
            stages.append(level(stages[-1]))
        return tuple(stages)


class DynDecoder(nn.Module):
    """The expanding half, with heads at full, 1/2 and 1/4 resolution."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        heads = whole.get_submodule("deep_supervision_heads").children()
        self.ups = nn.ModuleList(whole.get_submodule("upsamples").children())
        self.heads = nn.ModuleList([whole.get_submodule("output_block"), *heads])

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of `DynEncoder` -> logits (B, regions, X, Y, Z) of full, 1/2 and 1/4 resolution, all at full size."""
        levels = [stages[-1]]
        for up, skip in zip(self.ups, reversed(stages[1:-1]), strict=True):
            levels.append(up(levels[-1], skip))
        finest = reversed(levels[-1 - DEEP :])
        logits = [head(level) for head, level in zip(self.heads, finest, strict=True)]
        size = logits[0].shape[2:]
        return [logits[0], *(F.interpolate(x, size=size, mode="trilinear") for x in logits[1:])]
