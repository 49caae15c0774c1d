"""A trained encoder, ready to use: the public `brainloom.load_encoder`."""

from __future__ import annotations

from pathlib import Path

from models.finished import ENCODER, read_training
from models.networks.build import Encoder, build_encoder


def load_encoder(training: str | Path) -> Encoder:
    """Return the encoder of a finished training folder, in eval mode, on the CPU.

    It takes (B, C, X, Y, Z) images as the store holds them and returns the input and four stages, see `UniFormer` and
    `UNet3D`. Raises NotFinishedError when the training is not finished or its weights were changed, RuntimeError naming
    the first key when weights and config do not belong together.
    """
    finished = read_training(training)
    encoder = build_encoder(finished.config.network)
    encoder.load_state_dict(finished.part(ENCODER))
    return encoder.eval()
