"""TensorBoard's event files say what metrics.jsonl says, each step once, however often a training was resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_phantoms import make_training, write_blobs

from models.distributed import World
from models.metrics import read_metrics
from models.records import SelectedCase
from models.tensorboard_events import FOLDER, scalars
from models.trainer import train

WORLD = World(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[SelectedCase]]:
    url = str(tmp_path_factory.mktemp("events") / "blobs.zarr")
    return url, write_blobs(url)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder / FOLDER))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(folder):
        for tag, value in scalars(record).items():
            found.setdefault(tag, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_a_killed_and_continued_training_has_every_step_once(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs, running={"tensorboard": True})
    calls = iter(range(1000))

    def killed_in_step_8() -> bool:
        if next(calls) == 8:
            raise Killed
        return False

    with pytest.raises(Killed):
        train(config, folder, WORLD, killed_in_step_8)
    train(config, folder, WORLD)
    found = events(folder)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in found["val/psnr_model"]] == [4, 8, 12]
    assert {"train/lr", "train/data_wait_seconds"} <= found.keys()
    assert found == expected(folder)
    assert len(list((folder / FOLDER).iterdir())) == 1


def test_without_the_option_there_are_none(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    train(make_training(tmp_path / "a", *blobs, epochs=1), tmp_path / "a", WORLD)
    assert not (tmp_path / "a" / FOLDER).exists()
