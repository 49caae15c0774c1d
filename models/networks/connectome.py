"""Networks of connectomes: rows of the matrix as tokens, a perceptron on its triangle, BrainNetworkTransformer.

A matrix is (B, R, R); rows and columns of missing regions are NaN. Sources: CINP publishes no details of its network
encoder; rows as nodes are those of BrainNetworkTransformer (Kan et al., NeurIPS 2022), whose code the class of that
name follows. Shapes: B batch, R regions, T tokens, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config_cinp import ConnectomeNetworkConfig
from models.networks.vit import EPS, initialise, transformer

NODE = 8
"""Values that BrainNetworkTransformer keeps of a cluster."""
SMALL = 32
"""Width of its narrow layers."""


def missing_regions(matrix_BRR: Tensor) -> Tensor:
    """Return which regions are missing (B, R): those whose row knows nothing of another region."""
    return matrix_BRR.isfinite().sum(-1) < 2


class ConnectomeTransformer(nn.Module):
    """[CLS] and a token for every region: its row, mapped to the width, and a learned vector of the region."""

    def __init__(self, config: ConnectomeNetworkConfig, regions: int) -> None:
        super().__init__()
        self.embed = nn.Linear(regions, config.width)
        self.layers = transformer(config.width, config.depth, config.heads, config.hidden, config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        initialise(self)
        self.region = nn.Parameter(0.02 * torch.randn(1, regions, config.width))
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, config.width))

    def forward(self, matrix_BRR: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, 1 + R, W), [CLS] first, and which are of missing regions (B, 1 + R): nothing attends to
        those. In the rows of the others a missing region counts as 0."""
        absent = nn.functional.pad(missing_regions(matrix_BRR), (1, 0))
        rows = self.embed(torch.nan_to_num(matrix_BRR, nan=0.0)) + self.region
        tokens = torch.cat([self.cls.to(rows.dtype).expand(len(rows), -1, -1), rows], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=absent)
        return self.norm(tokens), absent


class TriangleNetwork(nn.Module):
    """A perceptron on the upper triangle; what is missing counts as 0."""

    def __init__(self, config: ConnectomeNetworkConfig, regions: int) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.triu_indices(regions, regions, 1), persistent=False)
        parts: list[nn.Module] = [nn.Linear(regions * (regions - 1) // 2, config.hidden), nn.GELU()]
        for _ in range(config.depth - 1):
            parts += [nn.Dropout(config.dropout), nn.Linear(config.hidden, config.hidden), nn.GELU()]
        self.layers = nn.Sequential(*parts, nn.Dropout(config.dropout), nn.Linear(config.hidden, config.width))
        self.norm = nn.LayerNorm(config.width, eps=EPS)

    pairs: Tensor

    def forward(self, matrix_BRR: Tensor) -> tuple[Tensor, Tensor]:
        """Return one token (B, 1, W), and that it is not missing (B, 1)."""
        values = torch.nan_to_num(matrix_BRR[:, self.pairs[0], self.pairs[1]], nan=0.0)
        absent = torch.zeros(len(values), 1, dtype=torch.bool, device=values.device)
        return self.norm(self.layers(values))[:, None], absent


NetworkEncoder = ConnectomeTransformer | TriangleNetwork


def build_network_encoder(config: ConnectomeNetworkConfig, regions: int) -> NetworkEncoder:
    """Return the encoder of matrices (B, R, R); its first token stands for the connectome.

    Raises ValueError for kind `bnt`, which gives classes, not tokens.
    """
    if config.kind == "bnt":
        raise ValueError("network kind 'bnt' gives classes, not tokens; use 'transformer' or 'triangle'")
    return TriangleNetwork(config, regions) if config.kind == "triangle" else ConnectomeTransformer(config, regions)


class Readout(nn.Module):
    """OCRead: regions are assigned to clusters by their squared projections on fixed orthonormal centres."""

    centres: Tensor

    def __init__(self, regions: int, clusters: int) -> None:
        super().__init__()
        size = regions * regions
        self.mix = nn.Sequential(
            *(nn.Linear(size, SMALL), nn.LeakyReLU(), nn.Linear(SMALL, SMALL), nn.LeakyReLU(), nn.Linear(SMALL, size))
        )
        self.register_buffer("centres", torch.linalg.qr(torch.randn(regions, clusters)).Q.T.contiguous())

    def forward(self, nodes_BRR: Tensor) -> Tensor:
        """(B, R, R) -> (B, clusters, R)."""
        mixed = self.mix(nodes_BRR.flatten(1)).view_as(nodes_BRR)
        share = (mixed @ self.centres.T).square().softmax(-1)
        return share.transpose(1, 2) @ mixed


class BrainNetworkTransformer(nn.Module):
    """Rows as nodes as wide as the regions, layers of attention, OCRead before the readout, classes.

    1,676,930 trainable parameters and 11,600 values of centres with 116 regions, two layers and two classes (the
    reference: 1.69 M together).
    """

    def __init__(self, config: ConnectomeNetworkConfig, regions: int, classes: int) -> None:
        super().__init__()
        heads = max(count for count in range(1, config.heads + 1) if regions % count == 0)
        clusters = config.clusters if regions > config.clusters else regions // 2
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(regions, heads, config.hidden, config.dropout, batch_first=True)
            for _ in range(config.depth)
        )
        self.readout = Readout(regions, clusters)
        self.reduce = nn.Sequential(nn.Linear(regions, NODE), nn.LeakyReLU())
        self.head = nn.Sequential(
            *(nn.Linear(NODE * clusters, config.width), nn.LeakyReLU(), nn.Linear(config.width, SMALL)),
            *(nn.LeakyReLU(), nn.Linear(SMALL, classes)),
        )

    def forward(self, matrix_BRR: Tensor) -> Tensor:
        """(B, R, R) -> logits (B, classes); what is missing counts as 0."""
        nodes = torch.nan_to_num(matrix_BRR, nan=0.0)
        for layer in self.layers:
            nodes = layer(nodes)
        return self.head(self.reduce(self.readout(nodes)).flatten(1))


class NetworkClassifierNet(nn.Module):
    """Classes of connectomes by any of the networks."""

    def __init__(self, config: ConnectomeNetworkConfig, regions: int, classes: int) -> None:
        super().__init__()
        if config.kind == "bnt":
            self.encoder, self.head = BrainNetworkTransformer(config, regions, classes), None
        else:
            self.encoder = build_network_encoder(config, regions)  # type: ignore[assignment]
            self.head = nn.Linear(config.width, classes)

    def forward(self, matrix_BRR: Tensor) -> Tensor:
        """(B, R, R) -> logits (B, classes)."""
        if self.head is None:
            return self.encoder(matrix_BRR)
        return self.head(self.encoder(matrix_BRR)[0][:, 0])
