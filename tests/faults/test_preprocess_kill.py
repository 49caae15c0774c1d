"""Killed at any point, preprocessing goes on where it was and ends with the same store."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from nifti_files import SMALL, write_dataset
from store_builds import ingest

from bench.catalog import write_cohort
from bench.scale import SPEC, write_brain
from infra.server import server_status, stop_server
from infra.settings import Settings
from models.records import Scan
from models.store import create_or_open, store_digest
from tasks import plan as plans
from tasks import receipts, shards
from tasks.catalog import build_catalog, write_catalog
from tasks.lease import Lease
from tasks.preprocess import preprocess_batch
from tasks.verify import verify

CASES = 6
SHARE, KILLS = 1 / 20, 5
POLL_S, END_S = 0.02, 30


def write(url, sources):
    """Do what the flow does, in one process without Prefect's engine and Dask, so that it can be killed anywhere."""
    scans = [Scan(**line) for line in json.loads(Path(sources).read_text())]
    writer = create_or_open(url, SMALL)
    with Lease(url, "writer") as lease:
        if lease.took_over:
            shards.clean_partials(url)
        rows = plans.plan_rows(plans.cases_from_scans(scans), plans.read_plans(url), SMALL)
        if rows.added:
            plans.write_plan(url, rows.added, SMALL.content_digest())
        for dataset, length in plans.rows_by_dataset(rows.current).items():
            writer.grow(dataset, length, True)
        for case in rows.current:
            preprocess_batch(url, [case.model_dump(mode="json")], lease.token)
            print(case.case, flush=True)
        lease.check()
        shards.finalise(url, rows.current)
        receipts.clear_attempts(url)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    scans = write_dataset(folder, CASES, labels=True)
    path = folder / "scans.json"
    path.write_text(json.dumps([scan.model_dump(mode="json") for scan in scans]))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, sources):
    url = str(tmp_path_factory.mktemp("undisturbed") / "s.zarr")
    write(url, sources)
    return store_digest(url)


def start(url, sources):
    code = "import sys; sys.path[:0] = sys.argv[3:]; from test_preprocess_kill import write; write(*sys.argv[1:3])"
    folders = [str(folder) for folder in list(Path(__file__).parents)[:3]]
    return subprocess.Popen(
        [sys.executable, "-c", code, url, str(sources), *folders], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def kill_after(url, sources, cases, seconds=0.0):
    """Kill a writer with SIGKILL some time after it has finished some cases."""
    with start(url, sources) as process:
        for _ in range(cases):
            process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()


def finish(url, sources):
    write(url, sources)
    assert verify(url, deep=True) == []
    assert not list(Path(url).rglob("*.partial"))
    assert not Path(url, "_build", "attempts").exists()
    return store_digest(url)


def test_killed_in_the_middle(tmp_path, sources, undisturbed):
    url = str(tmp_path / "s.zarr")
    kill_after(url, sources, cases=2)
    done = receipts.receipt_rows(url, ["toy"])
    assert 2 <= len(done) < CASES
    (tmp_path / "s.zarr" / "toy" / "image" / "left.partial").write_bytes(b"half")
    assert finish(url, sources) == undisturbed
    assert len(plans.read_plans(url)) == CASES


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_killed_five_times_at_random_moments(tmp_path, sources, undisturbed, seed):
    url = str(tmp_path / "s.zarr")
    rng = np.random.default_rng(seed)
    for _ in range(5):
        # Line by line what was done before is printed again, so the first lines come at once.
        kill_after(url, sources, int(rng.integers(0, CASES)), rng.uniform(0, 0.05))
    assert finish(url, sources) == undisturbed


@pytest.mark.full
@pytest.mark.timeout(900)
def test_everything_killed_five_times_with_hundreds_of_scans(tmp_path):
    """`brainloom preprocess` with its workers, and twice the Prefect server too, after seeded numbers of new cases."""
    catalog = build_catalog(write_cohort(tmp_path / "sources", SHARE, write_brain))
    write_catalog(catalog, str(tmp_path / "ws"))
    assert len(catalog.scans) > 300
    cases = catalog.report["cases"]
    undisturbed = str(tmp_path / "undisturbed.zarr")
    ingest(undisturbed, catalog.scans, spec=SPEC)
    url, config, state = str(tmp_path / "s.zarr"), tmp_path / "preprocess.yaml", tmp_path / "state"
    config.write_text(
        yaml.safe_dump({"catalog": str(tmp_path / "ws"), "store": url, "own_spec": SPEC.model_dump(mode="json")})
    )
    rng = np.random.default_rng(0)
    done = [0]
    try:
        for number in range(KILLS):
            fresh = int(rng.integers(1, (cases - done[-1]) // KILLS))
            kill_everything_after(done[-1] + fresh, rng.uniform(0, 0.05), url, config, state)
            done.append(receipts_in(url))
            server = server_status(Settings(state_dir=state))
            if number % 2 and server is not None:
                os.killpg(server.pid, signal.SIGKILL)
        assert command(config, state).wait() == 0
    finally:
        stop_server(Settings(state_dir=state))
    assert done == sorted(set(done))
    assert done[-1] < cases  # so every kill fell in mid-run
    assert store_digest(url) == store_digest(undisturbed)
    assert verify(url, deep=True) == []
    assert len(plans.read_plans(url)) == cases


def receipts_in(url):
    return sum(1 for _ in Path(url, "_build", "receipts").rglob("*.json"))


def command(config, state):
    """Start `brainloom preprocess` as the leader of a process group, its workers in it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.Popen(
        [Path(sys.executable).with_name("brainloom"), "preprocess", "--config", config],
        env=environment | {"BRAINLOOM_STATE_DIR": str(state)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_everything_after(done, seconds, url, config, state):
    """Kill the command and its workers some time after there are so many receipts, and wait until they are gone."""
    with command(config, state) as process:
        while receipts_in(url) < done:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(POLL_S)
        time.sleep(seconds)
        # The Prefect server is a child as well, in a group of its own.
        below = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in below if os.getpgid(child.pid) == process.pid]
        os.killpg(process.pid, signal.SIGKILL)
    for worker in workers:
        await_end(worker)


def await_end(process):
    """Wait until a killed process is gone or a zombie: not every init reaps orphans, then waiting never ends."""
    deadline = time.monotonic() + END_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{process} lives {END_S} s after SIGKILL"
            time.sleep(POLL_S)
