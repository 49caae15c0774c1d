"""A trained encoder, ready to use: the public `brainloom.load_encoder`."""

from __future__ import annotations

from pathlib import Path

from models.config import TrainingConfig
from models.export import read_weights
from models.networks.uniformer import UniFormer

PREFIX = "encoder."


def load_encoder(training: str | Path) -> UniFormer:
    """Return the encoder of a finished training folder, in eval mode, on the CPU.

    It takes (B, C, X, Y, Z) images as the store holds them and returns the input and four stages, see `UniFormer`.
    Raises NotFinishedError when the training is not finished or its weights were changed, RuntimeError naming the first
    key when weights and config do not belong together.
    """
    folder = Path(training)
    tensors, _ = read_weights(folder)
    config = TrainingConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
    encoder = UniFormer(config.network)
    encoder.load_state_dict({name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)})
    return encoder.eval()
