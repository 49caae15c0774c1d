"""Ranks, agents and launchers are killed; trainings end with the same bits and nothing lives on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from training_phantoms import make_training, write_blobs

from infra.settings import private_environment
from models.metrics import read_metrics
from models.records import SelectedCase
from tasks.launch import TrainingFailed, launch

EPOCHS = 12
"""18 steps on two ranks, checkpoints at every third."""

Blobs = tuple[str, list[SelectedCase]]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    url = str(tmp_path_factory.mktemp("faults") / "blobs.zarr")
    return url, write_blobs(url)


@pytest.fixture(scope="module")
def undisturbed(blobs: Blobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    make_training(folder, *blobs, world_size=2, epochs=EPOCHS)
    launch([folder], 2)
    return folder


def done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["losses"]) for line in read_metrics(folder) if line["kind"] == "train"]


def ranks(of: psutil.Process | None = None) -> dict[str, psutil.Process]:
    """Return the running ranks below a process by their number; `agent` is torchrun's own process."""
    found = {}
    for process in (of or psutil.Process()).children(recursive=True):
        try:
            environment, command = process.environ(), process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "models.train" in command:
            found[environment.get("RANK", "agent")] = process
    return found


def killer(rank: str, step: int, number: int = signal.SIGKILL) -> Any:
    killed: list[int] = []

    def on_progress(line: dict[str, Any]) -> None:
        if not killed and line["step"] >= step:
            killed.append(ranks()[rank].pid)
            os.kill(killed[0], number)

    return on_progress


def test_a_killed_rank_costs_no_bits(blobs: Blobs, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=EPOCHS)
    launch([folder], 2, killer("1", step=4), restarts=1)
    assert "exitcode  : -9" in (folder / "train.log").read_text()
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert losses(folder) == losses(undisturbed)
    assert not ranks()


@pytest.mark.full
@pytest.mark.parametrize("rank", ["0", "1", "agent"])
@pytest.mark.parametrize("step", [1, 3, 8, 13])
def test_any_process_may_be_killed_at_any_step(
    blobs: Blobs, undisturbed: Path, tmp_path: Path, rank: str, step: int
) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=EPOCHS)
    with pytest.raises(TrainingFailed, match="launching it again continues from the newest"):
        launch([folder], 2, killer(rank, step), restarts=0)
    assert not ranks()
    launch([folder], 2)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert losses(folder) == losses(undisturbed)


@pytest.mark.full
def test_three_ranks_resume_with_the_same_bits(blobs: Blobs, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_training(tmp_path / name, *blobs, world_size=3, epochs=EPOCHS)
    launch([tmp_path / "a"], 3)
    launch([tmp_path / "b"], 3, killer("2", step=4), restarts=1)
    assert done(tmp_path / "a")["weights_digest"] == done(tmp_path / "b")["weights_digest"]


LAUNCHER = "import sys\nfrom pathlib import Path\nfrom tasks.launch import launch\nlaunch([Path(sys.argv[1])], 2)\n"


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_their_launcher_and_leave_a_checkpoint(
    blobs: Blobs, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=EPOCHS)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder)], env={**os.environ, **private_environment()}
    )
    while len(read_metrics(folder)) < 4:
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(0.05)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks(psutil.Process(launcher.pid))) == 3
    launcher.send_signal(number)
    launcher.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, "a cancelled flow must leave no rank behind within 30 s"
    assert list((folder / "checkpoints").glob("step-*.pt"))
    launch([folder], 2)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]


@pytest.mark.full
def test_a_resume_with_another_number_of_ranks_stays_close_and_is_told(
    blobs: Blobs, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=EPOCHS)
    with pytest.raises(TrainingFailed):
        launch([folder], 2, killer("0", step=9), restarts=0)
    launch([folder], 1)
    assert done(folder)["world_sizes"] == [2, 1]
    assert "2 then 1: the number changed on resume" in (folder / "model_card.md").read_text()
    ours, theirs = dict(losses(folder)), dict(losses(undisturbed))
    assert ours.keys() == theirs.keys()
    # Another rank has other batch statistics and other negatives; the reconstruction stays within a tenth.
    for step in ours:
        assert ours[step]["loss_reconstruction"] == pytest.approx(theirs[step]["loss_reconstruction"], rel=0.1)
