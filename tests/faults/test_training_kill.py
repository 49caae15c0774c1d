"""Ranks, agents and launchers are killed; trainings end with the same bits and nothing lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from training_phantoms import make_training, write_blobs
from training_processes import assert_close_on_fewer_ranks, done, killer, losses, ranks

from infra.settings import private_environment
from models.checkpoint import list_checkpoints, load_checkpoint
from models.metrics import read_metrics
from models.recipes import find_recipe
from models.records import SelectedCase
from models.selection import write_selection
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


def test_a_killed_rank_costs_no_bits(blobs: Blobs, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=EPOCHS)
    launch([folder], 2, killer("1", step=4), restarts=1)
    assert "exitcode  : -9" in (folder / "train.log").read_text()
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert losses(folder) == losses(undisturbed)
    assert not ranks()


KILLS = 5
TINY_EPOCHS = 32
"""Of 6 cases, 8 a step: 24 steps."""


@pytest.mark.full
@pytest.mark.timeout(900)  # seven launches
def test_the_tiny_recipe_killed_at_five_random_steps_ends_with_the_same_bits(blobs: Blobs, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_tiny(tmp_path / name, *blobs)
    launch([tmp_path / "a"], 2)
    random = np.random.default_rng(20261122)
    steps = sorted(int(step) for step in random.choice(np.arange(2, 17), KILLS, replace=False))
    for step in steps:
        with pytest.raises(TrainingFailed, match="launching it again continues from the newest"):
            launch([tmp_path / "b"], 2, killer(str(random.integers(2)), step), restarts=0)
        assert not ranks()
    launch([tmp_path / "b"], 2)
    assert done(tmp_path / "b")["weights_digest"] == done(tmp_path / "a")["weights_digest"], f"killed at {steps}"
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def make_tiny(folder: Path, url: str, cases: list[SelectedCase]) -> None:
    """Write the folder of a training with the demo's recipe."""
    folder.mkdir()
    write_selection(folder / "selection.parquet", cases)
    selection = str(folder / "selection.parquet")
    config = find_recipe("brainmvp_tiny")(url, selection, epochs=TINY_EPOCHS, checkpoint_every=4, validate_every=6)
    (folder / "run.json").write_text(config.model_dump_json())


@pytest.mark.full
@pytest.mark.parametrize(("rank", "step"), [("0", 1), ("1", 3), ("agent", 8), ("0", 13), ("1", 8), ("agent", 1)])
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
    assert load_checkpoint(list_checkpoints(folder)[0])["step"] >= 3, "valid, and not the first state"
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
    assert_close_on_fewer_ranks(folder, undisturbed)
