from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import dask
import pytest
from distributed import LocalCluster, Scheduler, SpecCluster, Worker

from flows.preprocess_params import memory_limit
from infra import clusters
from infra.clusters import ClusterError, cluster_options, describe_cluster, worker_count, worker_memory
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


GIB = 2**30


@contextmanager
def scheduler(*workers: tuple[int, int | None]) -> Iterator[Settings]:
    """Run a scheduler on loopback with workers of (threads, memory limit) in this process; gives settings with it."""
    # Our preload would end this process without its exit handlers' rest.
    options = {"dashboard": False, "host": "127.0.0.1", "preload": []}
    specs = {
        number: {"cls": Worker, "options": {**options, "nthreads": threads, "memory_limit": limit}}
        for number, (threads, limit) in enumerate(workers)
    }
    with SpecCluster(workers=specs, scheduler={"cls": Scheduler, "options": options}, silence_logs=True) as cluster:
        yield Settings(cluster="address", cluster_address=cluster.scheduler_address)


def test_an_address_has_the_workers_of_its_scheduler_and_their_smallest_limit() -> None:
    with scheduler((1, 3 * GIB), (1, 2 * GIB), (1, 4 * GIB)) as settings:
        assert cluster_options(settings) == {"address": settings.cluster_address}
        assert (worker_count(settings), worker_memory(settings)) == (3, 2 * GIB)
        assert memory_limit(settings) == 2 * GIB
        assert describe_cluster(settings) == f"Dask scheduler at {settings.cluster_address}, 3 workers of 2.0 GiB each"
        stricter = settings.model_copy(update={"worker_memory": GIB})
        assert worker_memory(stricter) == GIB


def test_a_local_cluster_by_its_address_must_have_workers_with_one_thread() -> None:
    here = {"processes": False, "protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=2, threads_per_worker=2, preload=[], **here) as cluster:
        settings = Settings(cluster="address", cluster_address=cluster.scheduler_address)
        text = r"2 of 2 workers of .* have more than one thread \(.* has 2\), one is allowed.*start .* --nthreads 1"
        for ask in (cluster_options, worker_count, worker_memory):
            with pytest.raises(ClusterError, match=text):
                ask(settings)


def test_workers_without_a_limit_need_one_from_the_settings() -> None:
    with scheduler((1, None), (1, 2 * GIB)) as settings:
        with pytest.raises(ClusterError, match=r"has no memory limit, .* --memory-limit, or set BRAINLOOM_WORKER_MEMO"):
            worker_memory(settings)
        assert worker_memory(settings.model_copy(update={"worker_memory": 3 * GIB})) == 2 * GIB


def test_a_scheduler_without_workers_or_none_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        scheduler() as settings,
        pytest.raises(ClusterError, match=r"has no workers; start workers with --nthreads 1"),
    ):
        cluster_options(settings)
    monkeypatch.setattr(clusters, "CONNECT_TIMEOUT_S", 0.3)
    nowhere = Settings(cluster="address", cluster_address="tcp://127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"tcp://127\.0\.0\.1:1 does not answer .*; start it, or correct B"):
        cluster_options(nowhere)


def test_cuda_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(ClusterError, match=r"pip install 'brainloom\[cuda\]'.*BRAINLOOM_CLUSTER=local"):
        cluster_options(Settings(cluster="cuda"))


@pytest.fixture
def dask_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a stand-in for dask-cuda, which cannot be imported without a driver: two GPUs, workers like Dask's."""
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
