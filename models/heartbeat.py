"""Signs of life: what each rank is doing, in a small file that the launcher's watchdog reads.

    <training>/heartbeats/rank-<r>.json     {"rank", "pid", "host", "doing", "step", "time"}

A phase without metrics lines (means, staging, a validation, predictions) beats for every case or batch, so that the
watchdog can tell a long one from a hanging one, and say which rank hung where. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"
WIDTH = 512
"""Bytes of a beat; each overwrites the one before it in a single write."""


class Heart:
    """Writes the beats of one rank; about 10 us each."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / FOLDER / f"rank-{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._fixed = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()[:64]}
        self._step = 0

    def beat(self, doing: str, step: int | None) -> None:
        """Say what begins now; the step stays as it was unless given."""
        self._step = self._step if step is None else step
        line = json.dumps({**self._fixed, "doing": doing[:120], "step": self._step, "time": time.time()})
        os.pwrite(self._file, line.encode().ljust(WIDTH), 0)

    def close(self) -> None:
        """Close the file; the last beat stays readable."""
        os.close(self._file)


_heart: Heart | None = None


@contextmanager
def beating(folder: Path, rank: int) -> Iterator[None]:
    """Let `beat` write into a training folder inside the block."""
    global _heart
    before, _heart = _heart, Heart(folder, rank)
    try:
        yield
    finally:
        _heart.close()
        _heart = before


def beat(doing: str, step: int | None = None) -> None:
    """Tell the watchdog what this rank begins to do, e.g. `reading data`; nothing outside of `beating`."""
    if _heart is not None:
        _heart.beat(doing, step)


def read_beats(folder: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """Return the last beat of each rank from `since` (seconds since 1970) on, by rank; a torn one is left out."""
    found = []
    for path in (folder / FOLDER).glob("rank-*.json"):
        try:
            last = json.loads(path.read_bytes())
        except ValueError:
            continue
        if last["time"] >= since:
            found.append(last)
    return sorted(found, key=lambda last: last["rank"])
