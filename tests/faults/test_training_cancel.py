"""Cancelling a pre-training as the UI does: its ranks end, its checkpoint is valid, and a new flow run continues it."""

from __future__ import annotations

import shutil
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from demo_runs import run
from training_phantoms import write_blobs
from training_processes import done

from infra.server import ServerInfo, request_json, server_status
from infra.settings import Settings
from models.checkpoint import list_checkpoints, load_checkpoint
from models.heartbeat import read_beats
from models.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]
START_TIMEOUT_S = 400
GONE_WITHIN_S = 60
"""Prefect's worker asks every 10 s whether a run is cancelled; the ranks then have 30 s."""
POLL_S = 0.2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerInfo]:
    """Return a server with our deployments and a worker, whose flow runs start in `tmp_path`."""
    shutil.copy(ROOT / "prefect.yaml", tmp_path)
    try:
        up = run("up", state_dir=tmp_path / "state")
        assert up.returncode == 0, up.stdout + up.stderr
        info = server_status(Settings(state_dir=tmp_path / "state"))
        assert info is not None
        yield info
    finally:
        run("down", state_dir=tmp_path / "state")


def ask(server: ServerInfo, what: str, body: Any = None) -> Any:
    """Ask the API, again when its SQLite file is locked (503), as Prefect's own client does."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return request_json(f"{server.api_url}/{what}", body, timeout_s=60)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def start(server: ServerInfo, params: dict[str, Any]) -> str:
    """Start the deployment as its form does and return the id of the flow run."""
    found = ask(server, "deployments/name/pretrain/pretrain")
    body = {"parameters": {"params": params}, "state": {"type": "SCHEDULED"}}
    return ask(server, f"deployments/{found['id']}/create_flow_run", body)["id"]


def wait_for_state(server: ServerInfo, flow_run: str, wanted: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    ended = {"Completed", "Failed", "Crashed", "Cancelled"}
    while (state := ask(server, f"flow_runs/{flow_run}")["state"])["name"] != wanted:
        assert state["name"] not in ended, state
        assert time.monotonic() < deadline, state
        time.sleep(POLL_S)


def test_a_cancelled_flow_run_leaves_no_rank_and_a_new_one_ends_the_training(
    server: ServerInfo, tmp_path: Path
) -> None:
    workspace = tmp_path / "ws"
    write_blobs(str(workspace / "store.zarr"))
    folder = workspace / "trainings" / "mine"
    params = {"workspace": str(workspace), "name": "mine", "epochs": 120}
    first = start(server, params)
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(read_metrics(folder)) < 5:
        assert time.monotonic() < deadline, (tmp_path / "state/server/worker.log").read_text()[-3000:]
        time.sleep(POLL_S)
    beats = read_beats(folder)
    ranks = [psutil.Process(beat["pid"]) for beat in beats]
    assert len(ranks) == 2
    ask(server, f"flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}})
    _, alive = psutil.wait_procs(ranks, timeout=GONE_WITHIN_S)
    assert not alive
    assert not (folder / "done.json").exists(), "it was cancelled before its end"
    stopped_at = load_checkpoint(list_checkpoints(folder)[0])["step"]
    assert stopped_at >= 5
    wait_for_state(server, first, "Cancelled")
    wait_for_state(server, start(server, params), "Completed")
    assert done(folder)["step"] > stopped_at
    assert f"continues at step {stopped_at} of" in (folder / "train.log").read_text()
