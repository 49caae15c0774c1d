"""Two nodes: two torchrun agents that meet on loopback train as one, and as one node with as many ranks.

Started by hand, and by launch `pool`: a flow run per node on two workers of one host.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from processes import words_of
from training_phantoms import make_training, write_blobs
from training_processes import done, losses, ranks, start_node

from infra.api import request_json
from infra.deploy import deploy
from infra.server import ServerInfo
from infra.settings import Settings, private_environment
from models.checkpoint import list_checkpoints
from models.heartbeat import read_beats
from models.metrics import read_metrics
from models.records import SelectedCase
from tasks.launch import launch

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
Blobs = tuple[str, list[SelectedCase]]
TIMEOUT_S = 150
TORCHRUN = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint"
"""As docs/training.md says, for the second node of a test."""


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    url = str(tmp_path_factory.mktemp("nodes") / "blobs.zarr")
    return url, write_blobs(url)


@pytest.fixture(scope="module")
def on_one_node(blobs: Blobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "a"
    make_training(folder, *blobs, world_size=2, epochs=12)
    launch([folder], 2)
    return folder


def start_nodes(folder: Path, by_hand: bool = False) -> list[subprocess.Popen[bytes]]:
    """Start both nodes; by_hand: the second one without our launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    first = start_node(folder, endpoint, 0)
    if not by_hand:
        return [first, start_node(folder, endpoint, 1)]
    plain = [*TORCHRUN.split(), endpoint, "--rdzv-id", "brainloom", "--local-addr", "127.0.0.1", "-m", "models.train"]
    command = [sys.executable, *plain, "--config", str(folder / "run.json")]
    return [first, subprocess.Popen(command, env={**os.environ, **private_environment()})]


def test_two_nodes_give_the_bits_of_one(blobs: Blobs, on_one_node: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=12)
    assert [node.wait(TIMEOUT_S) for node in start_nodes(folder, by_hand=True)] == [0, 0]
    assert done(folder)["weights_digest"] == done(on_one_node)["weights_digest"]
    assert losses(folder) == losses(on_one_node)
    assert {beat["rank"] for beat in read_beats(folder)} == {0, 1}


def test_a_node_that_dies_ends_the_other_and_both_continue(blobs: Blobs, on_one_node: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=12)
    nodes = start_nodes(folder)
    while len(read_metrics(folder)) < 5:
        with pytest.raises(subprocess.TimeoutExpired):
            nodes[0].wait(0.05)
    family = psutil.Process(nodes[1].pid).children(recursive=True)
    nodes[1].send_signal(signal.SIGKILL)
    assert nodes[0].wait(TIMEOUT_S) != 0
    nodes[1].wait(TIMEOUT_S)
    _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive
    assert not ranks()
    assert list_checkpoints(folder)
    assert (folder / "train-node1.log").exists()
    assert [node.wait(TIMEOUT_S) for node in start_nodes(folder)] == [0, 0]
    assert done(folder)["weights_digest"] == done(on_one_node)["weights_digest"]


NODE_DEPLOYMENT = {
    "name": "train-node",
    "entrypoint": "flows.train_node.train_node",
    "work_pool": {"name": "nodes"},
}


