"""A rank that gets no memory: the reason is told with what helps, and no restart is spent on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_phantoms import make_training, write_blobs

import models.train
from models.distributed import World
from models.exhausted import NoMemoryError, no_memory
from models.train import StopFlag, run_training
from tasks.launch import TrainingFailed, launch

HUNGRY = """
import sys
import torch
import models.train

def train(config, folder, *_):
    with (folder / "tries").open("a") as tries:
        tries.write("x")
    torch.empty(1 << 50)

models.train.train = train
if __name__ == "__main__":
    sys.exit(models.train.main())
"""


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.1 GiB.\nSee the docs")


def of_numpy() -> None:
    raise MemoryError("Unable to allocate 8.00 TiB for an array with shape (1024, 1024, 1024, 1024)")


def of_a_loader() -> None:
    try:
        raise RuntimeError("Caught a bus error: insufficient shared memory (shm)")
    except RuntimeError as error:
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly") from error


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda: torch.empty(1 << 50), r".*can't allocate memory: you tried to allocate \d+ bytes"),
        (of_a_gpu, r"CUDA out of memory\. Tried to allocate 20\.00 GiB\. GPU 0 has 79\.1 GiB"),
        (of_numpy, r"Unable to allocate 8\.00 TiB for an array"),
        (of_a_loader, r"Caught a bus error: insufficient shared memory"),
    ],
)
def test_no_memory_is_told_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Any, words: str
) -> None:
    url = str(tmp_path / "blobs.zarr")
    make_training(tmp_path / "a", url, write_blobs(url))
    monkeypatch.setattr(models.train, "train", lambda *_: fail())
    with pytest.raises(NoMemoryError, match=rf"^a got no memory: {words}"):
        run_training(tmp_path / "a/run.json", World(0, 1, torch.device("cpu")), StopFlag())
    told = json.loads((tmp_path / "a/failure.json").read_text())
    assert told["type"] == "NoMemoryError"
    assert "a lower batch_size with as much more accumulation" in told["message"]


def test_other_errors_are_not_taken_for_it() -> None:
    assert no_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
    assert no_memory(ValueError("out of memory")) == ""


def test_a_launcher_does_not_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = str(tmp_path / "blobs.zarr"), tmp_path / "a"
    make_training(folder, url, write_blobs(url))
    (tmp_path / "hungry.py").write_text(HUNGRY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TrainingFailed, match=r"a: NoMemoryError: a got no memory: .*continues from its newest"):
        launch([folder], 1, restarts=3, module="hungry")
    assert (folder / "tries").read_text() == "x"
