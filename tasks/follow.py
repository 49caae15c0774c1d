"""What a launcher sees of running trainings: their metrics lines, their ranks' signs of life, the end of their log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

from models.heartbeat import FOLDER as HEARTBEATS
from models.heartbeat import read_beats

OnProgress = Callable[[dict[str, Any]], None]
STACK_SECONDS = 1.0
"""For hanging ranks to write their stacks."""


class Vital:
    """Watches the heartbeats that ranks leave in the folders of their trainings."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.began = time.time()
        self._times: dict[Path, int] = {}

    def poll(self) -> bool:
        """Say whether any rank gave a sign of life since the last call."""
        paths = [path for folder in self.folders for path in (folder / HEARTBEATS).glob("rank-*.json")]
        times = {path: path.stat().st_mtime_ns for path in paths}
        before, self._times = self._times, times
        return times != before

    def diagnose(self, pids: Set[int]) -> str:
        """Return what each rank did last, and let those among `pids` write their stacks into the log."""
        beats = [last for folder in self.folders for last in read_beats(folder, since=self.began)]
        here = [last["pid"] for last in beats if last["pid"] in pids and last["host"] == socket.gethostname()[:64]]
        for pid in here:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)  # models.train has its stack written on that
        if here:
            time.sleep(STACK_SECONDS)
        now = time.time()
        said = [f"rank {b['rank']}: {b['doing']} in step {b['step']}, {now - b['time']:.0f} s ago" for b in beats]
        return f"; last sign of life of {'; '.join(said)}" if said else ""


class MetricsFollower:
    """Reads the new lines of several metrics.jsonl files, also when a resumed training rewrites them."""

    def __init__(self, folders: Sequence[Path], on_progress: OnProgress | None) -> None:
        self.on_progress = on_progress
        self.paths = [folder / "metrics.jsonl" for folder in folders]
        self.offsets: dict[Path, tuple[int, int]] = {}
        self.last_steps: dict[tuple[Path, str], int] = {}

    def poll(self) -> bool:
        """Hand on all new records; return whether there were any."""
        found = [self._poll_file(path) for path in self.paths]
        return any(found)

    def _poll_file(self, path: Path) -> bool:
        if not path.exists():
            return False
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            inode, offset = self.offsets.get(path, (status.st_ino, 0))
            if inode != status.st_ino or status.st_size < offset:
                offset = 0
            file.seek(offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offsets[path] = (status.st_ino, offset + len(whole))
        records = [json.loads(line) for line in whole.splitlines()]
        return sum(self._hand_on(path, record) for record in records) > 0

    def _hand_on(self, path: Path, record: dict[str, Any]) -> bool:
        key = (path, str(record["kind"]))
        if record["step"] <= self.last_steps.get(key, -1):
            return False
        self.last_steps[key] = record["step"]
        if self.on_progress is not None:
            self.on_progress({"training": path.parent.name, **record})
        return True


def log_tail(path: Path, lines: int = 40, max_bytes: int = 16_384) -> str:
    """Return the last lines of a log."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max_bytes))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
