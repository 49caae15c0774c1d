"""Deployments of `prefect.yaml` on the running server, and a process worker that runs them."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

from infra.api import request_json
from infra.automations import ensure_all
from infra.detached import Detached
from infra.server import ServerError, ServerInfo, child_environment, server_status
from infra.settings import Settings
from infra.supervised import GRACE_S, flow_runs_of

PROJECT_FILE = "prefect.yaml"
DEPLOY_TIMEOUT_S = 600
WORKER_POLL_S = 2
FOLDER_STEP = "prefect.deployments.steps.set_working_directory"
"""Step before a flow run that Prefect registers when `prefect.yaml` names none: the folder of that file."""
GPU_POOL = "brainloom-gpu"
"""What `prefect.yaml` calls the pool of trainings and embeddings."""
QUEUES = {
    "trainings": "One training at a time: those of a pool share its GPUs, or its cores.",
    "writers": "One ingest or preprocessing at a time: each has a Dask cluster for the memory of the whole machine.",
}
"""Work queues, in whichever pool, that are made with a limit of one flow run at a time."""
_log = logging.getLogger(__name__)


class DeployError(RuntimeError):
    """The deployments could not be registered, or the worker could not be started."""


def deploy(settings: Settings, project: Path | None = None) -> list[str]:
    """Create the work pools, the deployments of `prefect.yaml` and the automations; return `<flow>/<deployment>` names.

    `project` is the folder of that file; None: the working directory, else the folder of our own checkout. Flow runs
    start in that folder. Deployments of our pools go to those of the settings, see `with_pools`. Doing it again
    updates. Raises DeployError with Prefect's own words, ServerError without a live server, and AutomationError.
    """
    folder = find_project(project)
    content = with_pools(yaml.safe_load((folder / PROJECT_FILE).read_text()), settings)
    info = _live_server(settings)
    with Detached(settings.server_dir, "deploy", marker="").lock():  # two at once would make things twice
        return _register(settings, info, folder, content)


def _register(settings: Settings, info: ServerInfo, folder: Path, content: Mapping[str, Any]) -> list[str]:
    environment = child_environment(settings, info)
    for pool in sorted({deployment["work_pool"]["name"] for deployment in content["deployments"]}):
        _ensure_pool(info, pool, folder, environment)
    _ensure_queues(info, content)
    with tempfile.TemporaryDirectory(prefix="brainloom-deploy-") as place:
        file = Path(place, PROJECT_FILE)
        file.write_text(yaml.safe_dump(content))
        _prefect(["deploy", "--all"], folder, environment, "--prefect-file", str(file))
    registered = registered_deployments(info.api_url, content)
    names = [deployment["name"] for deployment in content["deployments"]]
    if missing := [name for name in names if name not in registered]:
        raise DeployError(f"these deployments of {folder / PROJECT_FILE} were not registered: {', '.join(missing)}")
    for name, what in ensure_all(info.api_url, settings).items():
        _log.info("automation %r was %s", name, what)
    return sorted(f"{registered[name]['flow_name']}/{name}" for name in names)


def registered_deployments(api_url: str, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by name what the server says about the deployments of a `prefect.yaml`, with `flow_name`."""
    names = [deployment["name"] for deployment in content["deployments"]]
    found = request_json(f"{api_url}/deployments/filter", {"deployments": {"name": {"any_": names}}})
    flow_ids = [deployment["flow_id"] for deployment in found]
    flows = request_json(f"{api_url}/flows/filter", {"flows": {"id": {"any_": flow_ids}}})
    flow_names = {flow["id"]: flow["name"] for flow in flows}
    return {one["name"]: {**one, "flow_name": flow_names[one["flow_id"]]} for one in found}


