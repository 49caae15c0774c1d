"""`brainloom up`: every deployment of prefect.yaml on a server of its own, run by its real worker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from api_states import start_deployment
from demo_runs import environment, run
from deployed import processes_of
from nifti_files import write_case
from store_builds import ingest, three_subjects
from waiting import until

from flows.ingest import IngestParams
from flows.pretrain import PretrainParams
from infra.server import ServerInfo, child_environment, request_json, server_status
from infra.settings import Settings
from models.heartbeat import read_beats
from models.store import open_store
from tasks.verify import verify

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(900)
WAIT_S = 400
SETTINGS = {"BRAINLOOM_GPU_POOL": "brainloom-gpu", "BRAINLOOM_ALARM_FAILURES": "1000"}
"""Two pools; flow runs that fail here on purpose are no alarm."""


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
        done = run("up", state_dir=folder / "state", **SETTINGS)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.findall(r"^deployment: (\S+)$", done.stdout, re.MULTILINE) == [
            "benchmark/benchmark",
            "benchmark/chain",
            "catalog/catalog",
            "evaluate/evaluate",
            "ingest/nightly-ingest",
            "preprocess/preprocess",
            *("pretrain/pretrain", "pretrain/pretrain-anatcl", "pretrain/pretrain-cinp"),
            "probe/probe",
            "prompt/prompt",
            "propose-pretraining/propose-pretraining",
            "retention/retention",
            "train-node/train-node",
            "verify/verify",
        ]
        assert f"folder of flow runs and their relative paths: {folder}\n" in done.stdout
        assert re.findall(r"^worker: running in (\S+);", done.stdout, re.MULTILINE) == [
            "brainloom-cpu",
            "brainloom-gpu",
        ]
        yield folder / "state"
    finally:
        down = run("down", state_dir=folder / "state")
    assert down.stdout.splitlines()[-1] == "stopped: worker, server"
    assert run("down", state_dir=folder / "state").stdout.strip() == "nothing was running"


@pytest.fixture(scope="module")
def server(state: Path) -> ServerInfo:
    info = server_status(Settings(state_dir=state))
    assert info is not None
    return info


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bids_tree(tmp_path_factory.mktemp("bids"), 2)


def bids_tree(folder: Path, subjects: int) -> Path:
    """Write a BIDS tree with some subjects of two modalities."""
    for number in range(subjects):
        subject = f"sub-{number + 1:02d}"
        anat = folder / subject / "anat"
        for modality, path in write_case(anat, subject, number).items():
            path.rename(anat / f"{subject}_{'T1w' if modality == 't1' else 'T2w'}.nii.gz")
    return folder


def ingest_params(folder: Path, tree: Path) -> dict[str, Any]:
    """Return the parameters of an ingest of a BIDS tree into a store below a workspace."""
    return {
        "catalog": {"sources": [{"kind": "bids", "dataset": "toy", "root": str(tree)}], "workspace": str(folder)},
        "preprocess": {
            "catalog": str(folder / "catalog.parquet"),
            "store": str(folder / "store.zarr"),
            "spec": "demo",
            "workers": 1,
        },
    }


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
def test_the_server_makes_flow_runs_of_the_schedules(server: ServerInfo) -> None:
    """A scheduler that fails says so in the log of the server alone."""
    nightly = request_json(f"{server.api_url}/deployments/name/ingest/nightly-ingest")
    body = {
        "deployments": {"id": {"any_": [nightly["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    deadline = time.monotonic() + WAIT_S
    while not (found := request_json(f"{server.api_url}/flow_runs/filter", body)) and time.monotonic() < deadline:
        time.sleep(2)
    assert found, "no flow run of nightly-ingest is scheduled"
    assert found[0]["expected_start_time"][11:16] == "02:00"


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
    params = ingest_params(folder, tree)
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
    assert not (state / "ingest/catalog.parquet").exists()


def ended(server: ServerInfo, flow_run: str, wanted: str, log: Path) -> dict[str, Any]:
    """Wait until a flow run is in a state; fails with the end of a worker's log when it ends in another one."""
    deadline = time.monotonic() + WAIT_S
    while (found := request_json(f"{server.api_url}/flow_runs/{flow_run}"))["state_name"] != wanted:
        assert found["state_type"] not in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}, found["state"]
        assert time.monotonic() < deadline, (found["state_name"], log.read_text()[-3000:])
        time.sleep(0.5)
    return dict(found)


