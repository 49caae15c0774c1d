"""Small CINP objectives and random batches in memory, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from connectome_stores import SPEC

from models.config import TrainingConfig
from models.config_cinp import ConnectomeNetworkConfig, ViT3DConfig
from models.objectives import build_objective
from models.objectives.base import Batch
from models.objectives.cinp import CINP
from models.recipes import RECIPES
from models.records import SelectedCase
from models.selection import write_selection

SIZE = (16, 16, 24)
NETWORK = ViT3DConfig(patch=8, image_size=SIZE, width=24, depth=4, heads=2, mlp_ratio=1)
SMALL: dict[str, Any] = {
    "network_encoder": ConnectomeNetworkConfig(width=16, heads=2, hidden=16),
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "embedding_dim": 8,
    "matching_depth": 1,
}
PATCHES = 12


def small_config(
    folder: Path = Path("a"), store: str = "s", recipe: str = "cinp_tiny", **changes: Any
) -> TrainingConfig:
    """Return a config of some 10^4 weights on one rank; a step takes a hundredth of a second."""
    values: dict[str, Any] = {"epochs": 3, "batch_size": 4, "world_size": 1, "checkpoint_every": 2, "validate_every": 0}
    selection = str(folder / "selection.parquet")
    sizes = {"network": NETWORK, **SMALL, **values, **changes}
    return RECIPES[recipe](store, selection, name=folder.name, **sizes)


def make_cinp_training(folder: Path, store: str, selection: list[SelectedCase], **changes: Any) -> TrainingConfig:
    """Write selection.parquet and run.json of a small training and return its config."""
    folder.mkdir(parents=True)
    write_selection(folder / "selection.parquet", selection)
    config = small_config(folder, store, **changes)
    (folder / "run.json").write_text(config.model_dump_json())
    return config


def small_objective(seed: int = 0, **changes: Any) -> CINP:
    """Return an objective with random weights; biases and norms are random, too, so that nothing is 0 by chance."""
    torch.manual_seed(seed)
    objective = build_objective(small_config(**changes), SPEC)
    assert isinstance(objective, CINP)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def random_batch(seed: int, cases: int = 6) -> Batch:
    """Return a batch: case 1 has no connectome, 0 and 3 are one person, case 2 lacks region 4."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((cases, 6, 6)).astype(np.float32)
    network = (noise + noise.transpose(0, 2, 1)) * (1 - np.eye(6, dtype=np.float32))
    network[2, 4] = network[2, :, 4] = np.nan
    network[1] = 0
    image = rng.uniform(-0.3, 1, (cases, *SIZE)).astype(np.float32).clip(0)
    identity = np.arange(cases)
    identity[3] = identity[0]
    visible = np.stack([np.sort(rng.permutation(PATCHES)[:3]) for _ in range(cases)])
    arrays = {
        "image": image,
        "network": network,
        "identity": identity,
        "paired": (np.arange(cases) != 1).astype(np.int64),
        "visible": visible,
        "pick": rng.random((cases, 2), dtype=np.float32),
    }
    return {name: torch.from_numpy(value) for name, value in arrays.items()}
