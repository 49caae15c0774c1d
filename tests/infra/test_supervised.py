"""What a supervised command leaves behind is ended, and the command is started again until it is told to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
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
HASTY = """
import os, signal, subprocess, sys, time
saving = "import signal, sys, time\\n"
saving += "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w').close(), sys.exit(143)))\\n"
saving += "print(flush=True)\\ntime.sleep(600)"
command = [sys.executable, "-S", "-c", saving, sys.argv[1] + ".saved"]
given = {**os.environ, "PREFECT__FLOW_RUN_ID": "a"}
child = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit(0)))
child.stdout.readline()
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
time.sleep(600)
"""
"""Kills its flow run, which would save something, as soon as it is told to end, as Prefect's worker does."""
SUPERVISE = "from infra.supervised import supervise; import sys; supervise(sys.argv[1:], first_wait_s=0.05)"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-S", "-c", WORKER, str(tmp_path / "pids")]
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, *command], stderr=subprocess.PIPE)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(30)


@pytest.fixture
def api() -> Iterator[tuple[str, list[Any]]]:
    """Give the address of a pretended server, for which every flow run is Running, and the states that it is told."""
    told: list[Any] = []

    class Pretended(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"state_type": "RUNNING"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/set_state"):
                told.append((self.path, body["state"]))
            self.answer([])

        def answer(self, what: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(what).encode())

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Pretended) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/api", told
        httpd.shutdown()


def test_flow_runs_save_before_a_command_that_would_kill_them_is_told_to_end(
    tmp_path: Path, api: tuple[str, list[Any]]
) -> None:
    url, told = api
    command = [sys.executable, "-c", SUPERVISE, sys.executable, "-S", "-c", HASTY, str(tmp_path / "pids")]
    process = subprocess.Popen(command, env={**os.environ, "PREFECT_API_URL": url})
    ((hasty, flow_run),) = until(lambda: starts(tmp_path), "first start")
    process.terminate()
    assert process.wait(30) == 0
    assert (tmp_path / "pids.saved").exists()
    assert gone(flow_run)
    assert gone(hasty)
    assert told == [("/api/flow_runs/a/set_state", {"type": "CRASHED", "message": supervised.STOPPED})]


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
