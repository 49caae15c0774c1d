"""Classifier: global average pooling of the coarsest stage and one linear layer.

Source: the paper says "simply an MLP with softmax"; re-users take pooling and a linear layer, as here.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.config import AnyNetwork
from models.networks.build import build_encoder, pool


class ClassificationNet(nn.Module):
    """Encoder, mean over positions, linear layer to `classes` logits."""

    def __init__(self, config: AnyNetwork, classes: int) -> None:
        super().__init__()
        self.encoder = build_encoder(config)
        self.head = nn.Linear(config.feature_dim, classes)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> logits (B, classes)."""
        return self.head(pool(self.encoder(x_BCXYZ)))
