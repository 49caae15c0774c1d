"""Checkpoints that others wrote: opened without running anything in them, and only when their size is sane."""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.released import WeightsError

STATE = "state_dict"
KEYS = (STATE, "model")
"""Where training checkpoints have their weights (BrainMVP, AnatCL); all other keys are the state of that training."""
MAX_PICKLE_BYTES = 64 * 2**20
"""Of the part that describes the tensors; the released one has some 0.2 MB with its optimiser."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's weights, and what else it holds."""

    state: dict[str, Tensor]
    others: dict[str, Any]
    """The keys beside that of the weights; an `argparse.Namespace` is a dict."""
    key: str
    """One of KEYS; empty for a bare state_dict."""


def read_checkpoint(path: Path, max_bytes: int) -> Checkpoint:
    """Return the content of a `.pt` file, mapped from disk.

    The file must be one that `torch.save` writes (an uncompressed zip), at most `max_bytes` large, whole by its
    checksums, and hold a bare state_dict or a dict with `state_dict` or `model`. Nothing in it is executed; beside
    plain values it may hold an `argparse.Namespace`, as code like AnatCL's keeps its settings. Raises WeightsError
    naming the file and the rule; FileNotFoundError when there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the checkpoint to import")
    _check_archive(path, max_bytes)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged or hostile archives
        text = str(error).strip().splitlines()
        raise WeightsError(
            f"{path} cannot be read as plain tensors and was not unpickled: {text[0] if text else type(error).__name__}"
        ) from error
    return _split(path, content)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_archive(path: Path, max_bytes: int) -> None:
    size = path.stat().st_size
    if size > max_bytes:
        raise WeightsError(
            f"{path} has {size} bytes; weights of this network with their optimiser have at most {max_bytes}: it is "
            "something else"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive.infolist(), max_bytes)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise WeightsError(
            f"{path} is not a whole zip archive as torch.save writes it ({error}): it is truncated, damaged or of "
            "another format (of PyTorch before 1.6, or not of PyTorch); get it again"
        ) from error
    if damaged:
        raise WeightsError(f"{path}: the checksum of its part {damaged} is wrong: the file is damaged; get it again")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], max_bytes: int) -> None:
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise WeightsError(f"{path}: part {packed[0]} is compressed, which torch.save never does; it is not opened")
    if (total := sum(entry.file_size for entry in entries)) > max_bytes:
        raise WeightsError(f"{path} claims {total} bytes of content; at most {max_bytes} are read")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{path} has {len(pickles)} parts data.pkl; a file of torch.save has one")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise WeightsError(f"{path}: data.pkl has {pickles[0].file_size} bytes; at most {MAX_PICKLE_BYTES} are read")


def _split(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; a state_dict or a dict with `{'` or `'.join(KEYS)}` is needed"
        )
    key = next((name for name in KEYS if name in content), "")
    state = content[key] if key else content
    others = {str(name): _plain(value) for name, value in content.items() if name != key} if key else {}
    if not isinstance(state, Mapping) or not state:
        name = key or STATE
        raise WeightsError(f"{path}: `{name}` must be a dict of tensors with at least one, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path}: {name!r} is a {type(value).__name__}; a state_dict holds tensors by name (training state "
                f"belongs beside `{key or STATE}`)"
            )
    return Checkpoint(dict(state), others, key)


def _plain(value: Any) -> Any:
    return dict(vars(value)) if isinstance(value, argparse.Namespace) else value
