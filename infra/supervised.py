"""Keeps a command running: `python -m infra.supervised <name> <command...>` starts it again whenever it ends.

Prefect's worker ends on some errors, and anything may be killed. Flow runs are processes in sessions of their own: when
their worker dies they would go on without anybody who can cancel them or read their output. They become children of
this process then, and are ended before the command is started again; those that had no time to tell the server so are
marked Crashed.

SIGTERM ends the command, which gets time to end what it started, and then this process. When this process is killed,
the system sends SIGTERM to the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from infra.api import FINAL_STATES, request_json
from infra.detached import wait_ended

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Before the command is started again: doubled each time, unless it ran for longer than the longest of them."""
GRACE_S = 40.0
"""Between SIGTERM and SIGKILL; a flow run gets 30 s to end its ranks and to save."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Variable that Prefect 3.8.8 sets for the process of a flow run; all that it starts has it, too."""
LEFT = "Prefect's worker died, and its flow runs were ended: nobody could cancel them any more. Start it again"
_LIBC = ctypes.CDLL(None)


def supervise(command: Sequence[str], first_wait_s: float = FIRST_WAIT_S) -> None:
    """Run a command again and again until SIGTERM or SIGINT; what it leaves behind is ended in between."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    wait_s = first_wait_s
    while True:
        began = time.monotonic()
        code = _run(command)
        if code is None:
            return
        lived_s = time.monotonic() - began
        left, runs = end_children()
        mark_crashed(runs)
        wait_s = first_wait_s if lived_s > LONGEST_WAIT_S else wait_s
        _say(f"the command ended with {code} after {lived_s:.0f} s, {left} processes of it were ended; again", wait_s)
        if _told_within(wait_s):
            return
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def end_children() -> tuple[int, set[str]]:
    """End all processes below this one: SIGTERM, time to save, SIGKILL; return their number and their flow runs.

    Only our own children get SIGTERM, for they know in which order to end theirs.
    """
    own = psutil.Process()
    children = own.children()
    family = wait_ended(own.children(recursive=True), 0)
    runs = {run for process in family if (run := _flow_run(process))}
    for child in children:
        _send(child, signal.SIGTERM)
    for process in wait_ended(family, GRACE_S):
        _send(process, signal.SIGKILL)
    wait_ended(family, GRACE_S)
    _reap()
    return len(family), runs


def mark_crashed(runs: set[str]) -> None:
    """Tell the server of PREFECT_API_URL about flow runs that have ended, and their task runs, unless they did it.

    A server that does not answer has its automation for flow runs without a heartbeat.
    """
    api_url = os.environ.get("PREFECT_API_URL", "")
    unfinished = {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}
    crashed = {"type": "CRASHED", "message": LEFT}
    for run in sorted(runs):
        try:
            kind = request_json(f"{api_url}/flow_runs/{run}")["state_type"]
            if kind not in FINAL_STATES:
                state = {**crashed, "type": "CANCELLED"} if kind == "CANCELLING" else crashed
                request_json(f"{api_url}/flow_runs/{run}/set_state", {"state": state, "force": True})
            asked = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": unfinished}
            for task in request_json(f"{api_url}/task_runs/filter", asked):
                request_json(f"{api_url}/task_runs/{task['id']}/set_state", {"state": crashed, "force": True})
        except (OSError, ValueError) as error:
            print(f"the server was not told that flow run {run} has ended: {error}", file=sys.stderr, flush=True)


def _flow_run(process: psutil.Process) -> str:
    """Return the flow run that a process belongs to, empty when to none."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get(FLOW_RUN, "")
    return ""


def _run(command: Sequence[str]) -> int | None:
    """Run the command to its end and return its exit code; None when we were told to end and it has ended."""
    # One thread, so nothing can hold a lock while the child prepares itself.
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_tie)  # noqa: PLW1509
    while True:
        told = signal.sigwait(SIGNALS) != signal.SIGCHLD
        ended = _reap()
        if process.pid in ended:
            process.returncode = ended[process.pid]
            return None if told else process.returncode
        if told:
            end_command(process)
            return None


def end_command(process: subprocess.Popen[bytes]) -> None:
    """End the command, which ends what it started; then whatever is left."""
    os.killpg(process.pid, signal.SIGTERM)
    wait_ended([psutil.Process(process.pid)], GRACE_S)
    end_children()
    process.returncode = 0  # reaped; this keeps Popen from warning


def _tie() -> None:
    """In the child: end with the parent, and take signals as usual."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _reap() -> dict[int, int]:
    """Collect all children that ended, adopted ones too, and return their exit codes by pid."""
    codes: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid == 0:
            return codes
        codes[pid] = os.waitstatus_to_exitcode(status)


def _told_within(seconds: float) -> bool:
    """Wait some seconds and return at once, and True, when told to end."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        found = signal.sigtimedwait(SIGNALS, left)
        if found is not None and found.si_signo != signal.SIGCHLD:
            return True
        _reap()
    return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _say(text: str, wait_s: float) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} | brainloom | {text} in {wait_s:g} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    supervise(sys.argv[2:])
