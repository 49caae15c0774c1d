"""The three public names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from released_files import write_untrained

import brainloom
from models.export import NotFinishedError
from models.finished import ENCODER, read_training
from models.networks.build import build_encoder


def test_public_names_are_there_and_no_others() -> None:
    assert {name for name in brainloom.__all__ if name[0] != "_"} == {"open_store", "CaseDataset", "load_encoder"}
    assert all(getattr(brainloom, name) is not None for name in brainloom.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'; public names: open_store, CaseDataset"):
        _ = brainloom.train


def test_a_loaded_encoder_gives_the_same_features(tmp_path: Path) -> None:
    training = read_training(write_untrained(tmp_path / "a"))
    encoder = build_encoder(training.config.network).eval()
    encoder.load_state_dict(training.part(ENCODER))
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        pairs = zip(encoder(image), brainloom.load_encoder(tmp_path / "a")(image), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_an_unfinished_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFinishedError, match="is not finished; run it to its end"):
        brainloom.load_encoder(tmp_path)
