"""metrics.jsonl: one JSON line per logged step, without duplicates however often a training was resumed.

Train lines: `{"kind": "train", "step", "epoch", "losses": {name: value}, "lr", "grad_norm", "seconds",
"data_wait_seconds", "samples_per_second", "eta_seconds", "total_steps"}`, averaged over ranks and micro-batches.
Validation lines: `{"kind": "val", "step", "epoch", "metrics": {name: value}}`, and `"warning"` when the features seem
to have collapsed. Probes: `{"kind": "probe", "step", "epoch", "measure", "n_train", "n_val", "metrics"}`. `step` counts
finished optimiser steps.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


def parse_lines(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return the records of complete lines; a line cut short by a kill is left out."""
    records = []
    for line in lines:
        if not line.endswith("\n"):
            continue
        records.append(json.loads(line))
    return records


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return all records of a training, oldest first; none when the training has not logged yet."""
    path = folder / FILE_NAME
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return parse_lines(file)


def truncate_after(folder: Path, step: int) -> None:
    """Drop the records of steps later than `step`: the continued training writes them again."""
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    partial = folder / f"{FILE_NAME}.partial"
    partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
    partial.replace(folder / FILE_NAME)


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Append one record as one write, or nothing. Raises ValueError for numbers that are not finite, OSError."""
    line = _line(record).encode()
    handle = os.open(folder / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if (written := os.write(handle, line)) < len(line):
            # A disk without room takes a part; the next line would be joined to it.
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / FILE_NAME))
    finally:
        os.close(handle)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
