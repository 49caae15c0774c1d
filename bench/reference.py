"""The peer for a step: the structure of BrainMVP's reference code, written plainly and anew.

Convolutions on contiguous (B, C, D, H, W), attention with its matrix of weights, the full decoder with the 10.5 M
weights that never get a gradient, the whole template slice normalised at every use, a dense gradient and AdamW state
for all 71 M values of the bank, no clipping. Parameter names are those of our networks, so that both can start from
the same weights. Source: methods paper and reference code of BrainMVP (its anomaly detection, always on, is left out).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.unetr_block import UnetrUpBlock
from torch import Tensor, nn

from models.config import NetworkConfig
from models.records import MODALITIES

EPSILON = 1e-9


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, dim: int, kernel: int = 2) -> None:
        super().__init__()
        self.proj = (
            nn.Conv3d(in_channels, dim, kernel, stride=2) if kernel == 2 else nn.Conv3d(in_channels, dim, 3, 1, 1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        batch, dim, *size = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return tokens.reshape(batch, *size, dim).permute(0, 4, 1, 2, 3).contiguous()


class ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv3d(dim, hidden, 1), nn.Conv3d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class CBlock(nn.Module):
    def __init__(self, dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.BatchNorm3d(dim), nn.BatchNorm3d(dim)
        self.conv1, self.conv2 = nn.Conv3d(dim, dim, 1), nn.Conv3d(dim, dim, 1)
        self.attn = nn.Conv3d(dim, dim, 5, padding=2, groups=dim)
        self.mlp = ConvMlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, tokens, dim))


class TokenMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SABlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = TokenMlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        shape = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(shape)


class Encoder(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        channels = (config.in_channels, *config.embed_dims[:3])
        for stage, (before, dim) in enumerate(zip(channels, config.embed_dims, strict=True), start=1):
            blocks = [
                CBlock(dim, config.mlp_ratio) if stage <= 2 else SABlock(dim, dim // config.head_dim, config.mlp_ratio)
                for _ in range(config.depths[stage - 1])
            ]
            self.add_module(f"patch_embed{stage}", PatchEmbed(before, dim))
            self.add_module(f"blocks{stage}", nn.Sequential(*blocks))
        self.norm = nn.BatchNorm3d(config.embed_dims[3])

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 1, 4, 2, 3)
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"blocks{stage}")(self.get_submodule(f"patch_embed{stage}")(x))
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        one, two, three, four = config.embed_dims
        self.proj1 = PatchEmbed(config.in_channels, config.decoder_dim, kernel=3)
        self.decoder5, self.decoder4 = _up(four, three), _up(three, two)
        self.decoder3, self.decoder2 = _up(two, one), _up(one, config.decoder_dim)
        head = nn.Conv3d(config.decoder_dim, 1, 1)
        self.out_1 = nn.Sequential(OrderedDict(conv=nn.Sequential(OrderedDict(conv=head))))

    def forward(self, x: Tensor) -> Tensor:
        for level in (self.decoder5, self.decoder4, self.decoder3, self.decoder2):
            x = level.transp_conv(x)
        return self.out_1(x).permute(0, 1, 3, 4, 2)


def _up(in_channels: int, out_channels: int) -> Any:
    return UnetrUpBlock(3, in_channels, out_channels, 3, 2, "instance", res_block=True)


class Reference(nn.Module):
    """Encoder, decoder and template bank; all three losses with weight 1, temperature 1, negatives of the batch."""

    def __init__(self, config: NetworkConfig, grid: tuple[int, int, int], block: int) -> None:
        super().__init__()
        self.block = block
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.template = nn.ParameterDict({"bank": torch.zeros(len(MODALITIES), *grid)})

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Batches as the sampler of BrainMVP makes them, windows inside the bank -> the sum of the three losses."""
        target, other = batch["image"][:, 0], batch["image"][:, 1]
        mask = batch["mask"]
        for axis in (2, 3, 4):
            mask = mask.repeat_interleave(self.block, dim=axis)
        templates = torch.stack(
            [self._window(m, s, target) for m, s in zip(batch["template"], batch["template_start"], strict=True)]
        )
        views = (torch.where(mask[:, 0], templates, target), torch.where(mask[:, 1], other, target))
        features = self.encoder(torch.cat(views)[:, None])
        images = self.decoder(features)[:, 0]
        one, two = F.normalize(features.flatten(1), dim=1).chunk(2)
        similarity, positives = one @ two.T, torch.arange(len(one))
        contrast = (F.cross_entropy(similarity, positives) + F.cross_entropy(similarity.T, positives)) / 2
        distillation, reconstruction = (F.mse_loss(view, target) for view in images.chunk(2))
        return distillation + reconstruction + contrast

    def _window(self, modality: Tensor, start: Tensor, like: Tensor) -> Tensor:
        image = self.template["bank"][int(modality)]
        image = (image - image.min()) / (image.max() - image.min() + EPSILON)
        return image[tuple(slice(int(s), int(s) + n) for s, n in zip(start, like.shape[1:], strict=True))]
