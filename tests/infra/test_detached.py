from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from infra.detached import Detached

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def process(tmp_path: Path) -> Detached:
    return Detached(tmp_path / "home", "thing", marker="thing-marker")


def _until_printed(process: Detached, text: str) -> str:
    while text not in (found := process.log.read_text()) or not found.endswith("\n"):
        assert process.pid() is not None, process.log_tail()
        os.sched_yield()
    return found


def _ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_stop_ends_the_process_and_the_sessions_of_its_children(process: Detached) -> None:
    pid = process.start([sys.executable, "-c", STUBBORN, "thing-marker"], os.environ)
    child = int(_until_printed(process, "child").split()[-1])
    assert process.pid() == pid
    assert os.getsid(pid) == pid
    assert process.stop(wait_s=0.5) is True
    assert _ended(child)
    assert _ended(pid)
    assert process.pid() is None
    assert process.stop() is False


@pytest.mark.parametrize("before", [None, 0o755])
def test_the_folder_is_for_its_owner_and_children_keep_the_umask(process: Detached, before: int | None) -> None:
    if before is not None:
        process.folder.mkdir(before)
    kept = os.umask(0o022)
    try:
        write = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
        output = process.folder.parent / "output"
        pid = process.start([sys.executable, "-c", write, str(output), "thing-marker"], os.environ)
    finally:
        os.umask(kept)
    psutil.Process(pid).wait(30)
    assert process.folder.stat().st_mode & 0o777 == 0o700
    assert output.stat().st_mode & 0o777 == 0o644


def test_one_that_was_killed_was_started_and_one_that_was_stopped_was_not(process: Detached) -> None:
    assert not process.was_started()
    pid = process.start([sys.executable, "-c", "import time; time.sleep(600)", "thing-marker"], os.environ)
    os.kill(pid, signal.SIGKILL)
    psutil.Process(pid).wait(30)
    assert (process.was_started(), process.pid()) == (True, None)
    process.stop()
    assert not process.was_started()


def test_another_process_with_the_recorded_pid_is_left_alone(process: Detached) -> None:
    process.folder.mkdir()
    (process.folder / "thing.pid").write_text(str(os.getpid()))
    assert process.pid() is None
    assert process.stop() is False


@pytest.mark.parametrize("content", ["", "not a pid", "999999999"])
def test_a_stale_or_broken_pid_file_means_not_running(process: Detached, content: str) -> None:
    process.folder.mkdir()
    (process.folder / "thing.pid").write_text(content)
    assert process.pid() is None


def test_a_process_that_ends_at_once_leaves_its_log(process: Detached) -> None:
    pid = process.start([sys.executable, "-c", "raise SystemExit('no luck')", "thing-marker"], os.environ)
    psutil.Process(pid).wait(30)
    assert process.pid() is None
    assert process.log_tail() == "no luck"


def test_a_living_child_is_never_taken_for_dead(tmp_path: Path) -> None:
    # It writes its own pid and becomes another program while we look; of 200 starts 22 were once misread.
    for number in range(30):
        process = Detached(tmp_path / str(number), "child", marker="child-marker")
        command = [sys.executable, "-S", "-c", "import time; time.sleep(60)", process.marker]
        process.start(command, dict(os.environ))
        seen = [process.pid() for _ in range(200)]
        process.stop()
        assert None not in seen
