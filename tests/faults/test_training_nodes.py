"""Two nodes: two torchrun agents that meet on loopback train as one, and as one node with as many ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from training_phantoms import make_training, write_blobs
from training_processes import done, losses, ranks

from infra.settings import private_environment
from models.checkpoint import list_checkpoints
from models.heartbeat import read_beats
from models.metrics import read_metrics
from models.records import SelectedCase
from tasks.launch import launch

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
Blobs = tuple[str, list[SelectedCase]]
NODE = (
    "import sys\n"
    "from pathlib import Path\n"
    "from tasks.launch import Rendezvous, launch\n"
    "folder, endpoint, node = sys.argv[1:]\n"
    "meeting = Rendezvous(endpoint, nodes=2, node=int(node), local_addr='127.0.0.1')\n"
    "launch([Path(folder)], 2, restarts=0, rendezvous=meeting)\n"
)
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
    environment = {**os.environ, **private_environment()}
    launched = [["-c", NODE, str(folder), endpoint, str(node)] for node in range(2)]
    plain = [*TORCHRUN.split(), endpoint, "--rdzv-id", "brainloom", "--local-addr", "127.0.0.1", "-m", "models.train"]
    if by_hand:
        launched[1] = [*plain, "--config", str(folder / "run.json")]
    return [subprocess.Popen([sys.executable, *arguments], env=environment) for arguments in launched]


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
