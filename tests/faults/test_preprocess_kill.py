"""Killed at any point, preprocessing goes on where it was and ends with the same store."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from nifti_files import SMALL, write_dataset
from store_builds import ingest

from bench.catalog import write_cohort
from bench.kills import flow_command, kill_after_cases, kill_server
from bench.scale import SPEC, report_kills, write_brain
from infra.server import stop_server
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
            process = flow_command("preprocess", config, BRAINLOOM_STATE_DIR=str(state))
            done.append(kill_after_cases(process, Path(url), done[-1] + fresh, rng.uniform(0, 0.05)).cases)
            if number % 2:
                kill_server(Settings(state_dir=state))
        assert flow_command("preprocess", config, BRAINLOOM_STATE_DIR=str(state)).wait() == 0
    finally:
        stop_server(Settings(state_dir=state))
    assert done == sorted(set(done))
    assert done[-1] < cases  # so every kill fell in mid-run
    assert store_digest(url) == store_digest(undisturbed)
    assert verify(url, deep=True) == []
    assert len(plans.read_plans(url)) == cases


@pytest.mark.full
def test_the_bench_kills_at_random_moments_and_ends_with_the_same_digest(tmp_path):
    *_, table, _ = report_kills(tmp_path, kills=1, share=1 / 300)
    killed, last = (line.split("|")[1:4] for line in table.strip().splitlines()[2:])
    assert float(killed[1]) > 0
    assert 6 <= int(killed[2].split(" of ")[0]) <= 10
    assert "not killed" in last[1]
    assert last[2] == " 10 of 10, digest equal to the undisturbed run's "
