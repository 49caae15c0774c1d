"""Recipes of AnatCL and of the baselines of its paper: one network, one loop, one schedule, other losses.

    config = RECIPES["anatcl_tiny"]("anat.zarr", "trainings/a/selection.parquet", variant="local")

Every recipe reads whole maps (crop (0, 0, 0)); `crop=(121, 128, 121)` takes the released encoder's size of a store with
121 x 145 x 121 voxels.
"""

from __future__ import annotations

from typing import Any

from models.config import AgeRegressionConfig, AnatCLConfig, DataConfig, OptimiserConfig, ResNet3DConfig, TrainingConfig
from models.config_anatcl import ViewConfig
from models.overrides import Recipe, apply_overrides

WHOLE = (0, 0, 0)
TINY_RESNET = ResNet3DConfig(blocks=(1, 1, 1, 1), widths=(8, 16, 32, 64))
UNCLIPPED = 1e9
"""The reference does not clip gradients."""


def anatcl(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train the 3D ResNet-18 with AnatCL: batch 32, Adam, rate x 0.9 every 10 epochs, 300 epochs."""
    return apply_overrides(_base("anatcl", store, selection, preset), overrides)


def anatcl_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Pre-train a small ResNet with AnatCL on two CPU ranks: maps of 6 mm, 8 cases a rank."""
    return apply_overrides(_tiny("anatcl", store, selection, preset), overrides)


def simclr(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: contrast whose only positive is the other view (NT-Xent). Its views differ with every preset."""
    return apply_overrides(_base("simclr", store, selection, preset), overrides)


def simclr_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `simclr` on two CPU ranks."""
    return apply_overrides(_tiny("simclr", store, selection, preset), overrides)


def yaware(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: the age term of AnatCL alone (y-Aware contrastive learning)."""
    return apply_overrides(_base("yaware", store, selection, preset), overrides)


def yaware_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `yaware` on two CPU ranks."""
    return apply_overrides(_tiny("yaware", store, selection, preset), overrides)


def expw(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: the age term alone, in the form expw, which repels the less, the more alike two ages are."""
    return apply_overrides(_base("expw", store, selection, preset), overrides)


def expw_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `expw` on two CPU ranks."""
    return apply_overrides(_tiny("expw", store, selection, preset), overrides)


def age_regression(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Baseline: regression of the age with absolute error; the preset changes nothing but the clipping."""
    return apply_overrides(_base("age_regression", store, selection, preset), overrides)


def age_regression_tiny(store: str, selection: str, preset: str = "recommended", **overrides: Any) -> TrainingConfig:
    """Small twin of `age_regression` on two CPU ranks."""
    return apply_overrides(_tiny("age_regression", store, selection, preset), overrides)


ANATCL_RECIPES: tuple[Recipe, ...] = (
    *(anatcl, anatcl_tiny, simclr, simclr_tiny, yaware, yaware_tiny),
    *(expw, expw_tiny, age_regression, age_regression_tiny),
)


def _base(name: str, store: str, selection: str, preset: str) -> TrainingConfig:
    ours = preset == "recommended"
    return TrainingConfig(
        name=name,
        recipe=name,
        preset=preset,
        network=ResNet3DConfig(),
        objective=_objective(name, preset),
        data=DataConfig(store=store, selection=selection, crop=WHOLE, batch_size=32, workers=8),
        optimiser=OptimiserConfig(
            kind="adam",
            lr=1e-4,
            weight_decay=5e-5,
            clip_norm=1.0 if ours else UNCLIPPED,
            schedule="step",
            step_epochs=10,
            step_factor=0.9,
        ),
        epochs=300,
        precision="bf16",
        checkpoint_every=200,
        validate_every=1000,
    )


def _tiny(name: str, store: str, selection: str, preset: str) -> TrainingConfig:
    base = _base(name, store, selection, preset)
    return base.replace(
        name=f"{name}_tiny",
        recipe=f"{name}_tiny",
        network=TINY_RESNET,
        data=base.data.replace(batch_size=8, workers=0),
        # A tenth of the epochs: the rate falls ten times as often, and as far.
        optimiser=base.optimiser.replace(lr=1e-3, step_epochs=1),
        epochs=30,
        world_size=2,
        precision="fp32",
        checkpoint_every=50,
        validate_every=100,
    )


def _objective(name: str, preset: str) -> AnatCLConfig | AgeRegressionConfig:
    from models.objectives.anatcl import PRESETS

    if preset not in PRESETS:
        raise KeyError(f"unknown preset {preset!r} of {name}; known: {', '.join(PRESETS)}")
    if name == "age_regression":
        return AgeRegressionConfig()
    settings = PRESETS[preset]
    if name == "simclr":
        return settings.replace(weight_age=0.0, weight_anatomy=0.0, weight_self=1.0, views=SIMCLR_VIEWS)
    if name in ("yaware", "expw"):
        return settings.replace(weight_anatomy=0.0, form=name)
    return settings


SIMCLR_VIEWS = ViewConfig(flip=True, shift_mm=6.0, noise_std=0.05, cutout_share=0.25)
"""With equal views the only positive of SimCLR would be the image itself, and nothing would be learned from it."""
