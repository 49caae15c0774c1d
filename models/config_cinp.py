"""Settings of CINP: its image network, its connectome network, its objective, and a supervised network classifier."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from models.config_anatcl import WholeMapConfig
from models.records import Record

Triple = tuple[int, int, int]


def _check_heads(what: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{what} must be a multiple of its heads: got {width} and {heads}")


class ViT3DConfig(Record):
    """Sizes of the 3D vision transformer. The defaults are ViT-B with patches of 16^3 voxels; ViT-S is width 384 with
    6 heads."""

    kind: Literal["vit3d"] = "vit3d"
    in_channels: int = Field(1, ge=1)
    patch: int = Field(16, ge=1)
    """Edge of a patch in voxels; edges of images are multiples of it."""
    image_size: Triple = (128, 128, 128)
    """Voxels around the middle of the grid that make a whole image when the encoder is used. Positions are fixed sines
    and cosines counted from the middle, so images of other sizes are encoded too."""
    width: int = Field(768, ge=6)
    depth: int = Field(12, ge=4)
    heads: int = Field(12, ge=1)
    mlp_ratio: int = Field(4, ge=1)
    standardise: Literal["zscore", "none"] = "zscore"
    """Of each image and channel, over its voxels above 0; the background stays 0."""

    @property
    def edge_multiple(self) -> int:
        """Edges of images that the network takes are multiples of this."""
        return self.patch

    @property
    def feature_dim(self) -> int:
        """Channels of the coarsest features."""
        return self.width

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.image_size) < 1 or any(edge % self.patch for edge in self.image_size):
            raise ValueError(f"image_size must be positive multiples of patch {self.patch}, got {self.image_size}")
        _check_heads("width", self.width, self.heads)
        return self


class ConnectomeNetworkConfig(Record):
    """Network of connectomes. The number of regions is that of the matrices: the store's spec says it."""

    kind: Literal["transformer", "triangle", "bnt"] = "transformer"
    """transformer: the rows of the matrix and a [CLS] token. triangle: a perceptron on the upper triangle. bnt:
    BrainNetworkTransformer, whose width is the number of regions; for supervised use."""
    width: int = Field(256, ge=1)
    """Of tokens and features (transformer, triangle); bnt: of its first fully connected layer."""
    depth: int = Field(2, ge=1)
    """Layers; of bnt the last one pools."""
    heads: int = Field(4, ge=1)
    """bnt: the largest number up to this that divides the regions."""
    hidden: int = Field(1024, ge=1)
    """Units between the two linear maps of a layer."""
    dropout: float = Field(0.0, ge=0, lt=1)
    clusters: int = Field(100, ge=2)
    """bnt: clusters of its orthonormal readout; with as few regions or fewer, half of the regions."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "transformer":
            _check_heads("width of the connectome network", self.width, self.heads)
        return self


class CINPConfig(WholeMapConfig):
    """Image-network contrast (INC), masked image modelling (MIM) and network-image matching (NIM)."""

    kind: Literal["cinp"] = "cinp"
    modality: str = "t1"
    """Channel of the store."""
    weight_contrast: float = Field(1.0, ge=0)
    """Of INC: symmetric InfoNCE of images and their own connectomes."""
    weight_masking: float = Field(1.0, ge=0)
    """Of MIM: mean squared error of masked patches."""
    weight_matching: float = Field(1.0, ge=0)
    """Of NIM: does this connectome belong to this image?"""
    mask_rate: float = Field(0.75, gt=0, lt=1)
    """Share of patches that MIM hides; floor(n (1 - rate)) random ones are seen."""
    normalise_patches: bool = True
    """Let MIM predict patches with mean 0 and variance 1, as MAE does."""
    decoder_width: int = Field(512, ge=6)
    decoder_depth: int = Field(4, ge=1)
    decoder_heads: int = Field(16, ge=1)
    network_encoder: ConnectomeNetworkConfig = ConnectomeNetworkConfig()
    embedding_dim: int = Field(256, ge=1)
    """Width of the embeddings that INC compares, behind one linear layer each."""
    temperature: float = Field(0.07, gt=0)
    """Where it starts; it is learned."""
    temperature_min: float = Field(0.001, gt=0)
    temperature_max: float = Field(0.5, gt=0)
    gather_negatives: bool = True
    """Candidates of INC and NIM from all ranks, not from the local batch only."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of slow copies of encoders and projections, whose embeddings are INC's candidates (ALBEF: 0.995). 0: none."""
    queue: int = Field(0, ge=0)
    """Embeddings of earlier cases that are candidates, too; a multiple of the cases of an optimiser step. Needs
    momentum."""
    soft_targets: float = Field(0.4, ge=0, le=1)
    """With momentum: share of the slow copies' softmax in the targets of INC, after a rise over the first epoch."""
    matching_depth: int = Field(2, ge=1)
    """Layers in which network tokens attend to image tokens; as wide as the connectome network."""

    @property
    def uses_networks(self) -> bool:
        """Whether a term needs connectomes."""
        return self.weight_contrast > 0 or self.weight_matching > 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.uses_networks or self.weight_masking):
            raise ValueError("weight_contrast, weight_masking and weight_matching are all 0: nothing would be learned")
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError(
                f"temperature {self.temperature:g} must lie between temperature_min {self.temperature_min:g} and "
                f"temperature_max {self.temperature_max:g}"
            )
        if self.weight_masking:
            _check_heads("decoder_width", self.decoder_width, self.decoder_heads)
        if self.uses_networks and self.network_encoder.kind == "bnt":
            raise ValueError(
                "network_encoder.kind 'bnt' is for supervised use: its width is the number of regions and its clusters "
                "are no regions to attend from; use 'transformer' or 'triangle'"
            )
        if self.momentum and not self.weight_contrast:
            raise ValueError("momentum is of the contrast, and weight_contrast is 0: set one of them otherwise")
        if self.queue and not (self.momentum and self.gather_negatives):
            raise ValueError(
                "queue keeps embeddings of momentum encoders, the same on all ranks: it needs momentum above 0 and "
                "gather_negatives"
            )
        if self.weight_matching:
            _check_heads("width of the connectome network", self.network_encoder.width, self.network_encoder.heads)
        return self


class NetworkClassificationConfig(Record):
    """Supervised classes of connectomes: a baseline. The defaults are BrainNetworkTransformer's released settings."""

    network: ConnectomeNetworkConfig = ConnectomeNetworkConfig(kind="bnt", width=256, dropout=0.1)
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(16, ge=2)
    lr: float = Field(1e-4, gt=0)
    """Of Adam at the start; a cosine leads to `lr_end`."""
    lr_end: float = Field(1e-5, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    mixup: float = Field(1.0, ge=0)
    """Both parameters of the Beta distribution of mixup's weights; 0: no mixup."""
