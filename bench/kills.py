"""Killing `brainloom preprocess` with everything that it started, at chosen moments; the tests use it, too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from infra.detached import wait_ended
from infra.server import server_status, without_prefect
from infra.settings import Settings

POLL_S = 0.05
END_S = 30.0
"""How long a killed process may take to be gone."""


@dataclass(frozen=True)
class Started:
    """One start of the command on the store."""

    seconds: float
    """From its start until it was killed or ended."""
    cases: int
    """Cases with a receipt then."""


def flow_command(verb: str, config: Path, log: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
    """Start a flow by `brainloom <verb> --config` as the leader of a process group, its workers in it.

    environment: more variables; foreign `PREFECT_*` ones are left out.
    """
    with (log or Path(os.devnull)).open("ab") as out:
        return subprocess.Popen(
            [Path(sys.executable).with_name("brainloom"), verb, "--config", config],
            env=without_prefect(os.environ) | environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and its workers with SIGKILL, and wait until they are gone."""
    # The Prefect server may be a child as well, in a group of its own.
    below = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in below if _group_of(child) == process.pid]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for worker in workers:
        _await_end(worker)


def kill_server(settings: Settings) -> None:
    """Kill the embedded Prefect server with SIGKILL, if it runs."""
    server = server_status(settings)
    if server is not None and server.pid is not None:
        os.killpg(server.pid, signal.SIGKILL)
        _await_end(psutil.Process(server.pid))


def _group_of(process: psutil.Process) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(process.pid)
    return 0


def _await_end(process: psutil.Process) -> None:
    """Wait until a killed process is gone or a zombie: not every init reaps orphans, then waiting never ends."""
    if wait_ended([process], END_S):
        raise RuntimeError(f"{process} lives {END_S:g} s after SIGKILL")


def receipts_in(store: Path) -> int:
    """Return how many cases of a local store have a receipt."""
    return sum(1 for _ in (store / "_build" / "receipts").glob("*/*.json"))


def kill_points(count: int, cases: int, seed: int) -> list[int]:
    """Return one random number of finished cases in each of `count` equal parts of a run."""
    draws = np.random.default_rng(seed).uniform(0, 1, count)
    return [int((part + draw) / count * cases) for part, draw in enumerate(draws)]


def kill_after_cases(process: subprocess.Popen[bytes], store: Path, cases: int, seconds: float = 0.0) -> Started:
    """Kill a command and its workers some time after so many cases have receipts; raises RuntimeError if it ended."""
    began = time.perf_counter()
    while receipts_in(store) < cases:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode} before {cases} cases of {store} were done")
        time.sleep(POLL_S)
    time.sleep(seconds)
    kill_group(process)
    return Started(time.perf_counter() - began, receipts_in(store))


def kill_table(starts: Sequence[Started], cases: int, equal: bool) -> str:
    """Return a Markdown table; all starts but the last were killed. equal: to the digest of the undisturbed run."""
    lines = ["| start | killed after, s | cases done by then |", "|---|---|---|"]
    for number, one in enumerate(starts[:-1], start=1):
        lines.append(f"| {number} | {one.seconds:.1f} | {one.cases:,} of {cases:,} |")
    last = starts[-1]
    digest = "digest equal to the undisturbed run's" if equal else "**another digest than the undisturbed run's**"
    lines.append(
        f"| {len(starts)} | not killed: done after {last.seconds:.1f} | {last.cases:,} of {cases:,}, {digest} |"
    )
    return "\n".join(lines)
