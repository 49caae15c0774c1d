"""One training at a time on a group of GPUs: who waits, for whom, and until when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.gpu_turn import gpu_turn, lease_place, wait_for_lease
from infra.settings import Settings
from models.gpu_turn import need_gpus
from tasks.lease import HeldError, Lease

HOLDER = """
import sys, time
from tasks.lease import Lease
with Lease(sys.argv[1], "pretrain night-1"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BRAINLOOM_GPU_LEASE", str(tmp_path / "group"))
    return lease_place(Settings())


def is_free(place: str) -> bool:
    try:
        with Lease(place, "a look"):
            return True
    except HeldError:
        return False


def test_the_lease_is_held_from_the_first_need_to_the_end_and_shared_by_flow_runs_inside(place: str) -> None:
    with gpu_turn():
        assert is_free(place), "with nothing to compute nobody is kept waiting"
        need_gpus()
        with gpu_turn():
            need_gpus()
        assert not is_free(place)
    assert is_free(place)
    need_gpus()  # the ranks of a training have nobody to ask
    assert is_free(place)


def test_the_second_waits_and_says_for_whom_until_the_first_ends(place: str, caplog: pytest.LogCaptureFixture) -> None:
    first = Lease(place, "pretrain night-1 (here, pid 7)")
    first.__enter__()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            first.__exit__(None, None, None)

    with wait_for_lease(place, "evaluate night-1", sleep):
        assert len(waits) == 3
        assert not is_free(place)
    assert [record.message for record in caplog.records] == [
        f"waits for pretrain night-1 (here, pid 7): one training at a time uses the GPUs of {place}",
        f"has the GPUs of {place}, after pretrain night-1 (here, pid 7)",
    ]


def test_a_holder_killed_without_a_word_is_replaced(place: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, place], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()

        with wait_for_lease(place, "probe night-1", sleep):
            assert len(waits) == 1


def test_two_groups_do_not_wait_for_each_other(tmp_path: Path) -> None:
    assert lease_place(Settings(state_dir=tmp_path)) == str(tmp_path / "gpus")
    assert lease_place(Settings(gpu_lease="s3://mri/gpus-a")) == "s3://mri/gpus-a"
    with wait_for_lease(str(tmp_path / "a"), "one"), wait_for_lease(str(tmp_path / "b"), "two"):
        pass
