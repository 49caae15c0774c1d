"""Recipes of CINP and of its baseline without connectomes, the masked autoencoder of images alone.

    config = RECIPES["cinp_tiny"]("work/cinp.zarr", "trainings/a/selection.parquet", epochs=10)

`crop` sets the size of the image for reading and for the network alike.
"""

from __future__ import annotations

from typing import Any

from models.config import DataConfig, OptimiserConfig, TrainingConfig
from models.config_cinp import CINPConfig, ConnectomeNetworkConfig, Triple, ViT3DConfig
from models.overrides import Recipe, apply_overrides

SIZES: dict[str, Triple] = {
    # 8^3 patches of 16 mm around the middle, a size that the literature on 3D ViTs uses; the brain is larger.
    "paper": (128, 128, 128),
    # The whole grid of t1_mni and cinp: 128 mm would cut off the frontal and occipital poles.
    "recommended": (160, 192, 160),
}
"""Voxels of an image by preset."""
VIT_S = ViT3DConfig(width=384, heads=6)
TINY_SIZE: Triple = (32, 40, 32)
"""The whole grid of the spec cinp_tiny."""
TINY_VIT = ViT3DConfig(patch=8, image_size=TINY_SIZE, width=96, depth=4, heads=4, mlp_ratio=2)
TINY_NETWORK = ConnectomeNetworkConfig(width=64, heads=4, hidden=128)


def cinp(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train ViT-B on images and connectomes: global batch 64 on 8 GPUs, AdamW 1e-4, 200 epochs."""
    return _with(_base("cinp", store, selection, preset), overrides)


def cinp_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train a small ViT on two CPU ranks: images of 6 mm, connectomes, 8 cases a rank."""
    return _with(_tiny("cinp", store, selection, preset), overrides)


def image_mae(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: masked image modelling alone; connectomes are not read."""
    return _with(_base("image_mae", store, selection, preset), overrides)


def image_mae_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `image_mae` on two CPU ranks."""
    return _with(_tiny("image_mae", store, selection, preset), overrides)


CINP_RECIPES: tuple[Recipe, ...] = (cinp, cinp_tiny, image_mae, image_mae_tiny)


def _with(config: TrainingConfig, overrides: dict[str, Any]) -> TrainingConfig:
    """Apply overrides; a crop, or a network's image size, that is given alone sets the other one too."""
    network = overrides.get("network")
    given = network.get("image_size") if isinstance(network, dict) else getattr(network, "image_size", None)
    size = overrides.get("crop") or overrides.get("image_size") or given
    both = {} if size is None else {"crop": tuple(size)} | ({} if network else {"image_size": tuple(size)})
    return apply_overrides(config, {**both, **overrides})


def _base(name: str, store: str, selection: str, preset: str) -> TrainingConfig:
    return TrainingConfig(
        name=name,
        recipe=name,
        preset=preset,
        network=ViT3DConfig(image_size=_size(name, preset)),
        objective=_objective(name, preset),
        data=DataConfig(store=store, selection=selection, crop=_size(name, preset), batch_size=8, workers=8),
        optimiser=OptimiserConfig(kind="adamw", lr=1e-4, weight_decay=0.05, warmup_share=0.1),
        epochs=200,
        world_size=8,
        precision="bf16",
        checkpoint_every=200,
        validate_every=1000,
    )


def _tiny(name: str, store: str, selection: str, preset: str) -> TrainingConfig:
    base = _base(name, store, selection, preset)
    sizes = {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 4, "embedding_dim": 64, "matching_depth": 1}
    return base.replace(
        name=f"{name}_tiny",
        recipe=f"{name}_tiny",
        network=TINY_VIT,
        objective=base.objective.replace(network_encoder=TINY_NETWORK, **sizes),
        data=base.data.replace(crop=TINY_SIZE, batch_size=8, workers=0),
        optimiser=base.optimiser.replace(lr=1e-3),
        epochs=60,
        world_size=2,
        precision="fp32",
        checkpoint_every=50,
        validate_every=100,
    )


def _objective(name: str, preset: str) -> CINPConfig:
    from models.objectives.cinp import PRESETS

    settings = PRESETS[preset] if preset in PRESETS else _refuse(name, preset)
    if name == "image_mae":
        return settings.replace(weight_contrast=0.0, weight_matching=0.0)
    return settings


def _size(name: str, preset: str) -> Triple:
    return SIZES[preset] if preset in SIZES else _refuse(name, preset)


def _refuse(name: str, preset: str) -> Any:
    raise KeyError(f"unknown preset {preset!r} of {name}; known: {', '.join(SIZES)} (its code was not released)")
