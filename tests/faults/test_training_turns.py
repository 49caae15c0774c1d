"""Two flow runs that train, on one host, with a real server: the second waits, also when the first is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from training_phantoms import write_blobs
from training_processes import done
from waiting import until

from infra.server import ServerInfo, request_json
from models.metrics import read_metrics

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
WAIT_S = 240
PROGRAM = """
import sys
from flows.pretrain import PretrainParams, pretrain
pretrain(PretrainParams(workspace=sys.argv[1], name=sys.argv[2], epochs=int(sys.argv[3]), ranks=1))
"""


def start(workspace: Path, name: str, epochs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(workspace), name, str(epochs)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def logged(server: ServerInfo, words: str) -> bool:
    found = request_json(f"{server.api_url}/logs/filter", {"sort": "TIMESTAMP_DESC", "limit": 200})
    return any(words in line["message"] for line in found)


def test_the_second_training_waits_and_starts_when_the_first_is_killed(
    prefect_server: ServerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLOOM_GPU_LEASE", str(tmp_path / "gpus"))
    write_blobs(str(tmp_path / "store.zarr"))
    trainings, by = tmp_path / "trainings", time.monotonic() + WAIT_S
    first = start(tmp_path, "first", 4000)
    second: subprocess.Popen[bytes] | None = None
    try:
        until(lambda: len(read_metrics(trainings / "first")) > 1, "the first trains", by - time.monotonic(), 0.2)
        second = start(tmp_path, "second", 1)
        waits = partial(logged, prefect_server, "waits for pretrain first")
        until(waits, "the second waits", by - time.monotonic(), 0.2)
        assert not read_metrics(trainings / "second")
        ranks = psutil.Process(first.pid).children(recursive=True)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert second.wait(WAIT_S) == 0
        assert done(trainings / "second")["step"] > 0
        assert logged(prefect_server, f"has the GPUs of {tmp_path / 'gpus'}, after pretrain first")
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
