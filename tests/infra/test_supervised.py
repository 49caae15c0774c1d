"""What a supervised command leaves behind is ended, and the command is started again until it is told to end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import until

from infra import supervised

WORKER = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
time.sleep(600)
"""
"""Starts a process in a session of its own, as Prefect's worker does with flow runs."""
SUPERVISE = "from infra.supervised import supervise; import sys; supervise(sys.argv[1:], first_wait_s=0.05)"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-S", "-c", WORKER, str(tmp_path / "pids")]
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, *command], stderr=subprocess.PIPE)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(30)


def starts(folder: Path) -> list[list[int]]:
    """Return the pids of each start: of the command and of its child."""
    text = (folder / "pids").read_text() if (folder / "pids").exists() else ""
    return [[int(pid) for pid in line.split()] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_command_is_started_again_and_its_orphans_end(
    supervisor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    ((first, orphan),) = until(lambda: starts(tmp_path), "first start")
    os.kill(first, signal.SIGKILL)
    until(lambda: len(starts(tmp_path)) == 2, "second start")
    assert gone(orphan), "it ended before the command began again"
    supervisor.terminate()
    assert supervisor.wait(30) == 0
    assert supervisor.stderr is not None
    said = supervisor.stderr.read().decode()
    wanted = r"the command ended with -9 after \d+ s, 1 processes of it were ended; again in 0\.05 s"
    assert re.search(wanted, said)
    assert all(gone(pid) for pids in starts(tmp_path) for pid in pids)


def test_flow_runs_that_could_not_tell_their_end_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"a": "RUNNING", "b": "COMPLETED", "c": "CANCELLING"}
    told: dict[str, str] = {}

    def answer(url: str, body: Any = None) -> Any:
        run = url.split("/")[4]
        if run == "filter":
            return [{"id": f"task of {body['flow_runs']['id']['any_'][0]}"}]
        if run == "away":
            raise ConnectionRefusedError
        if body:
            told[run] = body["state"]["type"]
        return {"state_type": states.get(run)}

    monkeypatch.setenv("PREFECT_API_URL", "http://api")
    monkeypatch.setattr(supervised, "request_json", answer)
    supervised.mark_crashed({*states, "away"})
    tasks = {f"task of {run}": "CRASHED" for run in states}
    assert told == {"a": "CRASHED", "c": "CANCELLED", **tasks}


def test_a_killed_supervisor_takes_the_command_with_it(supervisor: subprocess.Popen[bytes], tmp_path: Path) -> None:
    ((command, orphan),) = until(lambda: starts(tmp_path), "first start")
    supervisor.kill()
    supervisor.wait(30)
    until(lambda: gone(command), "the command ended")
    os.kill(orphan, signal.SIGKILL)  # Prefect's worker ends its flow runs when it is told to end; this one does not
