"""A disk that is full while a training writes: what is told, what stays, and what a new start makes of it.

The limit of the system on the size of files stands in for the disk: every write beyond it fails, as on a full one.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from training_phantoms import make_training, write_blobs
from training_processes import done

import models.exhausted
from infra.storage import StorageError
from models import metrics
from models.checkpoint import list_checkpoints, load_checkpoint
from models.distributed import World
from models.exhausted import FullDiskError, full_disk
from models.metrics import append_metrics, read_metrics
from models.records import SelectedCase
from models.state import Stopped
from models.train import StopFlag, run_training
from tasks.launch import own_failure
from tasks.scores import COLUMNS, write_scores

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[SelectedCase]]:
    url = str(tmp_path_factory.mktemp("full") / "blobs.zarr")
    return url, write_blobs(url)


@contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


class StopAfter(StopFlag):
    """Stops a training after so many questions, with a checkpoint, as SIGTERM does."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("room", ["no checkpoint", pytest.param("no weights", marks=pytest.mark.full)])
def test_a_full_disk_is_told_the_former_checkpoint_stays_and_a_new_start_ends_alike(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, room: str
) -> None:
    make_training(tmp_path / "calm", *blobs, epochs=2)
    run_training(tmp_path / "calm/run.json", WORLD, StopFlag())
    folder = tmp_path / "disturbed"
    make_training(folder, *blobs, epochs=2)
    with pytest.raises(Stopped):
        run_training(folder / "run.json", WORLD, StopAfter(2))
    (former,) = list_checkpoints(folder)
    step = load_checkpoint(former)["step"]
    weights = (tmp_path / "calm/weights.safetensors").stat().st_size
    # Weights are smaller than a checkpoint, which has the optimiser's moments, too.
    limit = former.stat().st_size // 2 if room == "no checkpoint" else weights // 2

    with (
        room_for_files_of(limit),
        pytest.raises(FullDiskError, match=r"disturbed could not be written: File too large; \d+ MiB are free there\."),
    ):
        run_training(folder / "run.json", WORLD, StopFlag())
    assert "it continues from its newest checkpoint" in json.loads((folder / "failure.json").read_text())["message"]
    assert list(folder.rglob("*.partial")) == []
    assert load_checkpoint(list_checkpoints(folder)[-1])["step"] == step
    assert not (folder / "done.json").exists()

    run_training(folder / "run.json", WORLD, StopFlag())
    assert done(folder)["weights_digest"] == done(tmp_path / "calm")["weights_digest"]


def test_a_launcher_that_finds_no_reason_looks_at_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_failure([tmp_path]) == ""
    monkeypatch.setattr(models.exhausted.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert own_failure([tmp_path]).endswith(f"the disk of {tmp_path} is full; make room, then start again")


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_metrics(tmp_path, {"kind": "train", "step": 1})
    real = os.write
    monkeypatch.setattr(metrics.os, "write", lambda handle, data: real(handle, data[:5]))
    with pytest.raises(OSError, match="No space left on device"):
        append_metrics(tmp_path, {"kind": "train", "step": 2})
    monkeypatch.undo()
    append_metrics(tmp_path, {"kind": "train", "step": 3})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]


def test_scores_of_an_evaluation_stay_when_new_ones_find_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, frame = tmp_path / "scores" / "dice.parquet", pd.DataFrame({name: ["1"] for name in COLUMNS})
    write_scores(frame, path, "first")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("infra.storage.os.fsync", full)
    with pytest.raises(
        StorageError, match=r"could not write .*dice\.parquet: .*it is full: make room, then start again"
    ):
        write_scores(frame, path, "second")
    assert [(one.name, one.read_bytes()) for one in path.parent.iterdir()] == [(path.name, before)]


def torch_save(path: Path, values: Any) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.from_numpy(values)}, file)


def safetensors_save(path: Path, values: Any) -> None:
    save_file({"a": values}, path)


def numpy_save(path: Path, values: Any) -> None:
    np.savez(path, a=values)


@pytest.mark.parametrize("save", [torch_save, safetensors_save, numpy_save])
def test_a_full_disk_is_known_whoever_writes(tmp_path: Path, save: Any) -> None:
    with room_for_files_of(100_000), pytest.raises(Exception, match=r".") as caught:
        save(tmp_path / "file", np.zeros(1_000_000))
    assert full_disk(caught.value) == os.strerror(errno.EFBIG)
    assert full_disk(ValueError("of another kind")) == ""
