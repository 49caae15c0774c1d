"""A folder that one cohort owns: claimed by its config, written in whole files, by any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from infra import storage
from models.records import Record
from tasks.phantom.tables import as_json
from tasks.processes import in_order

Progress = Callable[[int, int], None]
"""Called with what is done and what there is."""
CONFIG_FILE = ".phantom/config.json"
T = TypeVar("T")


class DifferentCohortError(ValueError):
    """The folder holds a cohort of another config."""


def claim_folder(config: Record, root: str | Path) -> Path:
    """Write the config of a new cohort into a folder and return its path; remove what a killed run left half written.

    Raises DifferentCohortError for the folder of another cohort.
    """
    folder = Path(root).absolute()
    mine = config.model_dump(mode="json")
    claim = folder / CONFIG_FILE
    if not claim.exists():
        storage.write_bytes(claim, as_json(mine))
        return folder
    theirs = json.loads(claim.read_bytes())
    differs = [
        f"{name}: {theirs.get(name)!r} there, {mine.get(name)!r} wanted"
        for name in sorted({*mine, *theirs})
        if theirs.get(name) != mine.get(name)
    ]
    if differs:
        raise DifferentCohortError(
            f"{folder} holds a cohort of another config ({'; '.join(differs)}); choose another folder or remove this "
            "one"
        )
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return folder


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet: one that does is complete."""
    if not path.exists():
        storage.write_bytes(path, data)


def write_changed(files: Mapping[Path, bytes]) -> None:
    """Write those files whose content differs."""
    for path, data in files.items():
        if not path.exists() or path.read_bytes() != data:
            storage.write_bytes(path, data)


def write_all(
    write: Callable[[T], None], todo: Sequence[T], processes: int, total: int, progress: Progress | None
) -> None:
    """Call `write` for every item, in this process or in others; progress counts up to the total.

    Raises ValueError for processes < 1.
    """
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    report = progress or _silent
    done = total - len(todo)
    report(done, total)
    for count, _ in enumerate(in_order(write, todo, processes), start=done + 1):
        report(count, total)


def _silent(done: int, total: int) -> None:
    """Nobody watches."""