def runs_of(server: ServerInfo, flow: str) -> list[dict[str, Any]]:
    return list(request_json(f"{server.api_url}/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}}))


@pytest.mark.full
def test_the_examples_of_the_operators_page_run(state: Path, server: ServerInfo, tmp_path: Path) -> None:
    ingest(str(state / "ingest/store.zarr"), three_subjects(tmp_path))
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/operating.md").read_text(), re.MULTILINE | re.DOTALL)
    told, *examples = blocks
    assert told.startswith("export PREFECT_API_URL=")
    known = {**child_environment(Settings(state_dir=state), server), **environment(state)}
    known["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{known['PATH']}"
    for script in (*examples, examples[-1]):  # the second request with the same idempotency key starts nothing
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(command, env=known, cwd=state.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + (state / "server/worker.log").read_text()[-3000:]
    by_rest = (state.parent / "flow_run.txt").read_text().strip()
    ended(server, by_rest, "Completed", state / "server/worker.log")
    runs = [run for run in runs_of(server, "verify") if not run["auto_scheduled"]]
    assert {run["state_name"] for run in runs} == {"Completed"}
    assert len(runs) == 3


@pytest.mark.full
def test_wrong_parameters_are_refused_when_a_flow_run_is_created(server: ServerInfo) -> None:
    found = request_json(f"{server.api_url}/deployments/name/verify/verify")
    for params, words in (({"stroes": ["a"]}, "stroes"), ({"stores": []}, "stores"), ({"deep": "deeply"}, "deep")):
        body = {"state": {"type": "SCHEDULED"}, "parameters": {"params": params}}
        with pytest.raises(urllib.error.HTTPError, match="409") as refused:
            request_json(f"{server.api_url}/deployments/{found['id']}/create_flow_run", body)
        assert words in refused.value.read().decode()


@pytest.mark.full
def test_a_nightly_ingest_with_news_trains_in_the_other_pool_after_approval(
    state: Path, server: ServerInfo, tmp_path: Path
) -> None:
    """The chain over two pools and two workers: catalog and preprocess on one, the training on the other."""
    folder = state.parent / "night"
    params = ingest_params(folder, bids_tree(tmp_path, 8))
    nightly_run = start_deployment(server.api_url, "ingest/nightly-ingest", params)
    ended(server, nightly_run, "Completed", state / "server/worker.log")
    deadline = time.monotonic() + WAIT_S
    while not (waiting := [run for run in runs_of(server, "propose-pretraining") if night(run, folder)]):
        assert time.monotonic() < deadline, "no proposal"
        time.sleep(0.5)
    proposal = ended(server, waiting[0]["id"], "Suspended", state / "server/worker.log")
    # Prefect 3.8.8's worker ends with an error when a flow run is resumed whose process has not gone yet.
    await_no_process_of(proposal["id"])
    assert proposal["parameters"]["news"]["preprocessed"] == 8
    assert runs_of(server, "pretrain") == [], "nothing trains without the approval"

    wrong = {"run_input": {"decision": "yes", "recipe": "brainmvp_tiny", "name": "night-1"}}
    refused = request_json(f"{server.api_url}/flow_runs/{proposal['id']}/resume", wrong)
    assert refused["status"] == "REJECT"
    answer = {"run_input": {"decision": "approve", "recipe": "brainmvp_tiny", "name": "night-1", "epochs": 1}}
    request_json(f"{server.api_url}/flow_runs/{proposal['id']}/resume", answer)
    ended(server, proposal["id"], "Approved", state / "server/worker.log")
    (training,) = runs_of(server, "pretrain")
    assert (training["work_pool_name"], training["work_queue_name"]) == ("brainloom-gpu", "trainings")
    ended(server, training["id"], "Completed", state / "server/worker-brainloom-gpu.log")
    assert (state / "ingest/trainings/night-1/done.json").is_file()

    # With nothing new, nothing is proposed.
    ended(
        server,
        start_deployment(server.api_url, "ingest/nightly-ingest", params),
        "Completed",
        state / "server/worker.log",
    )
    assert len([run for run in runs_of(server, "propose-pretraining") if night(run, folder)]) == 1


@pytest.mark.full
def test_a_cancelled_chain_cancels_the_link_that_runs_in_the_other_pool(
    state: Path, server: ServerInfo, tmp_path: Path
) -> None:
    workspace, root = state.parent / "chain", bids_tree(tmp_path, 8)
    sources = [{"kind": "bids", "dataset": "toy", "root": str(root)}]
    params = {"workspace": str(workspace), "sources": sources, "spec": "demo", "workers": 1, "epochs": 5000}
    chain = start_deployment(server.api_url, "benchmark/chain", {**params, "deployed": True})
    logs = state / "server/worker.log", state / "server/worker-brainloom-gpu.log"
    folder = workspace / "trainings/brainmvp_tiny"
    beats = until(lambda: read_beats(folder), lambda: "\n".join(log.read_text()[-3000:] for log in logs), WAIT_S, 0.5)
    (link,) = [run for run in runs_of(server, "pretrain") if run["parameters"]["params"]["epochs"] == 5000]
    assert link["work_pool_name"] == "brainloom-gpu"
    request_json(f"{server.api_url}/flow_runs/{chain}/set_state", {"state": {"type": "CANCELLING"}})
    ended(server, chain, "Cancelled", logs[0])
    ended(server, link["id"], "Cancelled", logs[1])
    _, alive = psutil.wait_procs([psutil.Process(b["pid"]) for b in beats if psutil.pid_exists(b["pid"])], timeout=60)
    assert not alive


def await_no_process_of(flow_run: str) -> None:
    """Wait until the worker has reaped the processes of a flow run; then it gives their place back."""
    deadline = time.monotonic() + WAIT_S
    for process in processes_of(flow_run):
        while psutil.pid_exists(process.pid):
            assert time.monotonic() < deadline, f"process {process.pid} of flow run {flow_run} does not end"
            time.sleep(0.5)


def night(run: dict[str, Any], folder: Path) -> bool:
    return str((run["parameters"].get("news") or {}).get("store", "")).startswith(str(folder))


def await_workers(server: ServerInfo) -> None:
    """Wait until the server has heard of a worker in each pool."""
    for pool in ("brainloom-cpu", "brainloom-gpu"):
        asked = partial(request_json, f"{server.api_url}/work_pools/{pool}/workers/filter", {})
        until(asked, f"a worker in {pool}", poll_s=0.5)


@pytest.mark.full
def test_the_doctor_finds_nothing_until_something_is_broken(state: Path, server: ServerInfo) -> None:
    await_workers(server)
    sound = run("doctor", "--store", str(state.parent / "probe"), state_dir=state, **SETTINGS)
    assert sound.returncode == 0, sound.stdout
    assert "ok workers: 1 alive in brainloom-gpu: brainloom-gpu-worker" in sound.stdout
    assert "ok forms: those on the server are those of this version" in sound.stdout
    assert sound.stdout.endswith("no problem found\n")

    found = request_json(f"{server.api_url}/deployments/name/verify/verify")
    request_json(f"{server.api_url}/deployments/{found['id']}", {"tags": ["mine"]}, method="PATCH")
    request_json(f"{server.api_url}/work_pools/brainloom-gpu", {"is_paused": True}, method="PATCH")
    aside = [{"prefect.deployments.steps.set_working_directory": {"directory": "/elsewhere"}}]
    catalog = request_json(f"{server.api_url}/deployments/name/catalog/catalog")
    request_json(f"{server.api_url}/deployments/{catalog['id']}", {"pull_steps": aside}, method="PATCH")
    older = {"name": "verify", "flow_id": found["flow_id"], "parameter_openapi_schema": {"properties": {}}}
    request_json(f"{server.api_url}/deployments/", older)
    broken = run("doctor", state_dir=state, **SETTINGS)
    assert broken.returncode == 1
    mend = "\n    mend: brainloom deploy"
    told = f"catalog: flow runs and their relative paths start in /elsewhere, not in {state.parent}\n"
    assert f"{told}    mend: cd {state.parent}; brainloom deploy; or, when /elsewhere" in broken.stdout
    assert re.search(rf"verify is registered otherwise than in prefect.yaml: .*tags.*{mend}", broken.stdout)
    assert f"the forms of verify on the server are not those of this version{mend}" in broken.stdout
    assert "the work pool brainloom-gpu is paused\n    mend: prefect work-pool resume brainloom-gpu" in broken.stdout
    request_json(f"{server.api_url}/work_pools/brainloom-gpu", {"is_paused": False}, method="PATCH")
    assert run("deploy", state_dir=state, **SETTINGS).returncode == 0
    assert run("doctor", state_dir=state, **SETTINGS).returncode == 0
