"""Two hosts, in network namespaces: one is cut off in the middle of a training, without a word to the other."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from network_hosts import Hosts, hosts
from training_phantoms import make_training, write_blobs
from training_processes import assert_close_on_fewer_ranks, done, losses, start_node
from waiting import until

from models.checkpoint import list_checkpoints
from models.metrics import read_metrics
from tasks.launch import launch

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
PORT = 29400
"""The test has its own network: no port is taken."""
STALL_S = 60
WAIT_S = 400


@pytest.fixture
def two() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


def test_a_training_on_two_hosts_goes_on_after_one_was_lost(two: Hosts, tmp_path: Path) -> None:
    """With as many ranks as before to the bit; with one rank on the host that is left, close and told."""
    url = str(tmp_path / "blobs.zarr")
    selection = write_blobs(url)
    alone, folder, fewer = tmp_path / "alone", tmp_path / "two", tmp_path / "fewer"
    for each in (alone, folder):
        make_training(each, url, selection, world_size=2, epochs=24)
    launch([alone], 2)

    nodes = start_nodes(two, folder)
    until(lambda: len(read_metrics(folder)) >= 8 or nodes[0].poll() is not None, "eight steps", WAIT_S)
    two.cut_off(1)
    assert [node.wait(WAIT_S) != 0 for node in nodes] == [True, True], "neither waits for ever"
    assert not (folder / "done.json").exists()
    assert list_checkpoints(folder)
    shutil.copytree(folder, fewer)

    two.connect(1)
    assert [node.wait(WAIT_S) for node in start_nodes(two, folder)] == [0, 0]
    assert done(folder)["weights_digest"] == done(alone)["weights_digest"]
    assert losses(folder) == losses(alone)

    launch([fewer], 1)
    assert_close_on_fewer_ranks(fewer, alone)


def start_nodes(two: Hosts, folder: Path) -> list[subprocess.Popen[bytes]]:
    endpoint = f"{two.address(0)}:{PORT}"
    return [start_node(folder, endpoint, node, two.address(node), STALL_S, two.on(node)) for node in range(2)]