@pytest.fixture(scope="module")
def pool(prefect_server: ServerInfo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[psutil.Process]]:
    """Return two workers with one place each in the pool to which the deployment `train-node` goes."""
    project = tmp_path_factory.mktemp("project")
    (project / "prefect.yaml").write_text(yaml.safe_dump({"name": "nodes", "deployments": [NODE_DEPLOYMENT]}))
    assert deploy(Settings(api_url=prefect_server.api_url), project) == ["train-node/train-node"]
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "nodes", "--type", "process"]
    environment = {**os.environ, "BRAINLOOM_NODE_ADDRESS": "127.0.0.1", "PREFECT_WORKER_QUERY_SECONDS": "1"}
    workers = []
    with (project / "workers.log").open("ab") as log:
        for name in ("a", "b"):
            options = ["--limit", "1", "--name", f"node-{name}"]
            workers.append(subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log, cwd=project))
    try:
        yield [psutil.Process(worker.pid) for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
        _, left = psutil.wait_procs([psutil.Process(worker.pid) for worker in workers if worker.poll() is None], 60)
        for process in left:  # a worker that waits for the server it lost
            process.kill()


def in_pool(folder: Path, on_progress: Callable[[dict[str, Any]], None] | None = None, restarts: int = 0) -> None:
    """Launch two nodes from a flow run, as `pretrain` does."""
    from prefect import flow

    from flows.node_runs import launch_in_pool

    @flow(name="launches")
    def launches() -> None:
        launch_in_pool([folder], 2, on_progress, nodes=2, restarts=restarts)

    launches()


def node_runs(server: ServerInfo, folder: Path) -> list[str]:
    """Return the states of the flow runs of a training's nodes, as they began."""
    body = {"flow_runs": {"tags": {"all_": [f"training:{folder}"]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return [run["state_name"] for run in request_json(f"{server.api_url}/flow_runs/filter", body)]


def test_a_pool_gives_the_bits_of_one_node(
    pool: list[psutil.Process], prefect_server: ServerInfo, blobs: Blobs, on_one_node: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=12)
    seen: list[int] = []
    in_pool(folder, lambda line: seen.append(line["step"]))
    assert done(folder)["weights_digest"] == done(on_one_node)["weights_digest"]
    assert losses(folder) == losses(on_one_node)
    assert seen
    assert node_runs(prefect_server, folder) == ["Completed", "Completed"]
    assert {path.name for path in folder.glob("train*.log")} == {"train.log", "train-node1.log"}


def test_a_node_of_a_pool_that_dies_ends_the_other_and_all_begin_again(
    pool: list[psutil.Process], prefect_server: ServerInfo, blobs: Blobs, on_one_node: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=12)
    killed: list[int] = []

    def kill_a_node(line: dict[str, Any]) -> None:
        if not killed and line["step"] >= 3:
            flow_run = next(
                child for child in pool[1].children(recursive=True) if "prefect.engine" in " ".join(words_of(child))
            )
            killed.append(flow_run.pid)
            flow_run.kill()

    in_pool(folder, kill_a_node, restarts=1)
    assert killed
    assert done(folder)["weights_digest"] == done(on_one_node)["weights_digest"]
    states = node_runs(prefect_server, folder)
    assert sorted(states[2:]) == ["Completed", "Completed"]
    assert "Crashed" in states[:2]


def test_an_interrupted_launch_ends_the_nodes_of_the_pool(
    pool: list[psutil.Process], prefect_server: ServerInfo, blobs: Blobs, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    make_training(folder, *blobs, world_size=2, epochs=50)

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_pool(folder, interrupt)
    assert node_runs(prefect_server, folder) == ["Cancelled", "Cancelled"]
    assert not [
        child
        for worker in pool
        for child in worker.children(recursive=True)
        if "models.train" in " ".join(words_of(child))
    ]
    assert list_checkpoints(folder)
    assert not (folder / "done.json").exists()


def test_a_pool_without_the_deployment_says_what_to_register(
    prefect_server: ServerInfo, blobs: Blobs, tmp_path: Path
) -> None:
    from flows.node_runs import launch_in_pool
    from flows.start import FlowRunError

    make_training(tmp_path / "a", *blobs, world_size=2)
    with pytest.raises(FlowRunError, match=r"no deployment 'x/y' is registered .* once per node; register"):
        launch_in_pool([tmp_path / "a"], 2, nodes=2, deployment="x/y")
    with pytest.raises(ValueError, match="2 ranks cannot be dealt to 3 nodes"):
        launch_in_pool([tmp_path / "a"], 2, nodes=3)
