"""What the weights of a finished training are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.finished import FinishedTraining, read_training
from tasks.weights_export import formats_of


def weights_info(training: Path) -> dict[str, Any]:
    """Return facts about a finished training, JSON-able.

    `parts`: (tensors, entries) by the first word of the names; `formats`: why a format cannot hold it, or an empty
    string. Raises NotFinishedError when the training is not finished or its weights were changed.
    """
    finished = read_training(training)
    config = finished.config
    parts: dict[str, tuple[int, int]] = {}
    for name, tensor in finished.tensors.items():
        part = name.partition(".")[0]
        tensors, entries = parts.get(part, (0, 0))
        parts[part] = (tensors + 1, entries + tensor.numel())
    return {
        "training": config.name,
        "recipe": config.recipe,
        "preset": config.preset,
        "network": config.network.kind,
        "origin": _origin(finished),
        "weights_digest": finished.done["weights_digest"],
        "spec": finished.spec.name,
        "parts": parts,
        "formats": formats_of(finished),
    }


def _origin(finished: FinishedTraining) -> str:
    origin = finished.done.get("origin")
    if origin:
        return f"{origin['file']} (sha256 {origin['sha256']})"
    start = finished.config.init_from
    return f"trained here from {Path(start).name}" if start else "trained here from random weights"
