from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import dask
import pytest

from infra.clusters import ClusterError, cluster_options, describe_cluster, worker_memory
from infra.settings import Settings


def test_local_options_are_plain_data_for_the_task_runner(tmp_path: Path) -> None:
    from prefect_dask import DaskTaskRunner

    options = cluster_options(Settings(state_dir=tmp_path, workers=3, worker_memory="1GiB"))
    assert json.loads(json.dumps(options)) == options
    assert options["cluster_kwargs"]["n_workers"] == 3
    assert options["cluster_kwargs"]["threads_per_worker"] == 1
    assert options["cluster_kwargs"]["memory_limit"] == 2**30
    assert DaskTaskRunner(**options).duplicate() == DaskTaskRunner(**options)


def test_dask_is_configured() -> None:
    cluster_options(Settings())
    assert dask.config.get("distributed.worker.daemon") is True
    assert dask.config.get("distributed.worker.memory.spill") is False
    assert dask.config.get("distributed.scheduler.allowed-failures") > 3
    assert dask.config.get("distributed.deploy.lost-worker-timeout") == "1h"
    assert dask.config.get("distributed.worker.preload") == ["infra.worker"]
    environment = dask.config.get("distributed.nanny.pre-spawn-environ")
    assert environment["MALLOC_TRIM_THRESHOLD_"] == str(1 << 30)
    assert environment["OMP_NUM_THREADS"] == 1  # Dask's own entries stay


def test_address_options() -> None:
    settings = Settings(cluster="address", cluster_address="tcp://10.0.0.5:8786")
    assert cluster_options(settings) == {"address": "tcp://10.0.0.5:8786"}
    assert describe_cluster(settings) == "Dask scheduler at tcp://10.0.0.5:8786"


def test_cuda_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(ClusterError, match=r"pip install 'brainloom\[cuda\]'.*BRAINLOOM_CLUSTER=local"):
        cluster_options(Settings(cluster="cuda"))


@pytest.fixture
def dask_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a stand-in for dask-cuda, which cannot be imported without a driver: two GPUs, workers like Dask's."""
    from distributed import LocalCluster

    package, utils = ModuleType("dask_cuda"), ModuleType("dask_cuda.utils")
    package.LocalCUDACluster = LocalCluster
    package.utils, utils.get_n_gpus = utils, lambda: 2
    monkeypatch.setitem(sys.modules, "dask_cuda", package)
    monkeypatch.setitem(sys.modules, "dask_cuda.utils", utils)
    return package


def test_cuda_has_a_worker_and_a_share_of_the_memory_per_gpu(dask_cuda: ModuleType, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, cluster="cuda", workers=7)
    options = cluster_options(settings)
    assert json.loads(json.dumps(options)) == options
    assert options["cluster_class"] == "dask_cuda.LocalCUDACluster"
    kwargs = options["cluster_kwargs"]
    assert (kwargs["n_workers"], kwargs["threads_per_worker"]) == (2, 1)
    assert kwargs["memory_limit"] == worker_memory(settings) == Settings(workers=2).memory_per_worker()
    assert kwargs["host"] == "127.0.0.1"
    assert describe_cluster(settings).startswith("local CUDA cluster, 2 workers with a GPU and ")
    dask_cuda.utils.get_n_gpus = lambda: 0
    with pytest.raises(ClusterError, match="needs a GPU, 0 are visible; see CUDA_VISIBLE_DEVICES"):
        cluster_options(settings)


def test_the_task_runner_starts_the_cuda_cluster(dask_cuda: ModuleType, tmp_path: Path) -> None:
    from prefect_dask import DaskTaskRunner

    settings = Settings(state_dir=tmp_path, cluster="cuda", worker_memory="1GiB")
    with DaskTaskRunner(**cluster_options(settings)) as runner:
        workers = runner.client.scheduler_info()["workers"].values()
        assert [worker["memory_limit"] for worker in workers] == [2**30] * 2


def test_description_of_the_local_cluster() -> None:
    line = describe_cluster(Settings(workers=2, worker_memory="3GiB"))
    assert line == "local cluster, 2 worker processes with 1 thread and 3.0 GiB each"


def test_a_local_cluster_starts_with_these_options_on_loopback(tmp_path: Path) -> None:
    from distributed import Client

    options = cluster_options(Settings(state_dir=tmp_path, workers=1, worker_memory="1GiB"))
    module, name = options["cluster_class"].rsplit(".", 1)
    with getattr(import_module(module), name)(**options["cluster_kwargs"]) as cluster, Client(cluster) as client:
        assert cluster.scheduler_address.startswith("tcp://127.0.0.1:")
        assert client.submit(dask.config.get, "distributed.worker.memory.spill").result(timeout=60) is False
        (worker,) = client.scheduler_info()["workers"].values()
        assert (worker["nthreads"], worker["memory_limit"]) == (1, 2**30)


def test_a_worker_process_leaves_right_after_its_exit_handlers() -> None:
    """Exit code 0 and the handlers' output, but no tear-down of the interpreter: the module's `__del__` never runs."""
    script = """
import atexit
from infra.worker import dask_setup
class Late:
    def __del__(self):
        print("torn down")
late = Late()
dask_setup(None)
atexit.register(print, "handler")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "handler\n", "")
