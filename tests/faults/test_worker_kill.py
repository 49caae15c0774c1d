"""Prefect's worker is killed under a flow run: it comes back by itself, the run ends, and the next one goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from api_states import ask, start_deployment, state_of, unfinished_task_runs, wait_for_state
from demo_runs import run
from deployed import cancel, deployed, processes_of, worker_log
from nifti_files import SMALL, write_dataset
from processes import words_of
from store_builds import catalog_of, ingest
from waiting import until

from bench.kills import receipts_in
from infra.server import ServerInfo
from models.store import store_digest
from tasks.lease import Lease
from tasks.verify import verify

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
CASES = 8
Wanted = tuple[dict[str, Any], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployed")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerInfo]:
    with deployed(folder) as server:
        yield server


@pytest.fixture
def wanted(tmp_path: Path) -> Iterator[Wanted]:
    """Return what preprocess is asked for and the digest that it gives; the last case waits: its file is a pipe."""
    scans = write_dataset(tmp_path / "src", CASES, labels=True)
    ingest(str(tmp_path / "u.zarr"), scans)
    params = {"catalog": catalog_of(tmp_path / "ws", scans), "store": str(tmp_path / "s.zarr"), "workers": 1}
    params |= {"own_spec": SMALL.model_dump(mode="json"), "case_batch": 1}
    kept = hold(Path(scans[-1].path))
    yield params, store_digest(str(tmp_path / "u.zarr"))
    release(kept)


def hold(path: Path) -> Path:
    """Put a pipe in the place of a file: who opens it waits."""
    kept = path.rename(path.with_suffix(".kept"))
    os.mkfifo(path)
    return kept


def release(kept: Path) -> None:
    if kept.exists():
        kept.replace(next(path for path in kept.parent.iterdir() if path.is_fifo()))


def begun(server: ServerInfo, folder: Path, params: dict[str, Any]) -> str:
    """Start preprocess and return its flow run when all but one case are done."""
    flow_run = start_deployment(server.api_url, "preprocess/preprocess", params)
    store = Path(params["store"])
    until(lambda: receipts_in(store) == CASES - 1, lambda: f"all but one case\n{worker_log(folder)}", 300)
    return flow_run


def ended_well(server: ServerInfo, params: dict[str, Any], digest: str) -> None:
    """Run preprocess once more, to its end."""
    release(next(Path(params["store"]).parent.rglob("*.kept")))
    again = start_deployment(server.api_url, "preprocess/preprocess", params)
    wait_for_state(server.api_url, again, "Completed")
    assert unfinished_task_runs(server.api_url, again) == []
    assert store_digest(params["store"]) == digest
    assert verify(params["store"], deep=True) == []


def test_a_cancelled_preprocessing_leaves_no_worker_and_a_new_run_ends_it(
    server: ServerInfo, folder: Path, wanted: Wanted
) -> None:
    params, digest = wanted
    flow_run = begun(server, folder, params)
    cancel(server.api_url, flow_run)
    assert unfinished_task_runs(server.api_url, flow_run) == []
    with Lease(params["store"], "after the cancellation"):
        pass
    ended_well(server, params, digest)


def prefect_worker(folder: Path) -> psutil.Process:
    """Return Prefect's worker, the child of the process that `brainloom up` left."""
    supervisor = psutil.Process(int((folder / "state/server/worker.pid").read_text()))
    return until(lambda: [one for one in supervisor.children() if "worker" in words_of(one)], "a worker")[0]


def test_a_killed_worker_comes_back_and_leaves_no_flow_run_behind(
    server: ServerInfo, folder: Path, wanted: Wanted
) -> None:
    params, digest = wanted
    flow_run = begun(server, folder, params)
    before = prefect_worker(folder)
    before.kill()
    until(lambda: not processes_of(flow_run), "the processes of the flow run ended")
    ended = until(lambda: state_of(server.api_url, flow_run)["type"] in {"CRASHED", "FAILED"}, "a final state")
    assert ended
    assert unfinished_task_runs(server.api_url, flow_run) == []
    assert prefect_worker(folder) != before
    with Lease(params["store"], "after the kill"):
        pass
    ended_well(server, params, digest)  # the only place of the queue `writers` is free again


def test_a_killed_flow_run_is_crashed_and_its_place_free(server: ServerInfo, folder: Path, wanted: Wanted) -> None:
    """SIGKILL is what the kernel's out-of-memory killer sends."""
    params, digest = wanted
    flow_run = begun(server, folder, params)
    next(one for one in processes_of(flow_run) if "prefect.engine" in " ".join(words_of(one))).kill()
    wait_for_state(server.api_url, flow_run, "Crashed")
    until(lambda: not processes_of(flow_run), "its Dask worker ended")
    ended_well(server, params, digest)
    queue = ask(server.api_url, "work_pools/brainloom-cpu/queues/writers")
    assert queue["concurrency_limit"] == 1


def test_down_gives_a_flow_run_its_time_and_leaves_it_crashed(server: ServerInfo, folder: Path, wanted: Wanted) -> None:
    params, digest = wanted
    flow_run = begun(server, folder, params)
    down = run("down", state_dir=folder / "state")
    assert down.stdout.splitlines() == [
        "flow runs at work: 1; they get up to 40 s to save, and become Crashed",
        "stopped: worker, server",
    ]
    assert processes_of(flow_run) == []
    with Lease(params["store"], "after down"):
        pass
    up = run("up", state_dir=folder / "state")
    assert up.returncode == 0, up.stdout + up.stderr
    assert state_of(server.api_url, flow_run)["type"] == "CRASHED"
    assert unfinished_task_runs(server.api_url, flow_run) == []
    ended_well(server, params, digest)  # the only place of the queue `writers` is free
