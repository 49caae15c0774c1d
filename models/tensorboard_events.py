"""metrics.jsonl as TensorBoard event files: a view of it, written anew at every start, so no step is there twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from models.metrics import read_metrics

FOLDER = "tensorboard"


class EventFiles:
    """Writes the numbers of metrics lines as scalars `<kind>/<name>` into `<training>/tensorboard`.

    The events of an earlier start are removed and made again from metrics.jsonl, which the resume has cut at its
    checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        # Only trainings that want it pay for the import.
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        self._writer = SummaryWriter(str(folder / FOLDER))
        for record in read_metrics(folder):
            self.add(record)
        self._writer.flush()

    def add(self, record: dict[str, Any]) -> None:
        """Write one metrics line."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics line by their TensorBoard tags, e.g. `train/loss`, `val/psnr_model`."""
    numbers = {**record.get("losses", {}), **record.get("metrics", {})}
    if record["kind"] == "train":
        numbers |= {name: record[name] for name in ("lr", "grad_norm", "seconds", "data_wait_seconds")}
    return {f"{record['kind']}/{name}": float(value) for name, value in numbers.items()}
