"""`brainloom up`: every deployment of prefect.yaml on a server of its own, run by its real worker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from demo_runs import environment, run
from nifti_files import write_case

from flows.ingest import IngestParams
from flows.pretrain import PretrainParams
from infra.server import ServerInfo, child_environment, request_json, server_status
from infra.settings import Settings
from models.store import open_store
from tasks.verify import verify

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(600)


def nightly() -> dict[str, Any]:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    return next(deployment for deployment in deployments if deployment["name"] == "nightly-ingest")


def test_the_deployment_of_anatcl_has_all_parameters_it_needs() -> None:
    deployments = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    params = PretrainParams.model_validate(deployments["pretrain-anatcl"]["parameters"]["params"])
    assert (params.recipe, params.probe_target, params.preset) == ("anatcl_tiny", "age", "recommended")


def test_the_deployment_of_cinp_has_all_parameters_it_needs() -> None:
    deployments = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    params = PretrainParams.model_validate(deployments["pretrain-cinp"]["parameters"]["params"])
    assert (params.recipe, params.preset, params.probe_target) == ("cinp_tiny", "recommended", "")


def test_the_scheduled_deployment_has_all_parameters_it_needs() -> None:
    params = IngestParams.model_validate(nightly()["parameters"]["params"])
    assert params.preprocess.catalog == f"{params.catalog.workspace}/catalog.parquet"
    assert [source.root for source in params.catalog.sources] == ["./data/incoming"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the state folder of a server with our deployments and a worker; flow runs start in its parent."""
    folder = tmp_path_factory.mktemp("up")
    shutil.copy(ROOT / "prefect.yaml", folder)
    try:
        done = run("up", state_dir=folder / "state")
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.findall(r"^deployment: (\S+)$", done.stdout, re.MULTILINE) == [
            *(f"{name}/{name}" for name in ("benchmark", "catalog", "evaluate")),
            "ingest/nightly-ingest",
            "preprocess/preprocess",
            *("pretrain/pretrain", "pretrain/pretrain-anatcl", "pretrain/pretrain-cinp"),
            "probe/probe",
            "prompt/prompt",
        ]
        assert "worker: running" in done.stdout
        yield folder / "state"
    finally:
        down = run("down", state_dir=folder / "state")
    assert down.stdout.strip() == "stopped: worker, server"
    assert run("down", state_dir=folder / "state").stdout.strip() == "nothing was running"


@pytest.fixture(scope="module")
def server(state: Path) -> ServerInfo:
    info = server_status(Settings(state_dir=state))
    assert info is not None
    return info


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a BIDS tree with two subjects of two modalities."""
    folder = tmp_path_factory.mktemp("bids")
    for number, subject in enumerate(("sub-01", "sub-02")):
        anat = folder / subject / "anat"
        for modality, path in write_case(anat, subject, number).items():
            path.rename(anat / f"{subject}_{'T1w' if modality == 't1' else 'T2w'}.nii.gz")
    return folder


def last_run(server: ServerInfo, deployment: str) -> dict[str, Any]:
    """Return the newest flow run of a deployment that has ended."""
    found = request_json(f"{server.api_url}/deployments/name/{deployment}")
    body = {
        "deployments": {"id": {"any_": [found["id"]]}},
        "flow_runs": {"end_time": {"is_null_": False}},
        "sort": "END_TIME_DESC",
        "limit": 1,
    }
    return request_json(f"{server.api_url}/flow_runs/filter", body)[0]


@pytest.mark.full
def test_a_deployed_catalog_runs_on_the_worker(state: Path, server: ServerInfo, tree: Path) -> None:
    source = {"kind": "bids", "dataset": "toy", "root": str(tree)}
    config = state.parent / "catalog.yaml"
    config.write_text(yaml.safe_dump({"sources": [source], "workspace": "./ws"}))
    done = run("catalog", "-c", str(config), "--deployment", "catalog/catalog", state_dir=state)
    assert done.returncode == 0, done.stderr + (state / "server/worker.log").read_text()[-3000:]
    ended = last_run(server, "catalog/catalog")
    assert (ended["name"], ended["state_name"]) == ("catalog toy", "Completed")
    assert ended["work_pool_name"] == "brainloom-cpu"
    # A relative path starts in the folder with prefect.yaml.
    assert (state.parent / "ws/catalog.parquet").is_file()


@pytest.mark.full
def test_a_deployed_ingest_makes_a_store_and_a_second_one_finds_it_done(
    state: Path, server: ServerInfo, tree: Path
) -> None:
    folder = state.parent / "ingest"
    params = {
        "catalog": {
            "sources": [{"kind": "bids", "dataset": "toy", "root": str(tree)}],
            "workspace": str(folder),
        },
        "preprocess": {
            "catalog": str(folder / "catalog.parquet"),
            "store": str(folder / "store.zarr"),
            "spec": "demo",
            "workers": 1,
        },
    }
    config = state.parent / "ingest.yaml"
    config.write_text(yaml.safe_dump(params))
    for _ in range(2):
        done = run("ingest", "-c", str(config), "--deployment", "ingest/nightly-ingest", state_dir=state)
        assert done.returncode == 0, done.stderr + (state / "server/worker.log").read_text()[-3000:]
    ended = last_run(server, "ingest/nightly-ingest")
    assert (ended["name"], ended["state_name"]) == ("ingest into store.zarr", "Completed")
    store = open_store(str(folder / "store.zarr"))
    assert [(line["case"], line["status"]) for line in store.cases().to_pylist()] == [
        ("sub-01", "stored"),
        ("sub-02", "stored"),
    ]
    assert verify(store.url, deep=True) == []


@pytest.mark.full
def test_the_nightly_ingest_without_data_fails_and_names_the_folder(state: Path, server: ServerInfo) -> None:
    command = [sys.executable, "-m", "prefect", "deployment", "run", "ingest/nightly-ingest", "--watch"]
    known = child_environment(Settings(state_dir=state), server)
    subprocess.run(command, env={**environment(state), **known}, cwd=state, capture_output=True, check=False)
    ended = last_run(server, "ingest/nightly-ingest")
    assert ended["state_name"] == "Failed"
    incoming = state.parent / "data/incoming"
    assert f"dataset incoming: the root {incoming} is not a folder; correct `root`" in ended["state"]["message"]
    assert not (state.parent / "state/ingest/store.zarr").exists()
