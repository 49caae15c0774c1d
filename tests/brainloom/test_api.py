"""The three public names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import brainloom
from models.config import NetworkConfig, TrainingConfig
from models.export import NotFinishedError, write_weights
from models.networks.uniformer import UniFormer
from models.recipes import RECIPES


def _finished(folder: Path) -> tuple[UniFormer, TrainingConfig]:
    network = NetworkConfig(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_dim=8)
    config = RECIPES["brainmvp_tiny"]("s.zarr", "sel.parquet", network=network)
    encoder = UniFormer(network).eval()
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    digest = write_weights(folder, {**tensors, "template.bank": torch.zeros(1)})
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "done.json").write_text(f'{{"weights_digest": "{digest}"}}')
    return encoder, config


def test_public_names_are_there_and_no_others() -> None:
    assert {name for name in brainloom.__all__ if name[0] != "_"} == {"open_store", "CaseDataset", "load_encoder"}
    assert all(getattr(brainloom, name) is not None for name in brainloom.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'; public names: open_store, CaseDataset"):
        _ = brainloom.train


def test_a_loaded_encoder_gives_the_same_features(tmp_path: Path) -> None:
    encoder, _ = _finished(tmp_path)
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        pairs = zip(encoder(image), brainloom.load_encoder(tmp_path)(image), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_an_unfinished_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFinishedError, match="is not finished; run it to its end"):
        brainloom.load_encoder(tmp_path)
