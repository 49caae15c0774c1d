"""Launching: isolation, following, reasons of failure, and no process left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra.settings import private_environment
from tasks import launch as launching
from tasks.follow import Vital, log_tail
from tasks.launch import (
    Rendezvous,
    TrainingFailed,
    launch,
    network_environment,
    run_tied,
    training_command,
    training_environment,
)


def training_folder(tmp_path: Path, name: str = "a", threads: int = 1) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"threads": threads}))
    return folder


def tied(tmp_path: Path, code: str, **options: object) -> int:
    values = {"poll": lambda: False, "stall_seconds": 60.0} | options
    environment = {**os.environ, **private_environment()}
    command = [sys.executable, "-c", code]
    return run_tied(command, log_file=tmp_path / "log", cwd=tmp_path, environment=environment, **values)


def test_one_rank_runs_without_torchrun_and_more_run_standalone(tmp_path: Path) -> None:
    one = training_command([tmp_path / "a", tmp_path / "b"], 1)
    assert one[1:3] == ["-m", "models.train"]
    assert [part for part in one if part.endswith("run.json")] == [
        str(tmp_path / "a" / "run.json"),
        str(tmp_path / "b" / "run.json"),
    ]
    two = training_command([tmp_path / "a"], 2)
    assert two[1:6] == ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    assert two[6:10] == ["--nproc-per-node", "2", "-m", "models.train"]


def test_nodes_meet_at_a_rendezvous_and_share_the_ranks(tmp_path: Path) -> None:
    meeting = Rendezvous("10.0.0.5:29400", nodes=2, node=1, run_id="night", local_addr="10.0.0.6")
    command = training_command([tmp_path / "a"], 4, rendezvous=meeting)
    text = " ".join(command)
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.5:29400 --rdzv-id night" in text
    assert "--local-addr 10.0.0.6 --nproc-per-node 2 -m models.train" in text
    assert "--standalone" not in text
    with pytest.raises(ValueError, match="3 ranks cannot be dealt to 2 nodes; the nodes must divide the ranks"):
        training_command([tmp_path / "a"], 3, rendezvous=meeting)


def test_ranks_talk_over_the_interface_that_has_the_address_of_their_node() -> None:
    here = Rendezvous("10.0.0.5:29400", nodes=2, node=0, local_addr="127.0.0.1")
    assert network_environment(here) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    for nowhere in ("", "192.0.2.1", "no such name"):  # an address for documents, which no host has
        assert network_environment(replace(here, local_addr=nowhere)) == {}
    assert network_environment(None) == {}


def test_the_environment_is_private_isolated_and_has_no_rank() -> None:
    environment = training_environment(3, {"PATH": "p", "RANK": "1", "WORLD_SIZE": "2"})
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "RANK" not in environment
    assert environment["PATH"] == "p"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == str(1 << 40)
    assert training_environment(1, {"MALLOC_TRIM_THRESHOLD_": "7"})["MALLOC_TRIM_THRESHOLD_"] == "7", "users decide"
    assert environment["DO_NOT_TRACK"] == "1"


def test_a_foreign_models_folder_in_the_working_directory_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('foreign models')")
    folder = training_folder(tmp_path)
    with pytest.raises(TrainingFailed, match="TrainingConfig") as failure:
        launch([folder], 1, restarts=0)
    assert "foreign models" not in str(failure.value)


def test_a_failure_of_its_own_is_not_tried_again_and_names_the_log(tmp_path: Path) -> None:
    folder = training_folder(tmp_path)
    with pytest.raises(
        TrainingFailed, match=r"(?s)training failed \(a\): a: ValidationError: .*Its traceback is in .*train\.log$"
    ) as failure:
        launch([folder], 1, restarts=3)
    assert "launching it again continues from the newest" in str(failure.value)
    assert (folder / "train.log").read_text().count("Traceback") == 1


def test_a_folder_without_a_config_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no run\.json; write the config before launching"):
        launch([tmp_path], 1)


def test_output_goes_to_the_log_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    assert tied(tmp_path, "import sys; print('hello'); sys.exit(7)") == 7
    assert log_tail(tmp_path / "log") == "hello"
    assert tied(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == -9
    assert log_tail(tmp_path / "nothing") == "(no log)"


def test_a_killed_training_is_continued_as_often_as_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = training_folder(tmp_path)
    codes = [-9, -9, 0]
    monkeypatch.setattr(launching, "run_tied", lambda *_, **__: codes.pop(0))
    with pytest.raises(TrainingFailed, match="killed by signal 9"):
        launch([folder], 1, restarts=1)
    codes[:] = [-9, 0]
    launch([folder], 1, restarts=1)
    assert not codes


def test_a_training_that_was_told_to_stop_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [143, 0]
    monkeypatch.setattr(launching, "run_tied", lambda *_, **__: codes.pop(0))
    with pytest.raises(TrainingFailed, match="exit code 143"):
        launch([training_folder(tmp_path)], 1, restarts=1)
    assert codes == [0]


def test_no_progress_ends_everything_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], start_new_session=True)\n"
        "open('child', 'w').write(str(child.pid))\n"
        "signal.pause()\n"
    )
    with pytest.raises(TrainingFailed, match=r"no progress for 1\.5 s: neither a metrics line nor a line in"):
        tied(tmp_path, code, stall_seconds=1.5)
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


HANGING = (
    "import faulthandler, signal, sys\n"
    "from pathlib import Path\n"
    "from models.heartbeat import beat, beating\n"
    "faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=False)\n"
    "def stuck_in_a_phase():\n"
    "    signal.pause()\n"
    "with beating(Path('a'), 3):\n"
    "    beat('validating batch 2 of 9', 40)\n"
    "    stuck_in_a_phase()\n"
)


def test_a_hanging_rank_is_named_with_its_phase_and_its_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GRACE_SECONDS", 5)
    vital = Vital([training_folder(tmp_path)])
    with pytest.raises(TrainingFailed) as failure:
        tied(tmp_path, HANGING, poll=vital.poll, diagnose=vital.diagnose, stall_seconds=2.0)
    text = str(failure.value)
    assert re.search(r"last sign of life of rank 3: validating batch 2 of 9 in step 40, \d+ s ago; the ranks", text)
    assert "in stuck_in_a_phase" in text, "the log's end has the stack"


def test_a_long_phase_that_beats_is_no_stall(tmp_path: Path) -> None:
    code = (
        "import select\n"
        "from pathlib import Path\n"
        "from models.heartbeat import beat, beating\n"
        "with beating(Path('a'), 0):\n"
        "    for number in range(8):\n"
        "        beat(f'predicting test case {number}')\n"
        "        select.select([], [], [], 0.4)\n"
    )
    vital = Vital([training_folder(tmp_path)])
    assert tied(tmp_path, code, poll=vital.poll, diagnose=vital.diagnose, stall_seconds=2.0) == 0


def test_an_interrupt_stops_the_child_before_it_is_raised_again(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('checkpoint'), sys.exit(143)))\n"
        "print(os.getpid(), flush=True)\n"
        "signal.pause()\n"
    )

    def poll() -> bool:
        if (tmp_path / "log").read_text().endswith("\n"):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        tied(tmp_path, code, poll=poll)
    pid, said = (tmp_path / "log").read_text().split()
    assert said == "checkpoint"
    assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_dies_with_the_launcher_however_that_dies(tmp_path: Path, number: signal.Signals) -> None:
    child = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tasks.launch import run_tied\n"
        f"run_tied([sys.executable, '-c', {child!r}], log_file=Path('log'), cwd=Path('.'), environment=os.environ,"
        " poll=lambda: False, stall_seconds=60)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **private_environment()})
    pid = wait_for_text(tmp_path / "log", launcher)
    process = psutil.Process(int(pid))
    launcher.send_signal(number)
    launcher.wait(30)
    _, alive = psutil.wait_procs([process], timeout=30)
    assert not alive


def wait_for_text(path: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the file's text as soon as there is a whole line; fails when the process ends before."""
    while not (path.exists() and path.read_text().endswith("\n")):
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the launcher ended with {process.returncode}")
    return path.read_text()
