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

import torch
from torch import Tensor, nn

from models.config import NetworkConfig
from models.networks.uniformer import from_depth_first


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
        return from_depth_first(self._head(self.decoder2(x), chosen_BK))

    def _head(self, x: Tensor, chosen_BK: Tensor | None) -> Tensor:
        if chosen_BK is None:
            return self.out_1(x)
        head = self.out_1.get_submodule("conv.conv")
        weight, bias = head.weight[chosen_BK].flatten(2), head.bias[chosen_BK]  # type: ignore[index]
        flat = torch.baddbmm(bias[:, :, None], weight, x.flatten(2))
        return flat.view(*flat.shape[:2], *x.shape[2:])


class Skip(nn.Module):
    """Add a stage's features, then a residual branch: convolution 3^3, GELU, convolution 1^3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lateral = nn.Conv3d(dim, dim, 1)
        self.branch = nn.Sequential(nn.Conv3d(dim, 2 * dim, 3, padding=1), nn.GELU(), nn.Conv3d(2 * dim, dim, 1))

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
