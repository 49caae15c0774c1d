"""Where Dask work runs: what to give to Prefect's `DaskTaskRunner`."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import dask

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


class ClusterError(RuntimeError):
    """The chosen cluster cannot be used on this machine."""


def configure_dask() -> None:
    """Set our Dask configuration in this process; nannies hand it to the workers that they start."""
    dask.config.set(DASK_CONFIG)


def cluster_options(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments of `DaskTaskRunner` for the chosen cluster, and configure Dask in this process.

    `cluster_class` and `address` are strings: a live cluster object cannot be serialised by Prefect. Raises
    ClusterError when the CUDA cluster is chosen but not installed.
    """
    configure_dask()
    if settings.cluster == "address":
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
    """Return how many workers a cluster on this host has: one per visible GPU for `cuda`, else as many as were set.

    Raises ClusterError when the CUDA cluster is chosen but not installed, or when no GPU is to be seen.
    """
    return _gpus() if settings.cluster == "cuda" else settings.workers


def worker_memory(settings: Settings) -> int:
    """Return the memory limit of one worker in bytes; raises ClusterError as `worker_count` does."""
    return settings.memory_per_worker(worker_count(settings))


def describe_cluster(settings: Settings) -> str:
    """Return one line that says where Dask work runs."""
    if settings.cluster == "address":
        return f"Dask scheduler at {settings.cluster_address}"
    count, memory = worker_count(settings), worker_memory(settings) / 2**30
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
