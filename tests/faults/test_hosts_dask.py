"""Three hosts of a Dask cluster, in network namespaces: one is cut off while it preprocesses, without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dask_processes import DaskProcesses, at_address, stopped_at_the_end
from network_hosts import Hosts, hosts
from nifti_files import SMALL, write_dataset
from store_builds import catalog_of, ingest
from waiting import until

from bench.kills import receipts_in
from infra.server import without_prefect
from infra.settings import private_environment
from models.store import store_digest
from tasks.verify import verify

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
CASES = 30
PORTS = {"server": 4200, "scheduler": 8786}
"""The test has its own network: no port is taken."""
NOTICED = {"distributed.comm.timeouts.tcp": "12s", "distributed.scheduler.worker-ttl": "60s"}
"""Dask's own values are 30 s and 5 minutes; it takes no fewer than 11 s."""
WAIT_S = 400


@pytest.fixture
def three() -> Iterator[Hosts]:
    with hosts(3) as made:
        yield made


@pytest.fixture
def api_url(three: Hosts, tmp_path: Path) -> Iterator[str]:
    """Return the API of a server on the first host, which the others reach."""
    url = f"http://{three.address(0)}:{PORTS['server']}/api"
    environment = {**without_prefect(os.environ), **private_environment(), "PREFECT_HOME": str(tmp_path / "home")}
    options = ["--host", three.address(0), "--port", str(PORTS["server"])]
    with (tmp_path / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*three.on(0), sys.executable, "-m", "prefect", "server", "start", *options],
            env={**environment, "PREFECT_API_URL": url}, stdout=log, stderr=log, cwd=tmp_path,
        )  # fmt: skip
    try:
        until(lambda: asked(three, url, "health"), "the server answers", 200, poll_s=0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def asked(made: Hosts, url: str, what: str) -> bool:
    """Say whether the API answers on its host."""
    code = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)"
    command = [*made.on(0), sys.executable, "-c", code, f"{url}/{what}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_preprocessing_on_three_hosts_completes_when_one_is_cut_off(three: Hosts, api_url: str, tmp_path: Path) -> None:
    scans = write_dataset(tmp_path / "src", CASES, labels=True)
    undisturbed, store = str(tmp_path / "u.zarr"), tmp_path / "s.zarr"
    ingest(undisturbed, scans)
    params = {"catalog": catalog_of(tmp_path / "ws", scans), "store": str(store), "case_batch": 1}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**params, "own_spec": SMALL.model_dump(mode="json")}))
    cluster = DaskProcesses(tmp_path / "dask", PORTS["scheduler"], three.address(0), NOTICED)
    environment = {**without_prefect(os.environ), "BRAINLOOM_API_URL": api_url, "PREFECT_API_URL": api_url}
    environment |= {**at_address(cluster), "BRAINLOOM_STATE_DIR": str(tmp_path / "state")}
    command = [*three.on(0), Path(sys.executable).with_name("brainloom"), "preprocess", "-c", tmp_path / "p.yaml"]
    with stopped_at_the_end(cluster):
        cluster.start_scheduler(three.on(0))
        for host in range(3):
            cluster.start_worker(f"host{host}", three.on(host), three.address(host))
        cluster.wait_for_workers(3)
        with (tmp_path / "flow.log").open("ab") as log:
            flow = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        until(lambda: receipts_in(store) >= 3 or flow.poll() is not None, "three receipts", WAIT_S)
        three.cut_off(2)
        assert receipts_in(store) < CASES - 3
        assert flow.wait(WAIT_S) == 0, (tmp_path / "flow.log").read_text()[-4000:]
        gone = f"Remove worker addr: tcp://{three.address(2)}:"
        assert gone in cluster.log("scheduler"), "its loss was seen while there was work"
    assert store_digest(str(store)) == store_digest(undisturbed)
    assert verify(str(store), deep=True) == []
