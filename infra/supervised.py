"""Keeps a command running: `python -m infra.supervised <name> <command...>` starts it again whenever it ends.

Prefect's worker ends on some errors, and anything may be killed. Flow runs are processes in sessions of their own: when
their worker dies they would go on without anybody who can cancel them or read their output. They become children of
this process then, and are ended before the command is started again; those that had no time to tell the server so are
marked Crashed.

SIGTERM ends the flow runs of the command first, which get time to save, then the command and this process: Prefect's
worker kills its flow runs at once when it is told to end. When this process is killed, the system sends SIGTERM to the
command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

import psutil

from infra.api import FINAL_STATES, request_json
from infra.detached import wait_ended

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Before the command is started again: doubled each time, unless it ran for longer than the longest of them."""
GRACE_S = 40.0
"""Between SIGTERM and SIGKILL; a flow run needs up to 30 s to end its ranks and to save."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Variable that Prefect 3.8.8 sets for the process of a flow run; all that it starts has it, too."""
LEFT = "Prefect's worker died, and its flow runs were ended: nobody could cancel them any more. Start it again"
STOPPED = "Prefect's worker was told to end, and its flow runs were ended with it. Start it again"
_LIBC = ctypes.CDLL(None)


def supervise(command: Sequence[str], first_wait_s: float = FIRST_WAIT_S) -> None:
    """Run a command again and again until SIGTERM or SIGINT; what it leaves behind is ended in between."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    wait_s = first_wait_s
    while True:
        began = time.monotonic()
        code, runs = _run(command)
        lived_s = time.monotonic() - began
        left, orphans = end_children()
        mark_crashed(runs | orphans, STOPPED if code is None else LEFT)
        if code is None:
            return
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
    runs = flow_runs_of(family)
    for child in children:
        _send(child, signal.SIGTERM)
    for process in wait_ended(family, GRACE_S):
        _send(process, signal.SIGKILL)
    wait_ended(family, GRACE_S)
    _reap()
    return len(family), runs


def flow_runs_of(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the ids of the flow runs that processes belong to."""
    return {run for process in processes if (run := _flow_run(process))}


def mark_crashed(runs: set[str], message: str = LEFT) -> None:
    """Tell the server of PREFECT_API_URL about flow runs that have ended, and their task runs, unless they did it.

    A server that does not answer has its automation for flow runs without a heartbeat.
    """
    api_url = os.environ.get("PREFECT_API_URL", "")
    unfinished = {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}
    crashed = {"type": "CRASHED", "message": message}
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


def _run(command: Sequence[str]) -> tuple[int | None, set[str]]:
    """Run the command to its end; return its exit code, None when we were told to end, and flow runs ended with it."""
    # One thread, so nothing can hold a lock while the child prepares itself.
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_tie)  # noqa: PLW1509
    while True:
        told = signal.sigwait(SIGNALS) != signal.SIGCHLD
        ended = _reap()
        if process.pid in ended:
            process.returncode = ended[process.pid]
            return None if told else process.returncode, set()
        if told:
            runs = end_command(psutil.Process(process.pid))
            process.returncode = 0  # reaped later; this keeps Popen from warning
            return None, runs


def end_command(command: psutil.Process) -> set[str]:
    """End the flow runs that a command started, and then the command; return their ids.

    The command is halted meanwhile: it would start the next flow run as soon as one has ended.
    """
    _send(command, signal.SIGSTOP)
    at_work = [process for process in command.children(recursive=True) if _flow_run(process)]
    runs = flow_runs_of(at_work)
    for process in set(command.children()) & set(at_work):
        _send(process, signal.SIGTERM)  # these know in which order to end what they started
    for process in wait_ended(at_work, GRACE_S):
        _send(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command.pid, signal.SIGTERM)
    _send(command, signal.SIGCONT)
    wait_ended([command], GRACE_S)
    return runs


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
