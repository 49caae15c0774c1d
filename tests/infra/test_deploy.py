from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.retention import RetentionParams
from infra import deploy as deploying
from infra.automations import FAILURES, PROPOSER
from infra.deploy import (
    GPU_POOL,
    QUEUES,
    DeployError,
    dead_workers,
    deploy,
    find_project,
    flow_runs_at_work,
    served_pools,
    start_worker,
    stop_worker,
    with_pools,
)
from infra.server import ServerError, ServerInfo, connect, request_json
from infra.settings import Settings

ROOT = Path(__file__).resolve().parents[2]

FLOW = """
import os, sys
from pathlib import Path
from prefect import flow

@flow(name="throw-away")
def throw_away(path: str, fail: bool = False) -> None:
    if fail:
        raise ValueError("asked to fail")
    Path(path).write_text(f"{Path.cwd()} {sys.flags.safe_path} {os.environ['PREFECT_API_URL']}")
"""

PROJECT = """
name: throw-away
deployments:
  - name: small
    entrypoint: throw_away_module.throw_away
    work_pool: {name: tests-pool, work_queue_name: trainings}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "prefect.yaml").write_text(PROJECT)
    return tmp_path


def ours() -> list[dict[str, Any]]:
    return list(yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"])


def test_our_deployments_name_modules_under_flows() -> None:
    names = [deployment["name"] for deployment in ours()]
    assert len(names) == len(set(names))
    assert {"catalog", "preprocess", "nightly-ingest", "pretrain", "evaluate", "benchmark"} <= set(names)
    assert {"verify", "retention", PROPOSER} <= set(names)
    for deployment in ours():
        package, module, function = deployment["entrypoint"].split(".")
        assert package == "flows"
        assert module.isidentifier()
        assert function.isidentifier()
        assert deployment["work_pool"]["name"] in {Settings().work_pool, GPU_POOL}
        assert deployment["description"]
        assert "brainloom" in deployment["tags"]  # automations tell by it which flow runs are ours


def test_one_training_and_one_writer_at_a_time_run_in_a_pool() -> None:
    queues = {one["name"]: (one["work_pool"]["name"], one["work_pool"].get("work_queue_name", "")) for one in ours()}
    trainings = ("pretrain", "pretrain-anatcl", "pretrain-cinp", "evaluate", "benchmark")
    assert {queues[name] for name in trainings} == {(GPU_POOL, "trainings")}
    assert {queues[name] for name in ("preprocess", "nightly-ingest")} == {("brainloom-cpu", "writers")}
    assert {queue for _, queue in queues.values()} == {"", *QUEUES}


def pools(settings: Settings, *more: dict[str, Any]) -> dict[str, str]:
    moved = with_pools({"deployments": [*ours(), *more]}, settings)["deployments"]
    return {deployment["name"]: deployment["work_pool"]["name"] for deployment in moved}


def test_our_deployments_go_to_the_pools_that_workers_serve() -> None:
    own = {"name": "own", "entrypoint": "flows.pretrain.pretrain", "work_pool": {"name": "theirs"}}
    one = pools(Settings(work_pool="elsewhere"), own)
    assert one.pop("own") == "theirs"
    assert set(one.values()) == {"elsewhere"}
    assert served_pools(Settings(work_pool="elsewhere")) == ["elsewhere"]
    settings = Settings(gpu_pool="a100s")
    two = pools(settings)
    assert (two["catalog"], two["pretrain"], two["evaluate"]) == ("brainloom-cpu", "a100s", "a100s")
    assert served_pools(settings) == ["brainloom-cpu", "a100s"]


def test_ingest_verify_and_retention_have_schedules_and_nothing_else() -> None:
    scheduled = {one["name"]: one["schedules"][0]["cron"] for one in ours() if one.get("schedules")}
    assert scheduled == {"nightly-ingest": "0 2 * * *", "verify": "0 4 * * 0", "retention": "0 6 * * 0"}


def test_the_scheduled_retention_bounds_the_history_and_touches_no_file() -> None:
    given = next(one for one in ours() if one["name"] == "retention")["parameters"]["params"]
    params = RetentionParams.model_validate(given)
    assert (params.dry_run, params.flow_run_days, params.keep_last) == (False, 90, 20)
    assert (params.workspaces, params.stage_dirs) == ([], [])
    assert RetentionParams().dry_run, "who starts it in a shell gets a list first"


def test_the_version_is_the_installed_one() -> None:
    import prefect

    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert content["prefect-version"] == prefect.__version__


@pytest.mark.full
def test_every_entrypoint_is_a_flow() -> None:
    from prefect import Flow

    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        module, name = deployment["entrypoint"].rsplit(".", 1)
        assert importlib.util.find_spec(module), f"{module} of deployment {deployment['name']} is missing"
        assert isinstance(getattr(importlib.import_module(module), name), Flow)


def test_a_folder_without_prefect_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=rf"no prefect\.yaml in {tmp_path}; run this in a checkout"):
        find_project(tmp_path)


def test_the_checkout_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_project() == ROOT


def test_without_a_server_nothing_is_deployed(project: Path) -> None:
    settings = Settings(state_dir=project / "state")
    with pytest.raises(ServerError, match="no Prefect server runs; start it with `brainloom up`"):
        deploy(settings, project)
    with pytest.raises(ServerError, match="no Prefect server runs"):
        start_worker(settings)
    assert stop_worker(settings) is False


@pytest.fixture
def deployed(
    prefect_server: ServerInfo, project: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Settings, list[str]]]:
    code = project / "code"
    code.mkdir()
    (code / "throw_away_module.py").write_text(FLOW)
    monkeypatch.setenv("PYTHONPATH", str(code))
    settings = Settings(api_url=prefect_server.api_url, state_dir=project / "state", work_pool="tests-pool")
    yield settings, deploy(settings, project)
    stop_worker(settings)


@pytest.mark.full
def test_deploying_twice_updates(deployed: tuple[Settings, list[str]], project: Path) -> None:
    settings, names = deployed
    assert names == ["throw-away/small"]
    assert deploy(settings, project) == names
    found = request_json(f"{settings.api_url}/deployments/name/throw-away/small")
    assert found["entrypoint"] == "throw_away_module.throw_away"
    assert (found["work_pool_name"], found["work_queue_name"]) == ("tests-pool", "trainings")
    queue = f"{settings.api_url}/work_pools/tests-pool/queues/trainings"
    assert request_json(queue)["concurrency_limit"] == 1
    request_json(queue, {"concurrency_limit": 2}, method="PATCH")  # by the operator, and stays so
    deploy(settings, project)
    assert request_json(queue)["concurrency_limit"] == 2
    named = {"automations": {"name": {"any_": [FAILURES]}}}
    assert len(request_json(f"{settings.api_url}/automations/filter", named)) == 1


def test_a_pool_that_somebody_else_makes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, True, False, False]

    def refused(*_: object) -> None:
        raise DeployError("work pool already exists")

    monkeypatch.setattr(deploying, "_has_pool", lambda *_: answers.pop(0))
    monkeypatch.setattr(deploying, "_prefect", refused)
    info = ServerInfo("http://127.0.0.1:1/api", "http://127.0.0.1:1", None)
    deploying._ensure_pool(info, "pool", tmp_path, {})
    with pytest.raises(DeployError, match="already exists"):
        deploying._ensure_pool(info, "pool", tmp_path, {})
    assert answers == []


def test_a_worker_that_was_killed_is_missed(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    assert dead_workers(settings) == set()
    settings.server_dir.mkdir()
    for name in ("worker", "worker-gpu"):
        (settings.server_dir / f"{name}.pid").write_text("999999999")
    assert dead_workers(settings) == {"brainloom-cpu", "gpu"}
    assert flow_runs_at_work(settings) == set()


@pytest.mark.full
def test_another_work_pool_is_deployed_to(
    deployed: tuple[Settings, list[str]], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "prefect.yaml").write_text(PROJECT.replace("tests-pool", "brainloom-cpu"))
    monkeypatch.setenv("BRAINLOOM_WORK_POOL", "own-pool")
    settings = Settings(api_url=deployed[0].api_url, state_dir=project / "state")
    assert deploy(settings, project) == ["throw-away/small"]
    found = request_json(f"{settings.api_url}/deployments/name/throw-away/small")
    assert (found["work_pool_name"], found["path"]) == ("own-pool", None)
    assert found["pull_steps"][0]["prefect.deployments.steps.set_working_directory"] == {"directory": str(project)}


@pytest.mark.full
def test_a_missing_module_fails_with_prefects_words(deployed: tuple[Settings, list[str]], project: Path) -> None:
    (project / "prefect.yaml").write_text(PROJECT.replace("throw_away_module", "no_such_module"))
    with pytest.raises(DeployError, match=r"(?s)`prefect deploy --all` failed in .*no_such_module"):
        deploy(deployed[0], project)


@pytest.mark.full
def test_a_deployment_runs_on_a_real_worker(deployed: tuple[Settings, list[str]], project: Path) -> None:
    from prefect.deployments import run_deployment

    settings, (name,) = deployed
    assert connect(settings).api_url == settings.api_url
    pid = start_worker(settings)
    assert start_worker(settings) == pid
    target = project / "written.txt"
    flow_run = run_deployment(name, parameters={"path": str(target)}, timeout=150, poll_interval=1)
    assert flow_run.state.is_completed(), (settings.server_dir / "worker.log").read_text()
    assert target.read_text() == f"{project} True {settings.api_url}"
    failed = run_deployment(name, parameters={"path": str(target), "fail": True}, timeout=150, poll_interval=1)
    assert failed.state.is_failed()
    assert stop_worker(settings) is True
    assert stop_worker(settings) is False
