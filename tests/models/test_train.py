"""The entry point: several trainings in one process, exit codes, reasons of failure, lean imports."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_phantoms import SPEC, make_training, write_blobs

from models.config import DataConfig, NetworkConfig, Region, SegmentationConfig
from models.distributed import World
from models.prediction_files import read_lines, read_masks
from models.records import SelectedCase
from models.state import Stopped
from models.train import EXIT_STOPPED, LOCK, FolderBusyError, StopFlag, main, run_training

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[SelectedCase]]:
    url = str(tmp_path_factory.mktemp("entry") / "blobs.zarr")
    return url, write_blobs(url)


@pytest.fixture
def signals() -> object:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_trainings_run_one_after_another_and_finished_ones_are_skipped(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, signals: object
) -> None:
    for name in ("a", "b"):
        make_training(tmp_path / name, *blobs, epochs=1)
    arguments = [part for name in ("a", "b") for part in ("--config", str(tmp_path / name / "run.json"))]
    assert main(arguments) == 0
    digests = [json.loads((tmp_path / name / "done.json").read_text())["weights_digest"] for name in ("a", "b")]
    assert digests[0] == digests[1], "a training must not depend on the one before it in the same process"
    times = [(tmp_path / name / "weights.safetensors").stat().st_mtime_ns for name in ("a", "b")]
    assert main(arguments) == 0
    assert [(tmp_path / name / "weights.safetensors").stat().st_mtime_ns for name in ("a", "b")] == times


def test_lost_predictions_of_a_finished_training_are_made_again_from_its_weights(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a"
    data = DataConfig(store=blobs[0], selection=str(folder / "selection.parquet"), crop=(32, 32, 32), batch_size=2)
    regions = (Region(name="WT", labels=(1, 2, 3)),)
    objective = SegmentationConfig(modalities=SPEC.modalities, regions=regions, overlap=0.0)
    network = NetworkConfig(
        in_channels=4, embed_dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), head_dim=8, mlp_ratio=1, decoder_dim=4
    )
    make_training(
        folder, *blobs, epochs=1, validate_every=0, predict=True, data=data, objective=objective, network=network
    )
    run_training(folder / "run.json", WORLD, StopFlag())
    shutil.rmtree(folder / "checkpoints")  # as retention leaves it
    (masks,) = (folder / "predictions").glob("*.npz")
    extent = read_lines(folder, ["extent"])[blobs[1][-1].dataset, masks.stem]["extent"]
    predicted, written = read_masks(masks, extent), (folder / "done.json").stat().st_mtime_ns
    for lost in (masks, folder / "predictions" / "predictions.parquet"):
        lost.write_bytes(b"cut")
        run_training(folder / "run.json", WORLD, StopFlag())
        assert "predicting again" in caplog.text
        np.testing.assert_array_equal(read_masks(masks, extent), predicted)
        assert len(read_lines(folder, ["file"])) == 1
    assert (folder / "done.json").stat().st_mtime_ns == written, "nothing was trained"


def test_sigterm_ends_with_143_and_a_checkpoint(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, signals: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_training(tmp_path / "a", *blobs)
    monkeypatch.setattr("models.state.append_metrics", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["--config", str(tmp_path / "a" / "run.json")]) == EXIT_STOPPED
    assert list((tmp_path / "a" / "checkpoints").glob("*.pt"))
    assert not (tmp_path / "a" / "failure.json").exists()


def test_a_training_told_to_stop_before_it_starts_does_not_start(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    make_training(tmp_path / "a", *blobs)
    stop = StopFlag()
    stop.is_set = True
    with pytest.raises(Stopped, match="stopped before its first step"):
        run_training(tmp_path / "a" / "run.json", WORLD, stop)


def test_a_failure_of_its_own_leaves_its_reason(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    make_training(tmp_path / "a", *blobs, init_from=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"has no done\.json"):
        run_training(tmp_path / "a" / "run.json", WORLD, StopFlag())
    reason = json.loads((tmp_path / "a" / "failure.json").read_text())
    assert reason["type"] == "NotFinishedError"
    assert "run it to its end before using it" in reason["message"]


def test_a_folder_that_another_process_holds_is_left_alone(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.train.LOCK_WAIT_SECONDS", 0.1)
    monkeypatch.setattr("models.train.LOCK_POLL_SECONDS", 0.02)
    folder = tmp_path / "a"
    make_training(folder, *blobs, epochs=1)
    with (folder / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FolderBusyError, match=rf"training folder {folder} is in use: .* only one may train"):
            run_training(folder / "run.json", WORLD, StopFlag())
        assert "is in use" in json.loads((folder / "failure.json").read_text())["message"]
        assert not (folder / "checkpoints").exists()
        stop = StopFlag()
        stop.is_set = True
        with pytest.raises(Stopped, match="stopped while another process held"):
            run_training(folder / "run.json", WORLD, stop)
    run_training(folder / "run.json", WORLD, StopFlag())
    assert (folder / "done.json").exists()
    with (folder / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises unless it was given back


def test_the_entry_point_imports_neither_prefect_nor_dask() -> None:
    code = (
        "import sys, models.train\n"
        "heavy = {'prefect', 'prefect_dask', 'dask', 'distributed', 'nilearn', 'sklearn', 'pandas', 'matplotlib'}\n"
        "heavy.add('tensorboard')\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
