"""Where the nodes of one training meet: node 0 says it in a file on the disk that all of them share."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

from infra.storage import write_json
from tasks.launch import Rendezvous, TrainingFailed

FOLDER = "meeting"
POLL_SECONDS = 0.5


def meet(
    folder: Path, run_id: str, *, nodes: int, node: int, address: str = "", wait_seconds: float = 600.0
) -> Rendezvous:
    """Return the rendezvous of a node; node 0 takes a free port of its address, the others wait until it said which.

    folder: of the training, on a disk that all nodes share. run_id: another one for each attempt. address: of this
    host for the others; empty: its host name. Raises TrainingFailed when node 0 says nothing for `wait_seconds`.
    """
    path, here = folder / FOLDER / f"{run_id}.json", address or socket.gethostname()
    if node == 0:
        path.parent.mkdir(exist_ok=True)
        endpoint = f"{here}:{_free_port()}"
        write_json(path, {"endpoint": endpoint})
    else:
        endpoint = _awaited(path, nodes, node, wait_seconds)
    return Rendezvous(endpoint, nodes, node, run_id, local_addr=here, is_host=node == 0)


def _awaited(path: Path, nodes: int, node: int, wait_seconds: float) -> str:
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        if path.exists():
            return str(json.loads(path.read_text(encoding="utf-8"))["endpoint"])
        time.sleep(POLL_SECONDS)
    raise TrainingFailed(
        f"node {node} of {nodes} waited {wait_seconds:g} s for node 0, which did not write {path}; the work pool needs "
        "a free place for every node at once, and all nodes must see that folder"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
