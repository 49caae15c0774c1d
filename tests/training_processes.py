"""The processes of a launched training and what it leaves, for tests that disturb it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.settings import private_environment
from models.metrics import read_metrics

NODE = (
    "import sys\n"
    "from pathlib import Path\n"
    "from tasks.launch import Rendezvous, launch\n"
    "folder, endpoint, node, address, stall = sys.argv[1:]\n"
    # On one host each node may be that of the endpoint: who comes first.
    "host = None if address == '127.0.0.1' else node == '0'\n"
    "meeting = Rendezvous(endpoint, nodes=2, node=int(node), local_addr=address, is_host=host)\n"
    "launch([Path(folder)], 2, restarts=0, stall_seconds=float(stall), rendezvous=meeting)\n"
)


def start_node(
    folder: Path,
    endpoint: str,
    node: int,
    address: str = "127.0.0.1",
    stall_seconds: float = 600,
    on: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start the launcher of one of two nodes with a rank each; on: words before the command."""
    words = [str(folder), endpoint, str(node), address, str(stall_seconds)]
    return subprocess.Popen([*on, sys.executable, "-c", NODE, *words], env={**os.environ, **private_environment()})


def done(folder: Path) -> dict[str, Any]:
    """Return done.json."""
    return json.loads((folder / "done.json").read_text())


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return step and losses of every train line."""
    return [(line["step"], line["losses"]) for line in read_metrics(folder) if line["kind"] == "train"]


def ranks(of: psutil.Process | None = None) -> dict[str, psutil.Process]:
    """Return the running ranks below a process by their number; `agent` is torchrun's own process."""
    found = {}
    for process in (of or psutil.Process()).children(recursive=True):
        try:
            environment, command = process.environ(), process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "models.train" in command:
            found[environment.get("RANK", "agent")] = process
    return found


def killer(rank: str, step: int, number: int = signal.SIGKILL) -> Any:
    """Return an on_progress that sends a signal to a rank once, when a line of a step (or a later one) comes.

    Lines that an earlier launch left are handed on before there are ranks; they are passed over.
    """
    killed: list[int] = []

    def on_progress(line: dict[str, Any]) -> None:
        if not killed and line["step"] >= step and rank in (found := ranks()):
            killed.append(found[rank].pid)
            os.kill(killed[0], number)

    return on_progress


def assert_close_on_fewer_ranks(folder: Path, whole: Path) -> None:
    """Check that a training that began on two ranks and ended on one says so, and stayed close to the undisturbed one.

    Another rank has other batch statistics and other negatives (docs/training.md); the reconstruction stays within a
    tenth.
    """
    assert done(folder)["world_sizes"] == [2, 1]
    assert "2 then 1: the number changed on resume" in (folder / "model_card.md").read_text()
    ours, theirs = dict(losses(folder)), dict(losses(whole))
    assert ours.keys() == theirs.keys()
    for step in ours:
        assert ours[step]["loss_reconstruction"] == pytest.approx(theirs[step]["loss_reconstruction"], rel=0.1)
