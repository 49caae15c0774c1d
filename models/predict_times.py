"""How long a training took to predict its test cases: written beside its predictions, read without torch."""

from __future__ import annotations

from pathlib import Path

from infra import storage
from models.records import Record

FILE = "predicting.json"
"""Of a training folder; not among the predictions, whose digest must not know how long they took."""


class PredictTimes(Record):
    """What one training's predictions took."""

    seconds: float
    """By the clock, of all ranks at once: reading, the network, writing."""
    cases: int
    ranks: int


def write_times(folder: Path, times: PredictTimes) -> None:
    """Write the times of a training's predictions into its folder."""
    storage.write_bytes(str(folder / FILE), times.model_dump_json().encode())


def read_times(folder: Path) -> PredictTimes | None:
    """Return the times of a training's predictions; None where it recorded none."""
    path = folder / FILE
    return PredictTimes.model_validate_json(path.read_bytes()) if path.exists() else None
