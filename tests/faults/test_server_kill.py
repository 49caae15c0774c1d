"""The Prefect server alone is killed under flows that go on, and started again on the same port and database."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_states import last_runs, unfinished_task_runs
from nifti_files import SMALL, write_dataset
from store_builds import catalog_of, ingest
from training_phantoms import write_blobs
from training_processes import done
from waiting import until

from bench.kills import flow_command, kill_group, kill_server, receipts_in
from infra.server import ensure_server, stop_server
from infra.settings import Settings
from models.metrics import read_metrics
from models.store import store_digest
from tasks.verify import verify

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
CASES = 40
ENDS_WITHIN_S = 300


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Return the settings of a running server of our own."""
    settings = Settings(state_dir=tmp_path / "state")
    try:
        ensure_server(settings)
        yield settings
    finally:
        stop_server(settings)


@contextmanager
def command(settings: Settings, verb: str, params: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Give a flow that was started by the command line on that server; it never starts a server itself."""
    folder, info = settings.state_dir.parent, ensure_server(settings)
    (folder / f"{verb}.yaml").write_text(yaml.safe_dump(params))
    more = {"BRAINLOOM_API_URL": info.api_url, "BRAINLOOM_STATE_DIR": str(folder / "flow"), "OMP_NUM_THREADS": "1"}
    running = flow_command(verb, folder / f"{verb}.yaml", folder / f"{verb}.log", **more)
    try:
        yield running
    finally:
        if running.poll() is None:
            kill_group(running)


def lose_the_server(settings: Settings, running: subprocess.Popen[bytes], goes_on: Callable[[], bool]) -> str:
    """Kill the server, wait until the flow went on without it, start it again; return the API's address."""
    before = ensure_server(settings).api_url
    kill_server(settings)
    until(lambda: goes_on() or running.poll() is not None, "work without a server")
    assert ensure_server(settings).api_url == before, "the same port"
    return before


def test_preprocessing_goes_on_without_a_server_and_its_state_is_right_when_it_is_back(
    settings: Settings, tmp_path: Path
) -> None:
    scans = write_dataset(tmp_path / "src", CASES, labels=True)
    undisturbed, store = str(tmp_path / "u.zarr"), tmp_path / "s.zarr"
    ingest(undisturbed, scans)
    params = {"catalog": catalog_of(tmp_path / "ws", scans), "store": str(store), "workers": 1, "case_batch": 1}
    params |= {"own_spec": SMALL.model_dump(mode="json")}
    with command(settings, "preprocess", params) as running:
        until(lambda: receipts_in(store) >= 2, "two receipts")
        had = receipts_in(store)
        api_url = lose_the_server(settings, running, lambda: receipts_in(store) > had + 2)
        said = running.wait(ENDS_WITHIN_S), (tmp_path / "preprocess.log").read_text()[-3000:]
    (run,) = last_runs(api_url, "preprocess")
    assert (said[0], run["state_name"]) == (0, "Completed"), said
    assert unfinished_task_runs(api_url, run["id"]) == []
    assert store_digest(str(store)) == store_digest(undisturbed)
    assert verify(str(store), deep=True) == []


def test_pre_training_goes_on_without_a_server_and_its_state_is_right_when_it_is_back(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "ws/trainings/mine"
    write_blobs(str(tmp_path / "ws/store.zarr"))
    with command(settings, "pretrain", {"workspace": str(tmp_path / "ws"), "name": "mine", "epochs": 40}) as running:
        until(lambda: len(read_metrics(folder)) >= 3, "three steps")
        had = len(read_metrics(folder))
        api_url = lose_the_server(settings, running, lambda: len(read_metrics(folder)) > had + 3)
        said = running.wait(ENDS_WITHIN_S), (tmp_path / "pretrain.log").read_text()[-3000:]
    (run,) = last_runs(api_url, "pretrain")
    assert (said[0], run["state_name"]) == (0, "Completed"), said
    assert done(folder)["step"] > had + 3
