"""Dask on other machines: jobs of SLURM (dask-jobqueue) and pods of Kubernetes (dask-kubernetes' operator).

Neither was run where this was written: there is no SLURM and no Kubernetes. What is checked is the job script and the
specification that the two packages make of these options (docs/clusters.md).
"""

from __future__ import annotations

import importlib
import shlex
import uuid
from types import ModuleType
from typing import Any

from infra.environments import public_storage_environment
from infra.settings import Settings, private_environment

WORKER_USER = 10001
"""Of our images (infra/docker/Dockerfile)."""
NANNY_BYTES = 512 * 2**20
"""What a pod may use above the limit of its worker: the nanny, which restarts the worker, must outlive it."""


class ExtraMissingError(ImportError):
    """A cluster was chosen whose package is not installed."""


def dask_environment(config: dict[str, Any]) -> dict[str, str]:
    """Return Dask's configuration as environment variables, for workers that this process does not start.

    What stands under `pre-spawn-environ` becomes variables of those names: Dask's own names have small letters only.
    """
    marker = ".pre-spawn-environ."
    named = {key.partition(marker)[2]: value for key, value in config.items() if marker in key}
    dask = {_variable(key): value for key, value in config.items() if marker not in key}
    return {name: str(value) for name, value in {**dask, **named}.items()}


def _variable(key: str) -> str:
    return "DASK_" + key.replace(".", "__").replace("-", "_").upper()


def worker_variables(settings: Settings, config: dict[str, Any]) -> dict[str, str]:
    """Return what a worker on another machine has in its environment, without any secret."""
    threads = {"OMP_NUM_THREADS": "1"}
    return {**private_environment(), **dask_environment(config), **threads, **public_storage_environment(settings)}


def slurm_options(settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `DaskTaskRunner` for a job of SLURM per worker, each with one thread.

    Scheduler and jobs talk over TLS with certificates made for this cluster, in files below `state_dir`, which all
    nodes must see. sbatch hands the environment of the flow on to the jobs: secrets are there, not in the script.
    Raises ExtraMissingError.
    """
    _import("dask_jobqueue", "slurm")
    folder = settings.state_dir / "dask"
    folder.mkdir(parents=True, exist_ok=True)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in worker_variables(settings, config).items()]
    return {
        "cluster_class": "dask_jobqueue.SLURMCluster",
        "cluster_kwargs": {
            "n_workers": settings.workers,
            "cores": 1,
            "processes": 1,
            "memory": f"{int(settings.worker_memory or 0)}B",
            "walltime": settings.slurm_time,
            "queue": settings.slurm_partition or None,
            "account": settings.slurm_account or None,
            "interface": settings.slurm_interface or None,
            "job_name": "brainloom-dask",
            "job_extra_directives": list(settings.slurm_options),
            "job_script_prologue": [*exports, *settings.slurm_setup],
            "local_directory": str(folder),
            "log_directory": str(folder),
            "protocol": "tls://",
            "security": True,
            "shared_temp_directory": str(folder),
            "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
        },
    }


def kubernetes_options(settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `DaskTaskRunner` for a cluster that dask-kubernetes' operator starts.

    Raises ExtraMissingError.
    """
    return {
        "cluster_class": "dask_kubernetes.operator.KubeCluster",
        "cluster_kwargs": {
            "namespace": settings.kubernetes_namespace,
            "n_workers": settings.workers,
            "custom_cluster_spec": kubernetes_spec(settings, config, f"brainloom-{uuid.uuid4().hex[:8]}"),
            "quiet": True,
        },
    }


def kubernetes_spec(settings: Settings, config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the DaskCluster resource: dask-kubernetes' own, with our commands, limits, environment and user."""
    operator = _import("dask_kubernetes.operator", "kubernetes")
    memory = int(settings.worker_memory or 0)
    # The packages' default commands dask-worker and dask-scheduler are gone from distributed.
    worker = ["dask", "worker", "--nthreads", "1", "--memory-limit", str(memory)]
    spec = operator.make_cluster_spec(
        name,
        image=settings.kubernetes_image,
        n_workers=settings.workers,
        env=[{"name": key, "value": value} for key, value in _pod_variables(settings, config).items()],
        worker_command=worker,
        resources={"requests": {"cpu": "1", "memory": str(memory)}, "limits": {"memory": str(memory + NANNY_BYTES)}},
    )
    scheduler = spec["spec"]["scheduler"]["spec"]
    scheduler["containers"][0]["args"] = ["dask", "scheduler", "--host", "0.0.0.0"]  # noqa: S104 - its own pod
    for pod in (scheduler, spec["spec"]["worker"]["spec"]):
        _harden(pod, settings)
    return dict(spec)


def _pod_variables(settings: Settings, config: dict[str, Any]) -> dict[str, str]:
    return {**worker_variables(settings, config), "BRAINLOOM_STATE_DIR": str(settings.state_dir)}


def _harden(pod: dict[str, Any], settings: Settings) -> None:
    """Let a pod run unprivileged, with the secret's environment and the claim's volume."""
    pod["securityContext"] = {"runAsNonRoot": True, "runAsUser": WORKER_USER, "fsGroup": WORKER_USER}
    pod["automountServiceAccountToken"] = False
    container = pod["containers"][0]
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if settings.kubernetes_secret:
        container["envFrom"] = [{"secretRef": {"name": settings.kubernetes_secret}}]
    if settings.kubernetes_claim:
        pod["volumes"] = [{"name": "work", "persistentVolumeClaim": {"claimName": settings.kubernetes_claim}}]
        container["volumeMounts"] = [{"name": "work", "mountPath": str(settings.state_dir)}]


def _import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtraMissingError(
            f"cluster {extra!r} needs the extra {extra!r} (pip install 'brainloom[{extra}]'): {error}. "
            "Use BRAINLOOM_CLUSTER=local otherwise"
        ) from error
