"""Changing a recipe's config by the names of its settings, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from models.config import TrainingConfig

Recipe = Callable[..., TrainingConfig]
PARTS: tuple[str, ...] = ("objective", "data", "optimiser", "network", "running")


def apply_overrides(config: TrainingConfig, overrides: dict[str, Any]) -> TrainingConfig:
    """Return a validated copy with some fields changed, wherever they are.

    The network's input channels follow the objective's modalities. Raises ValueError for a name that no part has.
    """
    changes: dict[str, Any] = {}
    parts = {name: getattr(config, name).model_dump() for name in PARTS}
    for key, value in overrides.items():
        if key in TrainingConfig.model_fields:
            changes[key] = value
            continue
        owners = [name for name in PARTS if key in parts[name]]
        if not owners:
            raise ValueError(f"recipe {config.recipe}: no setting is called {key!r}; known: {_known(parts)}")
        for name in owners:
            parts[name][key] = value
    for name in set(changes) & set(PARTS):
        part = changes[name]
        parts[name] = part.model_dump() if isinstance(part, BaseModel) else dict(part)
    if "modalities" in parts["objective"] and "in_channels" not in overrides:
        parts["network"]["in_channels"] = len(parts["objective"]["modalities"])
    return config.replace(**{**changes, **parts})


def _known(parts: dict[str, dict[str, Any]]) -> str:
    return ", ".join(sorted({*TrainingConfig.model_fields, *(key for part in parts.values() for key in part)}))
