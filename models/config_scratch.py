"""Segmentation networks of others, trained from scratch only: SwinUNETR, and a U-Net as nnU-Net would lay it out.

They are rows beside ours in tables of segmentation. MONAI has both networks; the sizes are chosen here.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.records import Record


class SwinUNETRConfig(Record):
    """Sizes of MONAI's SwinUNETR. The defaults are those of its paper (Hatamizadeh et al., BrainLes 2021): 62,191,941
    parameters for 4 channels and 3 regions. It has one output: no deep supervision."""

    edge_multiple: ClassVar[int] = 32
    """Edges of images that the network takes are multiples of this."""

    kind: Literal["swin_unetr"] = "swin_unetr"
    in_channels: int = Field(1, ge=1)
    feature_size: int = Field(48, ge=12, multiple_of=12)
    """Channels at full and at 1/2 resolution; each further level has twice as many."""
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Transformer blocks of the four levels."""
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window: int = Field(7, ge=2)
    """Edge of an attention window in tokens."""
    norm: Literal["instance", "group"] = "instance"
    """Of the convolutional blocks. An instance norm needs two or more voxels at 1/32 resolution; `group` (4 groups)
    takes one, so a crop of 32^3."""

    @property
    def feature_dim(self) -> int:
        """Channels of the coarsest features."""
        return 16 * self.feature_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        for level, heads in enumerate(self.heads):
            if self.feature_size * 2**level % heads:
                raise ValueError(
                    f"width of level {level + 1} must be a multiple of its heads: got {self.feature_size * 2**level} "
                    f"and {heads}; change feature_size or heads"
                )
        return self


class DynUNetConfig(Record):
    """Sizes of MONAI's DynUNet as nnU-Net's rules give them for crops of 96^3: edges are halved while they stay at 4
    voxels or more, 32 channels, doubled at each level up to 320. 16,546,857 parameters for 4 channels and 3 regions."""

    kind: Literal["dynunet"] = "dynunet"
    in_channels: int = Field(1, ge=1)
    widths: tuple[int, ...] = Field((32, 64, 128, 256, 320), min_length=4, max_length=8)
    """Channels of the levels, fine to coarse; each level halves the edges."""
    residual: bool = False
    """Residual blocks in the encoder (nnU-Net's ResEnc idea, one block a level) instead of plain ones."""

    @property
    def edge_multiple(self) -> int:
        """Edges of images that the network takes are multiples of this."""
        return 2 ** (len(self.widths) - 1)

    @property
    def feature_dim(self) -> int:
        """Channels of the coarsest features."""
        return self.widths[-1]


ScratchNetwork = SwinUNETRConfig | DynUNetConfig

SCRATCH_NETWORKS: dict[str, dict[str, ScratchNetwork]] = {
    "swin_unetr": {
        "full": SwinUNETRConfig(),
        # A crop of 32^3 leaves one voxel at 1/32, which an instance norm would make 0.
        "tiny": SwinUNETRConfig(feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=4, norm="group"),
    },
    "dynunet": {"full": DynUNetConfig(), "tiny": DynUNetConfig(widths=(8, 16, 32, 64))},
}
"""By kind and size: `full` for the recipe `segmentation`, `tiny` for `segmentation_tiny`."""
