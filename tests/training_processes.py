"""The processes of a launched training and what it leaves, for tests that disturb it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil

from models.metrics import read_metrics


def done(folder: Path) -> dict[str, Any]:
    """Return done.json."""
    return json.loads((folder / "done.json").read_text())


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return step and losses of every train line."""
    return [(line["step"], line["losses"]) for line in read_metrics(folder) if line["kind"] == "train"]


def ranks(of: psutil.Process | None = None) -> dict[str, psutil.Process]:
    """Return the running ranks below a process by their number; `agent` is torchrun's own process."""
    found = {}
    for process in (of or psutil.Process()).children(recursive=True):
        try:
            environment, command = process.environ(), process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "models.train" in command:
            found[environment.get("RANK", "agent")] = process
    return found


def killer(rank: str, step: int, number: int = signal.SIGKILL) -> Any:
    """Return an on_progress that sends a signal to a rank once, when a line of a step (or a later one) comes.

    Lines that an earlier launch left are handed on before there are ranks; they are passed over.
    """
    killed: list[int] = []

    def on_progress(line: dict[str, Any]) -> None:
        if not killed and line["step"] >= step and rank in (found := ranks()):
            killed.append(found[rank].pid)
            os.kill(killed[0], number)

    return on_progress
