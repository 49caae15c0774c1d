"""Checkpoints: whole or absent, kept by count, never unpickled, refused when they belong to something else."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from training_phantoms import small_config

from models.checkpoint import (
    CheckpointError,
    checkpoint_path,
    first_difference,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from models.config import TrainingConfig


def content(config: TrainingConfig, step: int) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((3,), float(step))},
        "optimiser": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "schedule": {"total_steps": 9, "warmup_steps": 0},
        "scaler": {},
        "step": step,
        "rng": {"cpu": [torch.get_rng_state()], "cuda": []},
        "sampler": {"seed": 0, "place": step},
        "world_sizes": [1],
        "config": config.model_dump_json(),
        "config_digest": config.content_digest(),
        "selection_digest": "s",
    }


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return small_config(tmp_path / "a", "store")


def test_the_newest_are_kept_by_count_and_read_back(tmp_path: Path, config: TrainingConfig) -> None:
    for step in (3, 12, 120):
        save_checkpoint(tmp_path, content(config, step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000120.pt", "step-000012.pt"]
    newest = newest_checkpoint(tmp_path, config, "s")
    assert newest is not None
    assert newest["step"] == 120
    assert torch.equal(newest["model"]["weight"], torch.full((3,), 120.0))


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path, config: TrainingConfig) -> None:
    assert newest_checkpoint(tmp_path, config, "s") is None


def test_a_kill_while_writing_leaves_the_previous_checkpoint(
    tmp_path: Path, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, content(config, 1), keep=1)

    def killed(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, content(config, 2), keep=1)
    newest = newest_checkpoint(tmp_path, config, "s")
    assert newest is not None
    assert newest["step"] == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_newest_checkpoint_falls_back_with_a_warning_that_names_it(
    tmp_path: Path, config: TrainingConfig, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, content(config, step), keep=2)
    path = checkpoint_path(tmp_path, 2)
    os.truncate(path, int(path.stat().st_size * share))
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(tmp_path, config, "s")
    assert newest is not None
    assert newest["step"] == 1
    assert "step-000002.pt cannot be read as plain tensors" in caplog.text
    assert "falling back to the previous checkpoint" in caplog.text


def test_when_none_can_be_read_nothing_is_restarted_in_silence(tmp_path: Path, config: TrainingConfig) -> None:
    os.truncate(save_checkpoint(tmp_path, content(config, 1), keep=1), 10)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read \(step-000001.pt\); delete that folder"
    ):
        newest_checkpoint(tmp_path, config, "s")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-000001.pt"
    if zipped:
        torch.save({"model": Hostile()}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_another_config_is_refused_with_the_first_differing_key(
    tmp_path: Path, config: TrainingConfig
) -> None:
    save_checkpoint(tmp_path, content(config, 1), keep=1)
    network = config.network.replace(embed_dims=(4, 8, 8, 32))
    with pytest.raises(
        CheckpointError, match=r"another config: network.embed_dims: \[4, 8, 8, 16\] -> \[4, 8, 8, 32\]"
    ):
        newest_checkpoint(tmp_path, config.replace(network=network), "s")


def test_a_checkpoint_of_another_selection_is_refused(tmp_path: Path, config: TrainingConfig) -> None:
    save_checkpoint(tmp_path, content(config, 1), keep=1)
    with pytest.raises(CheckpointError, match="made from selection s, the folder now holds other"):
        newest_checkpoint(tmp_path, config, "other")


def test_a_foreign_file_is_refused_with_what_it_lacks(tmp_path: Path, config: TrainingConfig) -> None:
    path = checkpoint_path(tmp_path, 1)
    path.parent.mkdir()
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"is not one of ours: missing \['config'"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"a checkpoint needs \['model'\]"):
        save_checkpoint(tmp_path, {k: v for k, v in content(config, 1).items() if k != "model"}, keep=1)


def test_first_difference() -> None:
    assert first_difference({"a": {"b": [1]}}, {"a": {"b": [1]}}) == ""
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c: 2 -> 3"
    assert first_difference({"a": 1}, {"a": 1, "b": None}) == "b: 'absent' -> None"
