"""UniFormer 3D: convolutional blocks at fine scales, global self-attention at coarse ones.

Source: BrainMVP's encoder (reference code); `UniFormer-S` has 22,038,464 parameters with one input channel.
Shapes: B batch, C channels, N tokens. Images come as (B, C, X, Y, Z) and are computed as (B, C, D, H, W), which is
(B, C, Z, X, Y).
Parameter names are those of the released weights without their `encoder.uniformer.` prefix.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import NetworkConfig
from models.networks.layers import DepthwiseConv3d, PatchConv3d, PointwiseConv3d

BRANCH_ENDS = ("pos_embed", "conv2", "fc2", "attn.proj")
"""Last layers of the residual branches."""
MANY_CHANNELS = 16
"""From here on torch's own strided convolution is the faster one."""


def to_depth_first(x_BCXYZ: Tensor) -> Tensor:
    """Return (B, C, X, Y, Z) as (B, C, D, H, W) = (B, C, Z, X, Y), the axis order of the released weights."""
    return x_BCXYZ.permute(0, 1, 4, 2, 3)


def from_depth_first(x_BCDHW: Tensor) -> Tensor:
    """Undo `to_depth_first`."""
    return x_BCDHW.permute(0, 1, 3, 4, 2)


class PatchEmbed(nn.Module):
    """Stem of a stage: convolution of kernel 2, stride 2 (odd edges lose their last voxel), then channel LayerNorm."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        few = in_channels < MANY_CHANNELS
        self.proj = PatchConv3d(in_channels, dim) if few else nn.Conv3d(in_channels, dim, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, dim, D//2, H//2, W//2)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class ConvMlp(nn.Module):
    """Two 1x1x1 convolutions with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv3d(dim, hidden)
        self.fc2 = PointwiseConv3d(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Shape is kept."""
        return self.fc2(F.gelu(self.fc1(x)))


class CBlock(nn.Module):
    """Local block: depth-wise 3^3 position encoding, depth-wise 5^3 'attention', MLP; pre-norm by BatchNorm3d."""

    def __init__(self, dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv3d(dim, 3)
        self.norm1 = nn.BatchNorm3d(dim)
        self.conv1 = PointwiseConv3d(dim, dim)
        self.conv2 = PointwiseConv3d(dim, dim)
        self.attn = DepthwiseConv3d(dim, 5)
        self.norm2 = nn.BatchNorm3d(dim)
        self.mlp = ConvMlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W), shape kept."""
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class TokenMlp(nn.Module):
    """Two linear layers with GELU between, on the last axis."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Shape is kept."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Global multi-head self-attention over all positions of a stage."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C), shape kept."""
        batch, tokens, dim = x_BNC.shape
        qkv = self.qkv(x_BNC).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class SABlock(nn.Module):
    """Global block: depth-wise 3^3 position encoding, self-attention, MLP; pre-norm by LayerNorm."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv3d(dim, 3)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TokenMlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W), shape kept."""
        x = x + self.pos_embed(x)
        batch, dim, depth, height, width = x.shape
        tokens_BNC = x.permute(0, 2, 3, 4, 1).reshape(batch, -1, dim)  # a view when x is channels_last_3d
        tokens_BNC = tokens_BNC + self.attn(self.norm1(tokens_BNC))
        tokens_BNC = tokens_BNC + self.mlp(self.norm2(tokens_BNC))
        return tokens_BNC.view(batch, depth, height, width, dim).permute(0, 4, 1, 2, 3)


class UniFormer(nn.Module):
    """Four-stage encoder: two stages of `CBlock`, two of `SABlock`, then BatchNorm3d.

    Raises ValueError when a width of stage 3 or 4 is not a multiple of the head width.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        dims = config.embed_dims
        for stage, dim in ((3, dims[2]), (4, dims[3])):
            if dim % config.head_dim:
                raise ValueError(
                    f"width of stage {stage} must be a multiple of head_dim: got {dim} and {config.head_dim}; "
                    "change embed_dims or head_dim"
                )
        self.config = config
        for stage, (channels, dim) in enumerate(zip((config.in_channels, *dims[:3]), dims, strict=True), start=1):
            self.add_module(f"patch_embed{stage}", PatchEmbed(channels, dim))
            self.add_module(f"blocks{stage}", _blocks(config, stage))
        self.norm = nn.BatchNorm3d(dims[3])
        self.apply(_init_convolution)
        self._start(config)

    def _start(self, config: NetworkConfig) -> None:
        """Widen the stems' biases and damp the residual branches, as far as the config wants it."""
        for name, module in self.named_modules():
            if config.stem_bias_std and isinstance(module, PatchEmbed) and module.proj.bias is not None:
                nn.init.normal_(module.proj.bias, std=config.stem_bias_std)
            if (
                config.branch_init_scale != 1
                and name.endswith(BRANCH_ENDS)
                and isinstance(module, nn.Conv3d | nn.Linear)
            ):
                module.weight.data.mul_(config.branch_init_scale)

    def forward(self, x_BCXYZ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the input and the four stages as (B, C, D, H, W), at strides 1, 2, 4, 8 and 16."""
        outputs = [to_depth_first(x_BCXYZ)]
        for stage in (1, 2, 3, 4):
            embedded = self.get_submodule(f"patch_embed{stage}")(outputs[-1])
            outputs.append(self.get_submodule(f"blocks{stage}")(embedded))
        return outputs[0], outputs[1], outputs[2], outputs[3], self.norm(outputs[4])


def _blocks(config: NetworkConfig, stage: int) -> nn.Sequential:
    dim, depth = config.embed_dims[stage - 1], config.depths[stage - 1]
    if stage <= 2:
        return nn.Sequential(*(CBlock(dim, config.mlp_ratio) for _ in range(depth)))
    return nn.Sequential(*(SABlock(dim, dim // config.head_dim, config.mlp_ratio) for _ in range(depth)))


def _init_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
