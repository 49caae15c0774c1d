"""The scheduler or a worker of a Dask cluster that is not ours (cluster `address`) is killed under a preprocessing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from api_states import last_runs, unfinished_task_runs
from dask_processes import DaskProcesses, at_address, stopped_at_the_end
from nifti_files import SMALL, write_dataset
from s3_server import free_ports
from store_builds import catalog_of, ingest
from waiting import until

from bench.kills import receipts_in
from flows.preprocess import PreprocessParams, preprocess
from infra.clusters import ClusterLostError
from infra.server import ServerInfo
from models.records import Scan
from models.spec import SPECS
from models.store import store_digest
from tasks.verify import verify

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
CASES = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Scan]:
    return write_dataset(tmp_path_factory.mktemp("sources"), CASES, labels=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sources: list[Scan]) -> str:
    url = str(tmp_path_factory.mktemp("undisturbed") / "s.zarr")
    ingest(url, sources)
    return store_digest(url)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaskProcesses]:
    """Return a running scheduler with two workers, which the settings name."""
    with stopped_at_the_end(DaskProcesses(tmp_path / "dask", free_ports(1)[0])) as cluster:
        start(cluster)
        for name, value in at_address(cluster).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(SPECS, "small", SMALL)
        yield cluster


def start(cluster: DaskProcesses) -> None:
    cluster.start_scheduler()
    for name in ("a", "b"):
        cluster.start_worker(name)
    cluster.wait_for_workers(2)


@contextmanager
def during_a_run(store: str, disturb: Callable[[], None]) -> Iterator[None]:
    """Disturb what runs inside once two cases have receipts."""

    def when_begun() -> None:
        until(lambda: receipts_in(Path(store)) >= 2, "two receipts")
        disturb()

    disturber = threading.Thread(target=when_begun)
    disturber.start()
    try:
        yield
    finally:
        disturber.join()


def test_a_killed_scheduler_ends_the_flow_and_a_new_one_ends_the_work(
    cluster: DaskProcesses, sources: list[Scan], undisturbed: str, tmp_path: Path, prefect_server: ServerInfo
) -> None:
    store = str(tmp_path / "s.zarr")
    params = PreprocessParams(catalog=catalog_of(tmp_path / "ws", sources), store=store, spec="small", case_batch=1)

    def disturb() -> None:
        for name in ("scheduler", "a"):
            cluster.kill(name)

    lost = r"connection to the Dask scheduler was lost; finished cases stay.*start the flow again"
    with during_a_run(store, disturb), pytest.raises(ClusterLostError, match=lost):
        preprocess(params)
    (failed,) = last_runs(prefect_server.api_url, "preprocess")[:1]
    assert failed["state_name"] == "Failed"
    assert "connection to the Dask scheduler was lost" in failed["state"]["message"]
    assert unfinished_task_runs(prefect_server.api_url, failed["id"]) == []
    unfinished = verify(store, deep=True)
    assert 0 < len(unfinished) <= CASES - 2
    assert all("it was planned and is neither stored nor in quarantine" in problem for problem in unfinished)
    cluster.stop()
    start(cluster)
    assert preprocess(params)["digest"] == undisturbed
    assert verify(store, deep=True) == []


def test_one_of_two_workers_is_killed_and_the_run_completes(
    cluster: DaskProcesses, sources: list[Scan], undisturbed: str, tmp_path: Path, prefect_server: ServerInfo
) -> None:
    store = str(tmp_path / "s.zarr")
    params = PreprocessParams(catalog=catalog_of(tmp_path / "ws", sources), store=store, spec="small", case_batch=1)
    with during_a_run(store, lambda: cluster.kill("a")):
        result = preprocess(params)
    assert (result["stored"], result["digest"]) == (CASES, undisturbed)
    (run,) = last_runs(prefect_server.api_url, "preprocess")[:1]
    assert run["state_name"] == "Completed"
    assert unfinished_task_runs(prefect_server.api_url, run["id"]) == []
    assert verify(store, deep=True) == []