def with_pools(content: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the content of `prefect.yaml` with its deployments in the pools of the settings.

    `brainloom-cpu` becomes BRAINLOOM_WORK_POOL. `brainloom-gpu` becomes BRAINLOOM_GPU_POOL and, when none is set, the
    same pool as the others. Deployments that name another pool stay there.
    """
    cpu = settings.work_pool
    pools = {str(Settings.model_fields["work_pool"].default): cpu, GPU_POOL: settings.gpu_pool or cpu}
    moved = []
    for deployment in content["deployments"]:
        pool = deployment["work_pool"]
        moved.append({**deployment, "work_pool": {**pool, "name": pools.get(pool["name"], pool["name"])}})
    return {**content, "deployments": moved}


def served_pools(settings: Settings) -> list[str]:
    """Return the work pools of the settings: a worker is needed in each."""
    return list(dict.fromkeys(pool for pool in (settings.work_pool, settings.gpu_pool) if pool))


def start_worker(settings: Settings, pool: str | None = None) -> int:
    """Start a process worker for a work pool (None: that of the settings) unless one runs.

    Returns the pid of the process that starts it again whenever it ends, see infra.supervised. Raises ServerError
    without a live server.
    """
    info = _live_server(settings)
    pool = pool or settings.work_pool
    process = _worker(settings, pool)
    with process.lock():
        if (pid := process.pid()) is not None:
            return pid
        environment = child_environment(settings, info) | {"PREFECT_WORKER_QUERY_SECONDS": str(WORKER_POLL_S)}
        options = ["--pool", pool, "--type", "process", "--name", process.marker]
        command = [sys.executable, "-m", "prefect", "worker", "start", *options, "--limit", str(settings.flow_runs)]
        return process.start([sys.executable, "-m", "infra.supervised", process.marker, *command], environment)


def stop_worker(settings: Settings) -> bool:
    """Stop our workers for good, with the flow runs that they started, and wait for them; False when none ran."""
    workers = _workers(settings)
    with ThreadPoolExecutor(max(1, len(workers))) as threads:  # together: their flow runs get GRACE_S only once
        return any(list(threads.map(_stop, workers)))


def flow_runs_at_work(settings: Settings) -> set[str]:
    """Return the ids of the flow runs that our workers run on this machine at the moment."""
    found: set[str] = set()
    for pid in [pid for worker in _workers(settings) if (pid := worker.pid())]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found |= flow_runs_of(psutil.Process(pid).children(recursive=True))
    return found


def dead_workers(settings: Settings) -> set[str]:
    """Return the pools whose worker was started here, was not stopped, and is not there any more."""
    return {one.marker.removesuffix("-worker") for one in _workers(settings) if one.was_started() and not one.pid()}


def start_folder(deployment: Mapping[str, Any]) -> str | None:
    """Return the folder in which flow runs of a registered deployment start, None when it says none."""
    for step in deployment["pull_steps"] or []:
        if FOLDER_STEP in step:
            return str(step[FOLDER_STEP]["directory"])
    return None


def find_project(project: Path | None = None) -> Path:
    """Return the folder with `prefect.yaml`; raises DeployError naming where it was looked for."""
    folders = [project] if project else [Path.cwd(), Path(__file__).resolve().parent.parent]
    for folder in folders:
        if (folder / PROJECT_FILE).exists():
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise DeployError(f"no {PROJECT_FILE} in {looked}; run this in a checkout of brainloom or name its folder")


def _worker(settings: Settings, pool: str) -> Detached:
    name = "worker" if pool == settings.work_pool else f"worker-{pool}"
    return Detached(settings.server_dir, name, marker=f"{pool}-worker")


def _workers(settings: Settings) -> list[Detached]:
    """Return the workers of this state folder that were started and not stopped, whether they live or not."""
    if not settings.server_dir.exists():
        return []
    others = [path.stem.removeprefix("worker-") for path in sorted(settings.server_dir.glob("worker-*.pid"))]
    return [_worker(settings, pool) for pool in dict.fromkeys([settings.work_pool, *others])]


def _stop(worker: Detached) -> bool:
    with worker.lock():
        # Flow runs get GRACE_S to save; then its supervisor ends the worker and tells the server of them.
        return worker.stop(wait_s=GRACE_S + 50.0)


def _ensure_queues(info: ServerInfo, content: Mapping[str, Any]) -> None:
    """Make the queues that run one flow run at a time, in the pools that use them; an existing one stays as it is."""
    pools = [deployment["work_pool"] for deployment in content["deployments"]]
    for pool, name in sorted({(one["name"], one.get("work_queue_name", "")) for one in pools}):
        if name not in QUEUES:
            continue
        queue = {"name": name, "concurrency_limit": 1, "description": QUEUES[name]}
        try:
            request_json(f"{info.api_url}/work_pools/{pool}/queues", queue)
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it is there
                raise


def _live_server(settings: Settings) -> ServerInfo:
    info = server_status(settings)
    if info is None:
        raise ServerError("no Prefect server runs; start it with `brainloom up`")
    return info


def _ensure_pool(info: ServerInfo, pool: str, folder: Path, environment: dict[str, Any]) -> None:
    """Make a work pool of Prefect's process type unless it is there."""
    if _has_pool(info, pool):
        return
    try:
        _prefect(["work-pool", "create", pool, "--type", "process"], folder, environment)
    except DeployError:
        if not _has_pool(info, pool):  # else somebody has just made it, from another machine perhaps
            raise


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
