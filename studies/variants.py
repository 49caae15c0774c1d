"""The rows of a study: recipes with overrides, pre-trained with several seeds in one process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.recipes import find_recipe
from models.records import SelectedCase
from tasks.launch import launch
from tasks.pretraining import PreparedTraining, prepare_training


@dataclass(frozen=True)
class Variant:
    """One row: a recipe with its overrides."""

    row: str
    recipe: str
    overrides: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    """Of the folders; empty: the recipe and the values of the overrides."""

    def name(self, seed: int) -> str:
        """Return the folder name of one training."""
        parts = [self.label or self.recipe.removesuffix("_tiny")]
        parts += [] if self.label else [str(value) for _, value in self.overrides]
        return "-".join([*parts, f"seed{seed}"])


def pretrain_variants(
    folder: Path,
    store_url: str,
    cases: Sequence[SelectedCase],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    epochs: int,
    ranks: int,
) -> None:
    """Pre-train every variant with every seed on the same cases, in one process group; what is done stays."""
    prepared = [
        _prepare(folder / "trainings" / variant.name(seed), store_url, cases, variant, seed, epochs, ranks)
        for seed in seeds
        for variant in variants
    ]
    todo = [one.folder for one in prepared if not one.is_finished()]
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} {len(todo)} of {len(prepared)} pre-trainings to do", flush=True)
    if todo:
        launch(todo, ranks)


def _prepare(
    training: Path,
    store_url: str,
    cases: Sequence[SelectedCase],
    variant: Variant,
    seed: int,
    epochs: int,
    ranks: int,
) -> PreparedTraining:
    """Write the folder of one pre-training, unless it is there."""
    config = find_recipe(variant.recipe)(
        store_url,
        str(training / "selection.parquet"),
        name=training.name,
        seed=seed,
        epochs=epochs,
        world_size=ranks,
        **dict(variant.overrides),
    )
    return prepare_training(training, config, cases)
