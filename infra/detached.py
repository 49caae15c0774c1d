"""Long-lived child processes (the Prefect server, a worker) in their own session, found again by a pid file."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

LOG_TAIL_LINES = 25
OWNER_ONLY = 0o700
OTHERS = 0o077
"""Rights of a folder that are not its owner's."""
# The child writes its own pid before it becomes the program: killing the parent at any point leaves no unknown child.
# `<>` does not empty the file first: a reader in between would take the child for dead.
_WRITE_PID_THEN_BECOME = 'echo $$ 1<>"$0" && exec "$@"'


@dataclass(frozen=True)
class Detached:
    """Names the files of one detached process: `<folder>/<name>.pid`, `.log` and `.lock`."""

    folder: Path
    name: str
    marker: str
    """Argument on the command line that tells our process from another one that was given the same pid later."""

    @property
    def log(self) -> Path:
        """File with the output of the process."""
        return self.folder / f"{self.name}.log"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time start or stop it; the system releases the lock when its holder dies."""
        self._make_folder()
        with (self.folder / f"{self.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def pid(self) -> int | None:
        """Return the pid of the running process, or None when there is none."""
        process = self._process()
        return process.pid if process else None

    def was_started(self) -> bool:
        """Say whether it was started and not stopped since; it may have ended by itself, or been killed."""
        return self._pid_file.exists()

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start a command in its own session with output to the log; the previous log is kept as `.log.1`."""
        self._make_folder()
        self._pid_file.unlink(missing_ok=True)
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as output:  # at its end also when somebody takes lines out of it
            process = subprocess.Popen(
                ["/bin/sh", "-c", _WRITE_PID_THEN_BECOME, str(self._pid_file), *command],
                cwd=self.folder,  # not the caller's folder: Prefect reads .env and prefect.toml there
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # The child may not have come to write it yet, and the caller is about to look.
        self._pid_file.write_text(f"{process.pid}\n")
        process.returncode = 0  # it outlives us on purpose; this keeps Popen from warning about it
        return process.pid

    def stop(self, wait_s: float = 20.0) -> bool:
        """End the process, its group and its descendants: SIGTERM, wait, SIGKILL. False when nothing was running."""
        process = self._process()
        if process is None:
            self._pid_file.unlink(missing_ok=True)
            return False
        family = [process, *process.children(recursive=True)]
        _signal_group(process.pid, signal.SIGTERM)
        alive = wait_ended(family, wait_s)
        for member in alive:
            _signal_group(member.pid, signal.SIGKILL)
            if _lives(member):
                member.kill()
        wait_ended(alive, wait_s)
        self._pid_file.unlink(missing_ok=True)
        return True

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _make_folder(self) -> None:
        """Make the folder, for its owner alone: its files name cases and hold the server's keys.

        The folder guards its files: what flow runs write elsewhere keeps the rights that the caller's umask gives.
        """
        self.folder.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & OTHERS:
            self.folder.chmod(OWNER_ONLY)

    @property
    def _pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(int(self._pid_file.read_text()))
            return process if _lives(process) and self.marker in _command_line(process) else None
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            return None


def _command_line(process: psutil.Process) -> list[str]:
    """Return the command line; it is empty for an instant while a process becomes another program, so ask again."""
    for _ in range(40):
        if words := process.cmdline():
            return words
        time.sleep(0.005)
    return []


def _lives(process: psutil.Process) -> bool:
    """Say whether a process runs. One that ended and waits to be collected by its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_ended(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until all ended, zombies included, at most `timeout_s` seconds; return those that still live."""
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
    except ProcessLookupError:
        return
