"""Ranks and loader processes that hang: the training ends with the reason, and nothing lives on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import words_of
from training_phantoms import make_training, write_blobs
from training_processes import done, ranks

from models.checkpoint import list_checkpoints, load_checkpoint
from models.records import SelectedCase
from tasks.launch import TrainingFailed, launch

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
Blobs = tuple[str, list[SelectedCase]]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    url = str(tmp_path_factory.mktemp("stall") / "blobs.zarr")
    return url, write_blobs(url)


def once_at(step: int, act: Any) -> Any:
    acted: list[int] = []

    def on_progress(line: dict[str, Any]) -> None:
        if not acted and line["step"] >= step:
            acted.append(line["step"])
            act()

    return on_progress


def test_a_frozen_rank_is_reported_and_the_training_continues_from_its_checkpoint(blobs: Blobs, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=40)
    # SIGSTOP freezes the second rank; the first one then waits for it in a collective.
    freeze = once_at(5, lambda: os.kill(ranks()["1"].pid, signal.SIGSTOP))
    with pytest.raises(TrainingFailed) as failure:
        launch([folder], 2, freeze, restarts=0, stall_seconds=45)
    text = str(failure.value)
    assert re.search(
        r"no progress for 45 s: .*rank 0: computing in step \d+, .* rank 1: .* in step \d+, \d+ s ago", text
    )
    assert "Stack (most recent call first)" in text, "where the waiting rank waits"
    assert not ranks()
    assert load_checkpoint(list_checkpoints(folder)[0])["step"] >= 3
    make_training(tmp_path / "b", *blobs, world_size=2, epochs=40)
    launch([folder], 2)
    launch([tmp_path / "b"], 2)
    assert done(folder)["weights_digest"] == done(tmp_path / "b")["weights_digest"]


def test_a_frozen_loader_process_fails_the_rank_with_the_reason(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs, epochs=200)
    (folder / "run.json").write_text(config.replace(data=config.data.replace(workers=1)).model_dump_json())
    (tmp_path / "impatient.py").write_text(
        "import sys\n"
        "import models.data\n"
        "from models.train import main\n"
        "models.data.LOADER_TIMEOUT_SECONDS = 5.0\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def freeze() -> None:
        for process in psutil.Process().children(recursive=True):
            if "multiprocessing.forkserver" in " ".join(words_of(process)):
                for loader in process.children():
                    loader.suspend()

    # Frozen while it hands over a batch, the watchdog finds it: torch's own time-out is blind there.
    seen = "(?s)DataLoader timed out after 5.*|no progress for 60 s.* rank 0: reading data in step"
    with pytest.raises(TrainingFailed, match=seen):
        launch([folder], 1, once_at(5, freeze), restarts=0, stall_seconds=60, module="impatient")
