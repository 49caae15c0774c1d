"""Network-image matching: tokens of a connectome attend to tokens of an image; does one belong to the other?

Source: ALBEF's multimodal layers (Li et al., NeurIPS 2021): self-attention, cross-attention, perceptron; [CLS] and one
linear layer to two classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.config_cinp import ConnectomeNetworkConfig
from models.networks.vit import EPS, initialise


class Matching(nn.Module):
    """As wide as the connectome network; image tokens are mapped to that width first (`image_tokens`)."""

    def __init__(self, config: ConnectomeNetworkConfig, image_width: int, depth: int) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, config.width)
        values = {"batch_first": True, "norm_first": True, "layer_norm_eps": EPS, "activation": "gelu"}
        sizes = (config.width, config.heads, config.hidden, config.dropout)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(*sizes, **values) for _ in range(depth))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.head = nn.Linear(config.width, 2)
        initialise(self)

    def image_tokens(self, tokens_BNW: Tensor) -> Tensor:
        """Return an image's tokens as the layers take them (B, N, width)."""
        return self.image(tokens_BNW)

    def forward(self, network_BTW: Tensor, absent_BT: Tensor, image_BNW: Tensor) -> Tensor:
        """Return logits (B, 2), float32, of "another person's" and "the same person's"."""
        tokens = network_BTW
        for layer in self.layers:
            tokens = layer(tokens, image_BNW, tgt_key_padding_mask=absent_BT)
        return self.head(self.norm(tokens[:, 0])).float()
