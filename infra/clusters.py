"""Where Dask work runs: what to give to Prefect's `DaskTaskRunner`."""

from __future__ import annotations

import importlib
import logging
import time
from contextlib import suppress
from typing import Any

import dask

from infra.remote_clusters import kubernetes_options, slurm_options
from infra.settings import Settings

WORKER_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""Environment of workers, read by glibc at their start. Dask's own value gives memory back to the system at each free
of 64 kB; the volumes of the next case then fault in page by page, 40 % of a worker's time (docs/speed.md). A worker
holds one case at a time and has its memory limit. glibc accepts no larger mmap threshold than 32 MiB."""
DASK_CONFIG: dict[str, Any] = {
    # Workers are daemons of their nanny: no worker outlives a killed flow run.
    "distributed.worker.daemon": True,
    # A case that kills its worker twice is quarantined by its attempt marker; a case batch may hold several of them,
    # and a whole batch must not be given up before each was tried twice.
    "distributed.scheduler.allowed-failures": 12,
    # A worker above 95 % of its limit is killed and restarted by its nanny instead of taking the machine down.
    "distributed.worker.memory.terminate": 0.95,
    # Voxels are patients' data and never spill into a scratch folder.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.comm.timeouts.connect": "30s",
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in WORKER_MALLOC.items()},
    "distributed.worker.preload": ["infra.worker"],
    # The cluster gives a worker up that is away 15 s after its death, although its nanny is restarting it: after a
    # second death within that time no worker would be left and the flow would wait for ever.
    "distributed.deploy.lost-worker-timeout": "1h",
}


REMOTE = {"slurm": slurm_options, "kubernetes": kubernetes_options}
"""Clusters whose workers a batch system or an operator starts."""
CONNECT_TIMEOUT_S = 10
"""How long the scheduler of cluster `address` may take to answer."""


WORKERLESS_SECONDS = 300.0
"""How long the scheduler may be without any worker before the flow fails instead of waiting."""


class ClusterError(RuntimeError):
    """The chosen cluster cannot be used."""


class ClusterLostError(ClusterError):
    """The Dask scheduler is gone, or has no worker any more, in the middle of the work."""


def worker_seen(client: Any, last: float, kept: str) -> float:
    """Return when a scheduler last had a worker, by time.monotonic(); last: when it was so before.

    Raises ClusterLostError when that is too long ago; kept: what the work has not lost, in words.
    """
    now = time.monotonic()
    # A scheduler that does not answer is told by the futures of its tasks.
    with suppress(OSError):
        if client.ncores():
            return now
    if now - last > WORKERLESS_SECONDS:
        raise ClusterLostError(
            f"no Dask worker for {now - last:.0f} s; {kept}. See why workers do not start (memory, BRAINLOOM_CLUSTER) "
            "and start the flow again"
        )
    return last


def configure_dask() -> None:
    """Set our Dask configuration in this process; nannies hand it to the workers that they start."""
    dask.config.set(DASK_CONFIG)


def cluster_options(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments of `DaskTaskRunner` for the chosen cluster, and configure Dask in this process.

    `cluster_class` and `address` are strings: a live cluster object cannot be serialised by Prefect. Raises
    ClusterError when the CUDA cluster is chosen but not installed, and as `workers_at` does; ExtraMissingError when
    the package of `slurm` or `kubernetes` is not installed.
    """
    configure_dask()
    if settings.cluster in REMOTE:
        return REMOTE[settings.cluster](settings, DASK_CONFIG)
    if settings.cluster == "address":
        workers_at(settings.cluster_address)
        return {"address": settings.cluster_address}
    shared: dict[str, Any] = {
        "threads_per_worker": 1,  # a case that kills its worker takes no neighbour with it
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "local_directory": str(settings.state_dir / "dask"),
        "silence_logs": logging.ERROR,
    }
    # Its nanny restarts a worker that comes near the limit.
    shared |= {"n_workers": worker_count(settings), "memory_limit": worker_memory(settings)}
    if settings.cluster == "cuda":
        return {"cluster_class": "dask_cuda.LocalCUDACluster", "cluster_kwargs": shared}
    return {"cluster_class": "distributed.LocalCluster", "cluster_kwargs": {"processes": True, **shared}}


