"""`brainloom up` in the folder of a test: server, deployments and a worker, whose flow runs are watched and ended."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from api_states import ask, wait_for_state
from demo_runs import run
from waiting import until

from infra.server import ServerInfo, server_status
from infra.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
GONE_WITHIN_S = 30.0
"""After a flow run was cancelled none of its processes may live."""


@contextmanager
def deployed(folder: Path, **settings: str) -> Iterator[ServerInfo]:
    """Give a server with our deployments and a worker; flow runs start in the folder, state is in `state` below it."""
    shutil.copy(ROOT / "prefect.yaml", folder)
    try:
        up = run("up", state_dir=folder / "state", **settings)
        assert up.returncode == 0, up.stdout + up.stderr
        info = server_status(Settings(state_dir=folder / "state"))
        assert info is not None
        yield info
    finally:
        run("down", state_dir=folder / "state", **settings)


def worker_log(folder: Path) -> str:
    """Return the end of what the worker wrote."""
    return (folder / "state/server/worker.log").read_text(errors="replace")[-4000:]


def processes_of(flow_run: str) -> list[psutil.Process]:
    """Return all processes of a flow run: its own, Dask workers, ranks."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run:
                found.append(process)
    return found


def cancel(api_url: str, flow_run: str) -> dict[str, Any]:
    """Cancel a flow run as the UI does, wait until all its processes are gone, and return its state."""
    processes = processes_of(flow_run)
    assert len(processes) > 1, "it is at work"
    ask(api_url, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: not processes_of(flow_run), f"the processes of {flow_run} ended", GONE_WITHIN_S, poll_s=0.5)
    return wait_for_state(api_url, flow_run, "Cancelled")
