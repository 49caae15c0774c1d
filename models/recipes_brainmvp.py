"""Recipes of BrainMVP, and of the baselines that share its crops, networks and budget: masked autoencoder and SimCLR.

A baseline differs from BrainMVP's recipe of its size in the objective alone, so that tables compare like with like:
same crop, batch, epochs, optimiser and ranks, and two crops of each case through the encoder in every epoch.
"""

from __future__ import annotations

from typing import Any

from models.config import (
    BrainMVPConfig,
    CropContrastConfig,
    DataConfig,
    MaskedCropsConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimiserConfig,
    TrainingConfig,
    UNet3DConfig,
)
from models.overrides import Recipe, apply_overrides

# A few hundred steps must do: biases in the stems and damped branches let intensities through from the first step on
# (linear decodability of random features: 15.3 dB with the reference's start, 18 to 19 dB with
# this one, on networks a little wider than this).
TINY_NETWORK = NetworkConfig(
    embed_dims=(16, 32, 64, 128),
    depths=(1, 1, 1, 1),
    head_dim=32,
    decoder_dim=8,
    stem_bias_std=0.5,
    branch_init_scale=0.1,
)
TINY_UNET = UNet3DConfig(widths=(8, 16, 32, 64), blocks=(1, 1, 1, 1))


def brainmvp(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train UniFormer-S with BrainMVP on GPUs: 96^3 crops at 1 mm, global batch 24, 1500 epochs."""
    base = TrainingConfig(
        name="brainmvp",
        recipe="brainmvp",
        preset=preset,
        network=NetworkConfig(),
        objective=_brainmvp_objective(preset),
        data=DataConfig(store=store, selection=selection, crop=(96, 96, 96), batch_size=3, workers=4),
        # The cosine falls to 0 over all optimiser steps; the reference's rate rose again half-way.
        optimiser=OptimiserConfig(kind="adamw", lr=3e-4, weight_decay=1e-5),
        epochs=1500,
        world_size=8,
        precision="bf16",
        checkpoint_every=500,
        validate_every=5000,
    )
    return apply_overrides(base, overrides)


def brainmvp_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train a small UniFormer on two CPU ranks: 32^3 crops, 4 cases a rank, all three objectives."""
    base = TrainingConfig(
        name="brainmvp_tiny",
        recipe="brainmvp_tiny",
        preset=preset,
        network=TINY_NETWORK,
        objective=_brainmvp_objective(preset),
        data=DataConfig(store=store, selection=selection, crop=(32, 32, 32), batch_size=4),
        optimiser=OptimiserConfig(kind="muon", lr=4e-3, weight_decay=1e-4, warmup_share=0.05),
        epochs=72,
        world_size=2,
        checkpoint_every=50,
        validate_every=200,
    )
    return apply_overrides(base, overrides)


def brainmvp_unet(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train UNET3D, the paper's second backbone, with BrainMVP on GPUs."""
    base = brainmvp(store, selection, preset)
    base = base.replace(name="brainmvp_unet", recipe="brainmvp_unet", network=UNet3DConfig())
    return apply_overrides(base, overrides)


def brainmvp_unet_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train a small UNET3D on two CPU ranks: 32^3 crops, 4 cases a rank, all three objectives."""
    base = brainmvp_tiny(store, selection, preset)
    base = base.replace(
        name="brainmvp_unet_tiny",
        recipe="brainmvp_unet_tiny",
        network=TINY_UNET,
        # Half the rates of the UniFormer twin: lower losses after 40 steps, and far less sensitive to rounding.
        optimiser=base.optimiser.replace(lr=2e-3, muon_lr=0.01),
    )
    return apply_overrides(base, overrides)


def mae(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: masked autoencoder of single modalities, UniFormer-S, at the budget of `brainmvp`."""
    return _instead(brainmvp(store, selection), "mae", MaskedCropsConfig(), preset, overrides)


def mae_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `mae` on two CPU ranks, cubes of 8^3 voxels."""
    return _instead(brainmvp_tiny(store, selection), "mae_tiny", MaskedCropsConfig(mask_block=8), preset, overrides)


def mae_unet(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: masked autoencoder of single modalities, UNET3D, at the budget of `brainmvp_unet`."""
    return _instead(brainmvp_unet(store, selection), "mae_unet", MaskedCropsConfig(), preset, overrides)


def mae_unet_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `mae_unet` on two CPU ranks."""
    return _instead(
        brainmvp_unet_tiny(store, selection), "mae_unet_tiny", MaskedCropsConfig(mask_block=8), preset, overrides
    )


def simclr_crops(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: contrast of two crops of one image (SimCLR), UniFormer-S, at the budget of `brainmvp`."""
    return _instead(brainmvp(store, selection), "simclr_crops", CropContrastConfig(), preset, overrides)


def simclr_crops_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `simclr_crops` on two CPU ranks."""
    return _instead(brainmvp_tiny(store, selection), "simclr_crops_tiny", CropContrastConfig(), preset, overrides)


def simclr_crops_unet(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: contrast of two crops of one image (SimCLR), UNET3D, at the budget of `brainmvp_unet`."""
    return _instead(brainmvp_unet(store, selection), "simclr_crops_unet", CropContrastConfig(), preset, overrides)


def simclr_crops_unet_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `simclr_crops_unet` on two CPU ranks."""
    return _instead(
        brainmvp_unet_tiny(store, selection), "simclr_crops_unet_tiny", CropContrastConfig(), preset, overrides
    )


CROP_RECIPES: tuple[Recipe, ...] = (
    *(brainmvp, brainmvp_tiny, brainmvp_unet, brainmvp_unet_tiny),
    *(mae, mae_tiny, mae_unet, mae_unet_tiny),
    *(simclr_crops, simclr_crops_tiny, simclr_crops_unet, simclr_crops_unet_tiny),
)


def _instead(
    base: TrainingConfig, name: str, objective: ObjectiveConfig, preset: str, overrides: dict[str, Any]
) -> TrainingConfig:
    """Return a recipe of BrainMVP with another name and objective; raises KeyError for a preset that it has not."""
    if preset != "recommended":
        raise KeyError(f"unknown preset {preset!r} of {name}; known: recommended (a baseline of ours)")
    return apply_overrides(base.replace(name=name, recipe=name, objective=objective), overrides)


def _brainmvp_objective(preset: str) -> BrainMVPConfig:
    from models.objectives.brainmvp import PRESETS

    try:
        return PRESETS[preset]
    except KeyError:
        raise KeyError(f"unknown preset {preset!r} of BrainMVP; known: {', '.join(PRESETS)}") from None
