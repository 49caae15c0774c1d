"""BrainMVP's pre-training decoder: four transposed convolutions, then one channel per output.

Source: reference code, which builds full UnetrUpBlocks (12,277,697 parameters) and uses 1,736,769 of them: only the
used ones exist here, under their released names. The reference has neither skips nor a non-linearity: every 16^3 block
is a linear function of one stage-4 vector. With `skips`, stages 1 to 3 enter as well, as in SparK (Tian et al., ICLR
2023) and the U-Nets of Wald et al. (CVPR 2025): all stages are trained directly, and fine structure need not pass
through stage 4. The image itself never enters: masked voxels cannot be copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.config import NetworkConfig
from models.networks.layers import PointwiseConv3d


class PretrainingDecoder(nn.Module):
    """Features of the encoder to `outputs` channels at full resolution."""

    def __init__(self, config: NetworkConfig, outputs: int = 1, skips: bool = False) -> None:
        super().__init__()
        one, two, three, four = config.embed_dims
        self.decoder5 = _up(four, three)
        self.decoder4 = _up(three, two)
        self.decoder3 = _up(two, one)
        self.decoder2 = _up(one, config.decoder_dim)
        self.out_1 = _nested(nn.Conv3d(config.decoder_dim, outputs, 1), "conv.conv")
        self.skips = nn.ModuleList(Skip(dim) for dim in (three, two, one)) if skips else None

    def forward(self, features: Sequence[Tensor], chosen_BK: Tensor | None = None) -> Tensor:
        """Outputs of `UniFormer` -> (B, outputs, X, Y, Z), or (B, K, X, Y, Z) of the outputs chosen for each case."""
        x = features[-1]
        for level, up in enumerate((self.decoder5, self.decoder4, self.decoder3)):
            x = up(x)
            if self.skips is not None:
                x = self.skips[level](x, features[3 - level])
        return self._last(x, chosen_BK)

    @property
    def head(self) -> nn.Conv3d:
        """The last convolution, with one row of weights per output."""
        return cast(nn.Conv3d, self.out_1.get_submodule("conv.conv"))

    def _last(self, x: Tensor, chosen_BK: Tensor | None) -> Tensor:
        """(B, C, D, H, W) -> (B, outputs, X, Y, Z): `decoder2` and the head at once.

        Nothing non-linear is between them, so their product is applied: its inner channels at full resolution would be
        by far the largest tensor of a training.
        """
        up = cast(nn.ConvTranspose3d, self.decoder2.get_submodule("transp_conv.conv")).weight
        head, bias = self.head.weight.flatten(1), cast(Tensor, self.head.bias)
        if chosen_BK is not None:
            head, bias = head[chosen_BK], bias[chosen_BK]
        both = torch.einsum("...ke,cedhw->...ckdhw", head, up).flatten(-4)
        voxels = x.permute(0, 2, 3, 4, 1).flatten(1, 3) @ both
        parts = voxels.view(len(x), *x.shape[2:], -1, 2, 2, 2)  # B, D, H, W, K, and twice D, H, W
        whole = parts.permute(0, 4, 2, 6, 3, 7, 1, 5).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return whole + bias[..., None, None, None]


class Skip(nn.Module):
    """Add a stage's features, then a residual branch: convolution 3^3, GELU, convolution 1^3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lateral = PointwiseConv3d(dim, dim)
        self.branch = nn.Sequential(nn.Conv3d(dim, 2 * dim, 3, padding=1), nn.GELU(), PointwiseConv3d(2 * dim, dim))

    def forward(self, x: Tensor, stage: Tensor) -> Tensor:
        """Two (B, dim, D, H, W) -> one."""
        x = x + self.lateral(stage)
        return x + self.branch(x)


def _up(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.ConvTranspose3d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
    return _nested(conv, "transp_conv.conv")


def _nested(module: nn.Module, path: str) -> nn.Module:
    """Wrap `module` so that its parameters carry the released names `<path>.weight`."""
    for name in reversed(path.split(".")):
        module = nn.Sequential(OrderedDict([(name, module)]))
    return module
