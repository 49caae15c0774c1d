"""A finished training as others use it: config, preprocessing spec and weights, checked against each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.config import TrainingConfig
from models.export import CONFIG, NotFinishedError, read_done, read_weights, write_text_whole
from models.spec import PreprocessSpec

ENCODER = "encoder."
"""Start of the names of the encoder's weights."""
BANK = "template.bank"
"""Name of the template bank among the weights of a pre-training."""


@dataclass(frozen=True)
class FinishedTraining:
    """What config.json, done.json and weights.safetensors of a training folder say."""

    folder: Path
    config: TrainingConfig
    spec: PreprocessSpec
    done: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the weights whose names start with a prefix, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def read_training(folder: str | Path) -> FinishedTraining:
    """Return a finished training.

    Raises NotFinishedError when it has no done.json or its weights were changed since.
    """
    path = Path(folder)
    tensors, _ = read_weights(path)
    config, spec = read_settings(path)
    return FinishedTraining(path, config, spec, read_done(path) or {}, tensors)


def read_settings(folder: Path) -> tuple[TrainingConfig, PreprocessSpec]:
    """Return config and preprocessing spec of a finished training; raises NotFinishedError for another folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise NotFinishedError(f"{folder} has no {CONFIG}: it is not the folder of a finished training")
    content = json.loads(path.read_text(encoding="utf-8"))
    return TrainingConfig.model_validate(content["training"]), PreprocessSpec.model_validate(content["spec"])


def write_settings(folder: Path, config: TrainingConfig, spec: PreprocessSpec) -> None:
    """Write config.json, from which `read_settings` reads."""
    content = {"training": config.model_dump(mode="json"), "spec": spec.model_dump(mode="json")}
    write_text_whole(folder / CONFIG, json.dumps(content, indent=1) + "\n")
