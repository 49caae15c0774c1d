"""Deployments of `prefect.yaml` on the running server, and a process worker that runs them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from infra.detached import Detached
from infra.server import ServerError, ServerInfo, child_environment, request_json, server_status
from infra.settings import Settings

PROJECT_FILE = "prefect.yaml"
DEPLOY_TIMEOUT_S = 600
WORKER_POLL_S = 2


class DeployError(RuntimeError):
    """The deployments could not be registered, or the worker could not be started."""


def deploy(settings: Settings, project: Path | None = None) -> list[str]:
    """Create the work pools and register every deployment of `prefect.yaml`; return `<flow>/<deployment>` names.

    `project` is the folder of that file; None: the working directory, else the folder of our own checkout. Flow runs
    start in that folder. Deployments of our default work pool go to the pool of the settings (BRAINLOOM_WORK_POOL),
    which the worker serves; those that name another pool stay there. Doing it again updates. Raises DeployError with
    Prefect's own words, ServerError without a live server.
    """
    folder = find_project(project)
    content = with_work_pool(yaml.safe_load((folder / PROJECT_FILE).read_text()), settings.work_pool)
    wanted = content["deployments"]
    info = _live_server(settings)
    environment = child_environment(settings, info)
    for pool in sorted({deployment["work_pool"]["name"] for deployment in wanted}):
        if not _has_pool(info, pool):
            _prefect(["work-pool", "create", pool, "--type", "process"], folder, environment)
    with tempfile.TemporaryDirectory(prefix="brainloom-deploy-") as place:
        file = Path(place, PROJECT_FILE)
        file.write_text(yaml.safe_dump(content))
        _prefect(["deploy", "--all"], folder, environment, "--prefect-file", str(file))
    names = [deployment["name"] for deployment in wanted]
    found = request_json(f"{info.api_url}/deployments/filter", {"deployments": {"name": {"any_": names}}})
    flow_ids = [deployment["flow_id"] for deployment in found]
    flows = request_json(f"{info.api_url}/flows/filter", {"flows": {"id": {"any_": flow_ids}}})
    flow_names = {flow["id"]: flow["name"] for flow in flows}
    registered = {deployment["name"]: flow_names[deployment["flow_id"]] for deployment in found}
    if missing := [name for name in names if name not in registered]:
        raise DeployError(f"these deployments of {folder / PROJECT_FILE} were not registered: {', '.join(missing)}")
    return sorted(f"{registered[name]}/{name}" for name in names)


def with_work_pool(content: Mapping[str, Any], pool: str) -> dict[str, Any]:
    """Return the content of `prefect.yaml` with the deployments of our default work pool in another pool."""
    default = Settings.model_fields["work_pool"].default
    moved = [
        {**deployment, "work_pool": {**deployment["work_pool"], "name": pool}}
        if deployment["work_pool"]["name"] == default
        else deployment
        for deployment in content["deployments"]
    ]
    return {**content, "deployments": moved}


def start_worker(settings: Settings) -> int:
    """Start a detached process worker for the work pool unless one runs, and return its pid.

    Raises DeployError with the end of its log when it does not get to know the server.
    """
    info = _live_server(settings)
    process = _worker(settings)
    with process.lock():
        if (pid := process.pid()) is not None:
            return pid
        environment = child_environment(settings, info) | {"PREFECT_WORKER_QUERY_SECONDS": str(WORKER_POLL_S)}
        options = ["--pool", settings.work_pool, "--type", "process", "--name", process.marker]
        command = [sys.executable, "-m", "prefect", "worker", "start", *options, "--limit", str(settings.flow_runs)]
        return process.start(command, environment)


def stop_worker(settings: Settings) -> bool:
    """Stop our worker with the flow runs that it started, and wait for them; False when none was running."""
    process = _worker(settings)
    if not settings.server_dir.exists():
        return False
    with process.lock():
        return process.stop(wait_s=45.0)  # a flow run gets 30 s to end its ranks and to save


def find_project(project: Path | None = None) -> Path:
    """Return the folder with `prefect.yaml`; raises DeployError naming where it was looked for."""
    folders = [project] if project else [Path.cwd(), Path(__file__).resolve().parent.parent]
    for folder in folders:
        if (folder / PROJECT_FILE).exists():
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise DeployError(f"no {PROJECT_FILE} in {looked}; run this in a checkout of brainloom or name its folder")


def _worker(settings: Settings) -> Detached:
    return Detached(settings.server_dir, "worker", marker=f"{settings.work_pool}-worker")


def _live_server(settings: Settings) -> ServerInfo:
    info = server_status(settings)
    if info is None:
        raise ServerError("no Prefect server runs; start it with `brainloom up`")
    return info


def _has_pool(info: ServerInfo, name: str) -> bool:
    try:
        request_json(f"{info.api_url}/work_pools/{name}")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise
    return True


def _prefect(arguments: list[str], folder: Path, environment: dict[str, Any], *unsaid: str) -> None:
    """Run a command of Prefect in a folder; unsaid: further arguments, which the error text leaves out."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments, *unsaid]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEPLOY_TIMEOUT_S, check=False
    )
    if done.returncode:
        words = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise DeployError(f"`prefect {' '.join(arguments)}` failed in {folder}:\n{words}")
