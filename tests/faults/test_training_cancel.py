"""Cancelling a pre-training as the UI does: its ranks end, its checkpoint is valid, and a new flow run continues it."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_states import start_deployment, wait_for_state
from deployed import cancel, deployed, worker_log
from training_phantoms import write_blobs
from training_processes import done
from waiting import until

from models.checkpoint import list_checkpoints, load_checkpoint
from models.heartbeat import read_beats
from models.metrics import read_metrics

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]


def test_a_cancelled_flow_run_leaves_no_rank_and_a_new_one_ends_the_training(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    write_blobs(str(workspace / "store.zarr"))
    folder = workspace / "trainings" / "mine"
    params = {"workspace": str(workspace), "name": "mine", "epochs": 120}
    with deployed(tmp_path) as server:
        first = start_deployment(server.api_url, "pretrain/pretrain", params)
        until(lambda: len(read_metrics(folder)) >= 5, lambda: f"five steps:\n{worker_log(tmp_path)}", 400)
        assert len(read_beats(folder)) == 2
        cancel(server.api_url, first)
        assert not (folder / "done.json").exists(), "it was cancelled before its end"
        stopped_at = load_checkpoint(list_checkpoints(folder)[0])["step"]
        assert stopped_at >= 5
        again = start_deployment(server.api_url, "pretrain/pretrain", params)
        wait_for_state(server.api_url, again, "Completed")
    assert done(folder)["step"] > stopped_at
    assert f"continues at step {stopped_at} of" in (folder / "train.log").read_text()