def worker_count(settings: Settings) -> int:
    """Return how many workers the cluster has: one per visible GPU for `cuda`, else as many as were set.

    For `address` those that the scheduler knows now. Raises ClusterError when the CUDA cluster is chosen but not
    installed, when no GPU is to be seen, and as `workers_at` does.
    """
    if settings.cluster == "address":
        return len(workers_at(settings.cluster_address))
    return _gpus() if settings.cluster == "cuda" else settings.workers


def worker_memory(settings: Settings) -> int:
    """Return the memory limit of one worker in bytes, the smallest one where they differ.

    Raises ClusterError as `worker_count` does, and when a worker at an address has no limit and none was set.
    """
    if settings.cluster != "address":
        return settings.memory_per_worker(worker_count(settings))
    limits = {name: int(info["memory_limit"] or 0) for name, info in workers_at(settings.cluster_address).items()}
    own = [int(settings.worker_memory)] if settings.worker_memory else []
    if not own and 0 in limits.values():
        without = next(name for name, limit in limits.items() if not limit)
        raise ClusterError(
            f"worker {without} of the scheduler at {settings.cluster_address} has no memory limit, so nothing says "
            "which cases it can hold; start workers with --memory-limit, or set BRAINLOOM_WORKER_MEMORY"
        )
    return min(limit for limit in (*limits.values(), *own) if limit)


def workers_at(address: str) -> dict[str, dict[str, Any]]:
    """Return what a scheduler tells about its workers, by their address.

    Raises ClusterError when it does not answer, has no worker, or has one with more than one thread: a case that kills
    its worker takes the cases of its other threads with it, and memory is projected for one case a worker.
    """
    from distributed import Client  # only this cluster needs it before there is work

    try:
        with Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False) as client:
            workers = dict(client.scheduler_info(n_workers=-1)["workers"])
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"the Dask scheduler at {address} does not answer ({type(error).__name__}: {error}); start it, or correct "
            "BRAINLOOM_CLUSTER_ADDRESS"
        ) from None
    if not workers:
        raise ClusterError(f"the Dask scheduler at {address} has no workers; start workers with --nthreads 1")
    if threaded := [name for name, info in workers.items() if info["nthreads"] > 1]:
        raise ClusterError(
            f"{len(threaded)} of {len(workers)} workers of the Dask scheduler at {address} have more than one thread "
            f"({threaded[0]} has {workers[threaded[0]]['nthreads']}), one is allowed: a case that kills its worker "
            "must take no other with it; start workers with --nthreads 1"
        )
    return workers


def describe_cluster(settings: Settings) -> str:
    """Return one line that says where Dask work runs."""
    count, memory = worker_count(settings), worker_memory(settings) / 2**30
    if settings.cluster == "address":
        return f"Dask scheduler at {settings.cluster_address}, {count} workers of {memory:.1f} GiB each"
    if settings.cluster in REMOTE:
        return f"{settings.cluster} cluster, {count} workers with 1 thread and {memory:.1f} GiB each"
    if settings.cluster == "cuda":
        return f"local CUDA cluster, {count} workers with a GPU and {memory:.1f} GiB each"
    return f"local cluster, {count} worker processes with 1 thread and {memory:.1f} GiB each"


def _gpus() -> int:
    """Return the number of GPUs that dask-cuda sees, `CUDA_VISIBLE_DEVICES` respected."""
    try:
        count = int(importlib.import_module("dask_cuda.utils").get_n_gpus())
    except Exception as error:  # without a driver its imports fail in many ways
        raise ClusterError(
            "cluster 'cuda' needs the extra 'cuda' (pip install 'brainloom[cuda]') and an NVIDIA driver; "
            f"dask_cuda failed with {type(error).__name__}: {error}. Use BRAINLOOM_CLUSTER=local otherwise"
        ) from error
    if count < 1:
        raise ClusterError(
            f"cluster 'cuda' needs a GPU, {count} are visible; see CUDA_VISIBLE_DEVICES, or use BRAINLOOM_CLUSTER=local"
        )
    return count
