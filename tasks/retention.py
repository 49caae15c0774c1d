"""What a workspace may lose when it is old: found first, listed, and removed only on request.

Stores (`*.zarr`), tables, versions of tables and the weights of finished trainings are never among it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.export import DONE
from models.stage_room import list_copies, locked, receipt_path, remove_copy, running_claims

DAY_S = 86_400
LEFTOVERS = (".partial", ".tmp")
"""Ends of names of files that a killed process left half-written; a finished file never has one."""


@dataclass(frozen=True)
class Removal:
    """One thing that may go: a file, a folder, or a copy in a staging folder."""

    kind: str
    path: Path
    size: int
    """Bytes."""
    age_days: float
    """Since it was last written or used."""
    key: str = ""
    """Name of a copy below the staging folder `path`."""

    @property
    def name(self) -> str:
        """Where it is."""
        return str(self.path / self.key) if self.key else str(self.path)


def leftovers(workspace: Path, days: float) -> list[Removal]:
    """Return half-written files outside of stores that nobody has written for so many days."""
    found = []
    for folder, folders, files in os.walk(workspace):
        folders[:] = [name for name in folders if not name.endswith(".zarr")]
        paths = (Path(folder, name) for name in files if name.endswith(LEFTOVERS))
        found += [_removal("half-written file", path) for path in paths if not path.is_symlink()]
    return _older(found, days)


def unfinished_trainings(workspace: Path, days: float) -> list[Removal]:
    """Return the folders of trainings that never finished and were last written so many days ago."""
    return _older([_removal("unfinished training", one) for one in _trainings(workspace) if not _is_done(one)], days)


def finished_checkpoints(workspace: Path, days: float) -> list[Removal]:
    """Return the checkpoints of trainings that finished so many days ago; their weights are elsewhere and stay."""
    folders = [one / "checkpoints" for one in _trainings(workspace) if _is_done(one)]
    return _older([_removal("checkpoints of a finished training", one) for one in folders if one.is_dir()], days)


def staged_copies(stage_dir: Path, days: float) -> list[Removal]:
    """Return copies of cases that no running training uses and none used for so many days."""
    if not stage_dir.is_dir():
        return []
    with locked(stage_dir):
        used = {key for claim in running_claims(stage_dir) for key in claim.cases}
        copies, _ = list_copies(stage_dir)
        return _older([_copy(stage_dir, key, size) for key, size in sorted(copies.items()) if key not in used], days)


def remove(found: Removal, days: float) -> bool:
    """Remove one thing; False when it was written or used again, or is gone, since it was found."""
    if found.key:
        with locked(found.path):
            used = {key for claim in running_claims(found.path) for key in claim.cases}
            if found.key in used or not _older([_copy(found.path, found.key, found.size)], days):
                return False
            remove_copy(found.path, found.key)
        return True
    if not found.path.exists() or not _older([_removal(found.kind, found.path)], days):
        return False
    if found.path.is_dir():
        shutil.rmtree(found.path)
    else:
        found.path.unlink()
    return True


def _trainings(workspace: Path) -> Iterator[Path]:
    """Folders of trainings; links, which may lead out of the workspace, are left alone."""
    for run in sorted((workspace / "trainings").glob("*/run.json")):
        if not run.parent.is_symlink():
            yield run.parent


def _is_done(training: Path) -> bool:
    return (training / DONE).exists()


def _removal(kind: str, path: Path) -> Removal:
    files = [path] if path.is_file() else [path, *(one for one in path.rglob("*") if not one.is_symlink())]
    stats = [one.stat() for one in files if one.exists()]
    newest = max((stat.st_mtime for stat in stats), default=time.time())
    return Removal(kind, path, sum(stat.st_size for stat in stats), (time.time() - newest) / DAY_S)


def _copy(stage_dir: Path, key: str, size: int) -> Removal:
    path = receipt_path(stage_dir, key)
    used = path.stat().st_mtime if path.exists() else time.time()  # one that is being copied has no receipt yet
    return Removal("staged copy", stage_dir, size, (time.time() - used) / DAY_S, key)


def _older(found: list[Removal], days: float) -> list[Removal]:
    return [one for one in found if one.age_days >= days]
