"""Objectives: a method's networks, samples, losses and metrics, one file a method."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.config import TrainingConfig
from models.objectives.age_regression import AgeRegression
from models.objectives.anatcl import AnatCL
from models.objectives.base import Objective
from models.objectives.brainmvp import BrainMVP
from models.objectives.cinp import CINP
from models.objectives.classification import Classification
from models.objectives.crop_contrast import CropContrast
from models.objectives.masked_crops import MaskedCrops
from models.objectives.segmentation import Segmentation
from models.spec import PreprocessSpec

OBJECTIVES: dict[str, type[Objective]] = {
    "brainmvp": BrainMVP,
    "mae": MaskedCrops,
    "simclr_crops": CropContrast,
    "anatcl": AnatCL,
    "age_regression": AgeRegression,
    "cinp": CINP,
    "segmentation": Segmentation,
    "classification": Classification,
}
"""By the `kind` of the objective's config."""


def build_objective(
    config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
) -> Objective:
    """Build the objective of a training; weights come from torch's global generator.

    `training_means`: mean image per modality of the spec (M, X, Y, Z) over the training cases, in the template grid.
    Raises KeyError listing the known kinds.
    """
    kind = config.objective.kind
    if kind not in OBJECTIVES:
        raise KeyError(f"unknown objective {kind!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[kind](config, spec, training_means)
