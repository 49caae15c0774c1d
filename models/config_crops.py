"""Settings of the baselines that share BrainMVP's crops: masked autoencoder and contrast of two crops."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.config_anatcl import ViewConfig
from models.records import Record


class MaskedCropsConfig(Record):
    """Masked autoencoder of single modalities: cubes are hidden and restored."""

    kind: Literal["mae"] = "mae"
    mask_block: int = Field(16, ge=1)
    """Edge of a hidden cube in voxels; the crop is made of whole ones."""
    mask_rate: float = Field(0.75, gt=0, lt=1)
    """Share of cubes hidden; floor(n (1 - rate)) random ones are seen."""
    decoder_skips: bool = True
    """Let stages 1 to 3 enter the decoder too, each through convolutions."""


class CropContrastConfig(Record):
    """SimCLR on crops: two crops of one image are alike, crops of other people are not."""

    kind: Literal["simclr_crops"] = "simclr_crops"
    temperature: float = Field(0.1, gt=0)
    head_dim: int = Field(128, ge=1)
    """Width of the embedding that is compared; the head is dropped afterwards."""
    gather_negatives: bool = True
    """Negatives from all ranks, not from the local batch only."""
    intensity: float = Field(0.3, ge=0, lt=1)
    """Random scale and shift of each crop's intensities, +- this share."""
    gamma: float = Field(0.3, ge=0)
    """Intensities are raised to the power exp(g), g uniform within +- this: histograms alone tell nobody apart."""
    views: ViewConfig = ViewConfig(flip=True, noise_std=0.05, cutout_share=0.25)
    """Flips, noise and a box of zeros. Crops start anywhere, so there are no further shifts."""
