"""The services of docker-compose.yml, started on this host beside a real PostgreSQL and a real S3 server.

No container engine runs here. What containers would run is run instead: the same commands, environment, secrets' files
and health checks (tests/composed.py), with authentication on, and the tiny demo goes through the deployments.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed import OF_SEAWEEDFS, Composed

from bench.postgres import PostgresServer, program
from infra.api import request_json

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not program("initdb"), reason="needs PostgreSQL's server (Debian's postgresql)"),
]
TIMEOUT_S = 1200


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """Return the four secrets; one has characters that a URL must quote."""
    planted = {name: f"planted{secrets.token_hex(8)}" for name in ("s3_access_key", "s3_secret_key")}
    return {
        **planted,
        "postgres_password": f"planted@/{secrets.token_hex(8)}",
        "api_auth": f"admin:planted{secrets.token_hex(8)}",
    }


@pytest.fixture(scope="module")
def composed(keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """Return all services, running and healthy; that of the profile `gpu` without a GPU."""
    services = Composed(tmp_path_factory.mktemp("composed"), keys)
    database = PostgresServer(int(services.ports["5432"]), keys["postgres_password"])
    try:
        database.start()
        services.start("s3", _ports_of_seaweedfs(services.ports))
        services.start("scheduler")
        database.wait()
        database.make_database()
        services.start("server")
        for name in ("s3", "server", "scheduler"):
            services.wait_healthy(name)
        services.start("bootstrap")
        assert services.running["bootstrap"].wait(TIMEOUT_S) == 0, services.tail("bootstrap")
        workers = ("dask-worker", "worker", "gpu-worker")
        for name in workers:
            services.start(name)
        for name in workers:
            services.wait_healthy(name)
        yield services
    finally:
        services.stop()
        database.stop()


def _ports_of_seaweedfs(ports: dict[str, str]) -> str:
    """Return options that keep its other ports apart from those of other tests."""
    names = {**{name: int(ports[name]) for name in OF_SEAWEEDFS}, "s3": int(ports["8333"])}
    options = [f"-{name}.port.grpc={port + 10000}" for name, port in names.items()]
    options += [f"-{name}.port={ports[name]}" for name in OF_SEAWEEDFS]
    return " ".join(["", *options, "-volume.max=20 -s3.port.iceberg=0 -s3.port.lance=0"])


def brainloom(services: Composed, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours in the environment of the worker, as `docker compose exec worker` does."""
    return subprocess.run(
        ["python", "-m", "infra.environments", "brainloom", *words],
        env=services.environment("worker"),
        cwd=services.folder / "srv",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def deployed(services: Composed, verb: str, deployment: str, params: dict[str, Any]) -> None:
    """Run a flow through its deployment; raises AssertionError with the worker's log."""
    config = services.folder / f"{verb}.yaml"
    config.write_text(yaml.safe_dump(params))
    done = brainloom(services, verb, "-c", str(config), "--deployment", deployment)
    logs = [services.tail(name) for name in ("worker", "gpu-worker", "dask-worker")]
    assert done.returncode == 0, "\n".join([done.stderr, *logs])


def test_bootstrap_makes_bucket_pools_deployments_and_automations(
    composed: Composed, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = composed.log("bootstrap").read_text()
    assert "bucket: s3://brainloom" in said
    assert "deployment: benchmark/benchmark" in said
    again = brainloom(composed, "bootstrap")
    assert again.returncode == 0, again.stderr
    assert re.findall(r"^\w+: .*$", again.stdout, re.MULTILINE) == re.findall(r"^\w+: .*$", said, re.MULTILINE)
    monkeypatch.setenv("BRAINLOOM_API_URL", composed.api_url)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", keys["api_auth"])
    pools = {pool["name"]: pool["status"] for pool in request_json(f"{composed.api_url}/work_pools/filter", {})}
    assert (pools["brainloom-cpu"], pools["brainloom-gpu"]) == ("READY", "READY")
    assert request_json(f"{composed.api_url}/automations/filter", {})


def test_who_has_no_password_is_refused(composed: Composed) -> None:
    assert request_json(f"{composed.api_url}/health") is True
    with pytest.raises(urllib.error.HTTPError, match="401"):
        request_json(f"{composed.api_url}/flow_runs/filter", {})


def test_the_tiny_demo_runs_through_the_deployments_and_a_store_on_s3_has_its_digest(
    composed: Composed, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.benchmark_params import PRESETS

    workspace = composed.folder / "srv" / "demo"
    tiny = PRESETS["tiny"](workspace)
    chain = tiny.model_copy(update={"deployed": True})
    deployed(composed, "benchmark", "benchmark/chain", chain.model_dump(mode="json"))
    assert list((workspace / "tables").glob("*.md"))
    pools = pools_of_links(composed, keys, monkeypatch)
    assert pools == {"catalog": "cpu", "preprocess": "cpu", "pretrain": "gpu", "evaluate": "gpu", "benchmark": "cpu"}
    again = {
        "catalog": str(workspace / "catalog.parquet"),
        "store": "s3://brainloom/demo.zarr",
        "spec": tiny.spec,
        "max_quarantined_share": tiny.max_quarantined_share,
    }
    deployed(composed, "preprocess", "preprocess/preprocess", again)
    digests = [
        re.search(r"digest\W+(\w{16})", brainloom(composed, "store", "info", url).stdout)
        for url in (str(workspace / "store.zarr"), "s3://brainloom/demo.zarr")
    ]
    assert digests[0] is not None
    assert digests[1] is not None
    assert digests[0].group(1) == digests[1].group(1)
    assert_no_secret(composed, keys, monkeypatch)


def pools_of_links(composed: Composed, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return in which pool the flow run of each deployment ran, by the deployment's entrypoint."""
    monkeypatch.setenv("BRAINLOOM_API_URL", composed.api_url)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", keys["api_auth"])
    asked = {"deployment_id": {"is_null_": False}, "state": {"type": {"any_": ["COMPLETED"]}}}
    runs = request_json(f"{composed.api_url}/flow_runs/filter", {"flow_runs": asked})
    flows = {flow["id"]: flow["name"] for flow in request_json(f"{composed.api_url}/flows/filter", {})}
    return {flows[run["flow_id"]]: run["work_pool_name"].removeprefix("brainloom-") for run in runs}


def assert_no_secret(composed: Composed, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No log, workspace file, flow run, artifact or log line of the server has a secret; nor has any command line."""
    planted = [part.encode() for value in keys.values() for part in value.split(":") if "planted" in part]
    files = [path for folder in ("logs", "srv") for path in (composed.folder / folder).rglob("*") if path.is_file()]
    found = [(path.name, secret) for path in files for secret in planted if secret in path.read_bytes()]
    # SeaweedFS tells the access key's name, which is no secret without the other, in its own log.
    assert [one for one in found if one != ("s3.log", keys["s3_access_key"].encode())] == []
    monkeypatch.setenv("BRAINLOOM_API_URL", composed.api_url)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", keys["api_auth"])
    for what in ("flow_runs", "task_runs", "artifacts", "logs", "deployments"):
        answer = str(request_json(f"{composed.api_url}/{what}/filter", {"limit": 200}, timeout_s=60))
        assert not [secret for secret in planted if secret.decode() in answer], what
    for process in composed.running.values():
        line = Path(f"/proc/{process.pid}/cmdline")
        assert not line.exists() or not [secret for secret in planted if secret in line.read_bytes()]
