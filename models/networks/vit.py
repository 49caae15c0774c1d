"""3D vision transformer, and the decoder that makes it a masked autoencoder.

Source: MAE (He et al., CVPR 2022) in three dimensions: pre-norm layers, fixed sines and cosines as positions, masked
patches dropped before the encoder. CINP's own network is not published. The layers are torch's; MONAI's blocks compute
the same, and importing them takes each rank 5 s (measured). Shapes: B batch, N patches, K visible ones, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.config_cinp import ViT3DConfig

EPS = 1e-6


class ViT3D(nn.Module):
    """Encoder without a [CLS] token: what stands for an image is the mean of its tokens, as for other encoders."""

    def __init__(self, config: ViT3DConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv3d(config.in_channels, config.width, config.patch, stride=config.patch)
        self.layers = transformer(config.width, config.depth, config.heads, config.mlp_ratio * config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        initialise(self)

    def forward(self, x_BCXYZ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the input and the tokens after each quarter of the layers as maps (B, W, X/p, Y/p, Z/p), the last one
        normalised. Edges are multiples of the patch p."""
        tokens, grid = self.tokens(x_BCXYZ), patch_grid(x_BCXYZ, self.config.patch)
        depth, kept = len(self.layers), list[Tensor]()
        for number, layer in enumerate(self.layers, start=1):
            tokens = layer(tokens)
            if 4 * number // depth > len(kept):
                kept.append(self.norm(tokens) if number == depth else tokens)
        first, second, third, fourth = (tokens.transpose(1, 2).unflatten(2, grid) for tokens in kept)
        return x_BCXYZ, first, second, third, fourth

    def tokens(self, x_BCXYZ: Tensor) -> Tensor:
        """Return the embedded patches with their positions (B, N, W), before the first layer."""
        embedded = self.patch_embed(self.standardised(x_BCXYZ))
        where = positions(embedded.shape[2:], self.config.width, x_BCXYZ.device)
        return embedded.flatten(2).transpose(1, 2) + where

    def encode(self, tokens_BNW: Tensor) -> Tensor:
        """Return tokens after all layers and the norm; they may be any subset of an image's."""
        for layer in self.layers:
            tokens_BNW = layer(tokens_BNW)
        return self.norm(tokens_BNW)

    def standardised(self, x_BCXYZ: Tensor) -> Tensor:
        """Return the image as the network sees it: see `ViT3DConfig.standardise`."""
        return zscore(x_BCXYZ)[0] if self.config.standardise == "zscore" else x_BCXYZ


def zscore(x_BCXYZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return images with mean 0 and variance 1 over their voxels above 0, other voxels 0; and mean and deviation
    (B, C, 1, 1, 1) of those voxels. An image without any, or with a constant, becomes 0."""
    inside, axes = x_BCXYZ > 0, (2, 3, 4)
    count = inside.sum(axes, keepdim=True).clamp_min(1)
    mean = torch.where(inside, x_BCXYZ, 0).sum(axes, keepdim=True) / count
    centred = torch.where(inside, x_BCXYZ - mean, 0)
    deviation = (centred.square().sum(axes, keepdim=True) / count).sqrt()
    return centred / deviation.clamp_min(EPS), mean, deviation


class MaskedDecoder(nn.Module):
    """Visible tokens to all patches: those that are missing start as one learned token at their position."""

    def __init__(self, config: ViT3DConfig, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = transformer(width, depth, heads, 4 * width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.out = nn.Linear(width, config.in_channels * config.patch**3)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, visible_BKW: Tensor, places_BK: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the predicted patches (B, N, C p^3) of encoded tokens and their places among the N of the grid."""
        seen = self.embed(visible_BKW)
        where = positions(grid, self.width, seen.device)
        tokens = self.mask_token.to(seen.dtype).expand(len(seen), where.shape[1], -1)
        tokens = tokens.scatter(1, places_BK[:, :, None].expand_as(seen), seen) + where
        for layer in self.layers:
            tokens = layer(tokens)
        return self.out(self.norm(tokens))


def transformer(width: int, depth: int, heads: int, hidden: int, dropout: float = 0.0) -> nn.ModuleList:
    """Return pre-norm layers of self-attention and a perceptron with GELU, for (B, N, W)."""
    values = {"batch_first": True, "norm_first": True, "layer_norm_eps": EPS, "dropout": dropout, "activation": "gelu"}
    return nn.ModuleList(nn.TransformerEncoderLayer(width, heads, hidden, **values) for _ in range(depth))  # type: ignore[arg-type]


def initialise(module: nn.Module) -> None:
    """Draw linear maps, the embedding of patches among them, as MAE does: Xavier uniform, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def positions(grid: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Return sines and cosines (1, N, width) of the three places of each patch, counted from the middle of the grid.

    A third of the width for each axis, with wave lengths from 2 pi to 10000 2 pi patches; what is left over is 0.
    """
    count = width // 6
    wave = 10_000 ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
    axes = [torch.arange(edge, device=device, dtype=torch.float32) - (edge - 1) / 2 for edge in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    angles = places[:, :, None] * wave
    waves = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    return nn.functional.pad(waves, (0, width - waves.shape[1]))[None]


def patch_grid(x_BCXYZ: Tensor, patch: int) -> tuple[int, int, int]:
    """Return the number of patches along each axis."""
    x, y, z = (edge // patch for edge in x_BCXYZ.shape[2:])
    return x, y, z


def patches(x_BCXYZ: Tensor, patch: int) -> Tensor:
    """Return the voxels (B, N, C p^3) of the patches, in the order of the tokens."""
    x, y, z = patch_grid(x_BCXYZ, patch)
    split = x_BCXYZ.unflatten(4, (z, patch)).unflatten(3, (y, patch)).unflatten(2, (x, patch))
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatch(patches_BNV: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """Return the image (B, C, X, Y, Z) of its patches."""
    split = patches_BNV.unflatten(2, (-1, patch, patch, patch)).unflatten(1, tuple(grid))
    return split.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)
