"""Checkpoints: written whole or not at all, kept by count, loaded without unpickling code."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from models.config import TrainingConfig, deciding

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})\.pt$")
REQUIRED: frozenset[str] = frozenset(
    {"model", "optimiser", "schedule", "scaler", "step", "rng", "sampler", "world_sizes"}
    | {"config", "config_digest", "selection_digest"}
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used, and why."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of one step, e.g. checkpoints/step-000123.pt."""
    return folder / "checkpoints" / f"step-{step:06d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a training folder, newest first; unfinished files are not among them."""
    found = [path for path in (folder / "checkpoints").glob("step-*.pt") if _NAME.search(path.name)]
    return sorted(found, key=lambda path: int(_NAME.search(path.name)[1]), reverse=True)  # type: ignore[index]


def save_checkpoint(folder: Path, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint under a temporary name, flush it to disk, rename it, and drop all but the newest `keep`."""
    if missing := REQUIRED - content.keys():
        raise CheckpointError(f"a checkpoint needs {sorted(missing)}; nothing was written")
    path = checkpoint_path(folder, content["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # what is half-written takes room for nothing
        raise
    _fsync_folder(path.parent)
    for old in list_checkpoints(folder)[keep:]:
        old.unlink()
    return path


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises CheckpointError for a truncated file, a hostile pickle (never unpickled) or missing keys.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged archives
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} cannot be read as plain tensors: {text}") from error
    if not isinstance(content, dict) or (missing := REQUIRED - content.keys()):
        what = sorted(missing) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"checkpoint {path} is not one of ours: missing {what}")
    return content


def newest_checkpoint(folder: Path, config: TrainingConfig, selection_digest: str) -> dict[str, Any] | None:
    """Return the newest readable checkpoint of a training, or None when there is none at all.

    A damaged newest file is named in a warning and the previous one is taken. Raises CheckpointError for a checkpoint
    of another config or selection, and when files exist but none is readable.
    """
    damaged: list[str] = []
    for path in list_checkpoints(folder):
        try:
            content = load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; falling back to the previous checkpoint", error)
            damaged.append(path.name)
            continue
        _check_config(path, content, config)
        if content["selection_digest"] != selection_digest:
            raise CheckpointError(
                f"checkpoint {path} was made from selection {content['selection_digest'][:12]}, the folder now holds "
                f"{selection_digest[:12]}; restore selection.parquet or start a new training"
            )
        return content
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder / 'checkpoints'} can be read ({', '.join(damaged)}); "
            "delete that folder to start the training from the beginning"
        )
    return None


def _check_config(path: Path, content: dict[str, Any], config: TrainingConfig) -> None:
    if content["config_digest"] == config.content_digest():
        return
    old, new = json.loads(content["config"]), config.model_dump(mode="json")
    different = first_difference(deciding(old), deciding(new))
    raise CheckpointError(
        f"checkpoint {path} belongs to another config: {different}; start a new training under another name"
    )


def first_difference(old: Any, new: Any, where: str = "") -> str:
    """Return `key: old -> new` for the first difference of two JSON values, or an empty string when they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{where}.{key}" if where else str(key)
            if key not in old or key not in new:
                return f"{inner}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
            if text := first_difference(old[key], new[key], inner):
                return text
        return ""
    return "" if old == new else f"{where}: {old!r} -> {new!r}"
