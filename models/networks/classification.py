"""Classifier: global average pooling of UniFormer's stage 4 and one linear layer.

Source: the paper says "simply an MLP with softmax"; re-users take pooling and a linear layer, as here.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.config import NetworkConfig
from models.networks.uniformer import UniFormer


class ClassificationNet(nn.Module):
    """Encoder, mean over positions, linear layer to `classes` logits."""

    def __init__(self, config: NetworkConfig, classes: int) -> None:
        super().__init__()
        self.encoder = UniFormer(config)
        self.head = nn.Linear(config.embed_dims[3], classes)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        """See `classify`."""
        return classify(self.encoder, self.head, x_BCXYZ)


def classify(encoder: nn.Module, head: nn.Module, x_BCXYZ: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> logits (B, classes)."""
    return head(encoder(x_BCXYZ)[-1].mean(dim=(2, 3, 4)))
