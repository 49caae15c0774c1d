"""BrainMVP's pre-training decoder: four transposed convolutions without skips, then one channel.

Source: reference code, which builds full UnetrUpBlocks (12,277,697 parameters) and uses 1,736,769 of them: only the
used ones exist here, under their released names. No skips, because a masked input handed to the last layer would let
the network copy. There is no non-linearity: every 16^3 block is a linear function of one stage-4 vector.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from models.config import NetworkConfig
from models.networks.uniformer import from_depth_first


class PretrainingDecoder(nn.Module):
    """Stage-4 features to one image channel at full resolution."""

    def __init__(self, config: NetworkConfig, heads: int = 1) -> None:
        super().__init__()
        one, two, three, four = config.embed_dims
        self.decoder5 = _up(four, three)
        self.decoder4 = _up(three, two)
        self.decoder3 = _up(two, one)
        self.decoder2 = _up(one, config.decoder_dim)
        self.out_1 = _nested(nn.Conv3d(config.decoder_dim, heads, 1), "conv.conv")

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Outputs of `UniFormer` -> reconstruction (B, heads, X, Y, Z); only stage 4 is used."""
        x = features[-1]
        for level in (self.decoder5, self.decoder4, self.decoder3, self.decoder2):
            x = level(x)
        return from_depth_first(self.out_1(x))


def _up(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.ConvTranspose3d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
    return _nested(conv, "transp_conv.conv")


def _nested(module: nn.Module, path: str) -> nn.Module:
    """Wrap `module` so that its parameters carry the released names `<path>.weight`."""
    for name in reversed(path.split(".")):
        module = nn.Sequential(OrderedDict([(name, module)]))
    return module
