"""A scan that kills its worker process, or takes all of its memory, costs only itself."""

import dask
import pytest
from api_states import last_runs, unfinished_task_runs
from nifti_files import SMALL, write_dataset
from store_builds import catalog_of

from flows.preprocess import PreprocessParams, preprocess
from infra import clusters
from models.spec import SPECS
from models.store import open_store
from tasks.verify import verify

POISON = """
import os, signal, time
from tasks import prepare
# Dask imports a preload for the nanny and for the worker.
real = getattr(prepare.read_scan, "real", prepare.read_scan)
def read_scan(file, spec, memory_bytes):
    if '/s2_' in file.path:
        os.kill(os.getpid(), signal.SIGKILL)
    if '/s5_' in file.path:
        hoard = bytearray(b"x") * (2 << 30)  # beyond 95 % of the limit: its nanny ends it
        time.sleep(120)
    return real(file, spec, memory_bytes)
read_scan.real = real
prepare.read_scan = read_scan
"""


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("allowed_failures", [12, 0])
def test_poison(tmp_path, monkeypatch, prefect_server, allowed_failures):
    """With 0 allowed failures Dask gives the batch up at once, and the flow runs its cases one by one.

    A case whose header asks for more memory than a worker has is refused before anything is begun. One that takes it
    all the same meets its nanny.
    """
    monkeypatch.setenv("BRAINLOOM_WORKER_MEMORY", "2GiB")
    scans = write_dataset(tmp_path / "src", 6)
    scans = [s.replace(shape=(30_000, 30_000, 300)) if s.case == "s4" else s for s in scans]
    (tmp_path / "poison.py").write_text(POISON)
    # Every worker imports this file before its first task.
    monkeypatch.setitem(clusters.DASK_CONFIG, "distributed.worker.preload", [str(tmp_path / "poison.py")])
    monkeypatch.setitem(clusters.DASK_CONFIG, "distributed.scheduler.allowed-failures", allowed_failures)
    monkeypatch.setitem(SPECS, "small", SMALL)
    url = str(tmp_path / "s.zarr")
    params = PreprocessParams(
        catalog=catalog_of(tmp_path / "ws", scans), store=url, spec="small", workers=1, max_quarantined_share=0.5
    )
    try:
        result = preprocess(params)
    finally:
        dask.config.refresh()
    reasons = {"s2": "killed the worker", "s4": "memory refused", "s5": "killed the worker"}
    assert (result["stored"], result["quarantined"]) == (6 - len(reasons), len(reasons))
    bad = {line["case"]: line["reason"] for line in open_store(url).cases().to_pylist() if line["status"] != "stored"}
    assert bad == reasons
    assert verify(url, deep=True) == []
    (run,) = last_runs(prefect_server.api_url, "preprocess")[:1]
    assert unfinished_task_runs(prefect_server.api_url, run["id"]) == []
