"""Recipes: functions that return a whole training config. Each has a `_tiny` twin that runs in seconds on two cores.

    config = RECIPES["brainmvp_tiny"]("demo.zarr", "trainings/a/selection.parquet", name="a", epochs=3)

Overrides are fields of TrainingConfig or of its parts (objective, data, optimiser, network), or `preset`.
"""

from __future__ import annotations

from typing import Any

from models.config import (
    ClassificationConfig,
    DataConfig,
    NetworkConfig,
    OptimiserConfig,
    Region,
    SegmentationConfig,
    TrainingConfig,
    ViT3DConfig,
)
from models.overrides import Recipe, apply_overrides
from models.recipes_anatcl import ANATCL_RECIPES
from models.recipes_brainmvp import CROP_RECIPES, TINY_NETWORK
from models.recipes_cinp import CINP_RECIPES

TUMOUR_REGIONS = (
    # Labels of BraTS2023 and of the phantoms: 1 necrosis, 2 oedema, 3 enhancing tumour.
    Region(name="ET", labels=(3,)),
    Region(name="TC", labels=(1, 3)),
    Region(name="WT", labels=(1, 2, 3)),
)
BRATS_MODALITIES = ("t1", "t1c", "t2", "flair")


def segmentation(store: str, selection: str, **overrides: Any) -> TrainingConfig:
    """Fine-tune for segmentation as BrainMVP's released example does: 96^3 crops, batch 2, Adam, 300 epochs."""
    base = TrainingConfig(
        name="segmentation",
        recipe="segmentation",
        network=NetworkConfig(in_channels=4),
        objective=SegmentationConfig(modalities=BRATS_MODALITIES, regions=TUMOUR_REGIONS),
        data=DataConfig(
            store=store,
            selection=selection,
            crop=(96, 96, 96),
            batch_size=2,
            workers=4,
            flip=True,
            intensity_jitter=0.1,
        ),
        optimiser=OptimiserConfig(kind="adam", lr=3e-4, weight_decay=1e-4),
        epochs=300,
        precision="bf16",
        checkpoint_every=200,
        predict=True,
        select_every=5,  # epochs, as the reference
    )
    return apply_overrides(base, overrides)


def segmentation_tiny(store: str, selection: str, **overrides: Any) -> TrainingConfig:
    """Fine-tune the small UniFormer for segmentation on one CPU rank: 32^3 crops, batch 4."""
    base = segmentation(store, selection)
    base = base.replace(
        name="segmentation_tiny",
        recipe="segmentation_tiny",
        network=TINY_NETWORK.replace(in_channels=len(BRATS_MODALITIES)),
        objective=SegmentationConfig(modalities=BRATS_MODALITIES, regions=TUMOUR_REGIONS, overlap=0.25),
        data=base.data.replace(crop=(32, 32, 32), batch_size=4, workers=0),
        optimiser=OptimiserConfig(kind="muon", lr=4e-3, weight_decay=1e-4, warmup_share=0.05),
        epochs=10,  # even: see tasks.finetune.with_template_mix
        precision="fp32",
        select_every=0,  # a handful of validation cases choose by chance, and a look takes time
        checkpoint_every=50,
    )
    return apply_overrides(base, overrides)


def classification(store: str, selection: str, **overrides: Any) -> TrainingConfig:
    """Fine-tune for classification: AdamW 1e-4, batch 8, 200 epochs (the paper's code was not released)."""
    base = TrainingConfig(
        name="classification",
        recipe="classification",
        network=NetworkConfig(in_channels=1),
        objective=ClassificationConfig(modalities=("t1",), classes=("control", "patient")),
        data=DataConfig(
            store=store,
            selection=selection,
            crop=(96, 96, 96),
            batch_size=8,
            workers=4,
            flip=True,
            intensity_jitter=0.1,
        ),
        optimiser=OptimiserConfig(kind="adamw", lr=1e-4, weight_decay=1e-5),
        epochs=200,
        precision="bf16",
        checkpoint_every=200,
        predict=True,
        select_every=5,
    )
    return _whole_image(apply_overrides(base, overrides), overrides)


def classification_tiny(store: str, selection: str, **overrides: Any) -> TrainingConfig:
    """Fine-tune the small UniFormer for classification on one CPU rank: the middle of a 3 mm brain, batch 4."""
    base = classification(store, selection)
    base = base.replace(
        name="classification_tiny",
        recipe="classification_tiny",
        network=TINY_NETWORK,
        data=base.data.replace(crop=(32, 48, 32), batch_size=4, workers=0),
        optimiser=OptimiserConfig(kind="muon", lr=2e-3, muon_lr=0.01, weight_decay=1e-4, warmup_share=0.05),
        epochs=5,
        precision="fp32",
        select_every=0,  # a handful of validation cases choose by chance, and a look takes time
        checkpoint_every=50,
    )
    return _whole_image(apply_overrides(base, overrides), overrides)


def _whole_image(config: TrainingConfig, overrides: dict[str, Any]) -> TrainingConfig:
    """Give a vision transformer the images that it was made for, unless a crop was asked for."""
    if not isinstance(config.network, ViT3DConfig) or "crop" in overrides:
        return config
    return config.replace(data=config.data.replace(crop=config.network.image_size))


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        *CROP_RECIPES,
        *ANATCL_RECIPES,
        *CINP_RECIPES,
        segmentation,
        segmentation_tiny,
        classification,
        classification_tiny,
    )
}


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name; raises KeyError listing the known ones."""
    try:
        return RECIPES[name]
    except KeyError:
        raise KeyError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}") from None
