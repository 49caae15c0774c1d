"""Room in a staging folder: who uses which copies, and which go first when there is too little.

    <stage_dir>/.claims/lock         held for a moment by whoever makes room
    <stage_dir>/.claims/<id>.json    the cases of one running training, {"training", "cases": {case: bytes}}

A claim counts as long as its process holds a lock on it, and the lock ends with the process, however it dies. Copies
that no claim names are a cache: the least recently used ones are removed when another training needs their room.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from models.heartbeat import beat
from models.store_layout import SHARD_ARRAYS

log = logging.getLogger(__name__)

CLAIMS = ".claims"
RECEIPTS = ".staged"
GIB = 2**30

Sizes = dict[str, int]
"""Bytes by case, `<folder of the copy>/<dataset>/<row>`."""


class StagingError(ValueError):
    """Cases cannot be staged; the message has the numbers and what to do."""


@dataclass(frozen=True)
class Claim:
    """What a training that is running now reads."""

    training: str
    cases: Sizes


def key_of(mirror: str, dataset: str, row: int | str) -> str:
    """Return the name of a case in claims."""
    return f"{mirror}/{dataset}/{row}"


def receipt_path(stage_dir: Path, key: str) -> Path:
    """Return the file that says that a case was copied and checked; its modification time is that of the last use."""
    mirror, dataset, row = key.split("/")
    return stage_dir / mirror / RECEIPTS / dataset / f"{row}.json"


@contextmanager
def locked(stage_dir: Path) -> Iterator[None]:
    """Be the only process that looks at claims and removes copies; made when absent."""
    (stage_dir / CLAIMS).mkdir(parents=True, exist_ok=True)
    with (stage_dir / CLAIMS / "lock").open("ab") as file:
        beat(f"waiting for {file.name}")
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def running_claims(stage_dir: Path) -> list[Claim]:
    """Return the claims of running trainings and remove those of others; the caller holds the lock."""
    found = []
    for path in sorted((stage_dir / CLAIMS).glob("*.json")):
        with suppress(FileNotFoundError), path.open("rb") as file:  # a training that ends removes its own
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(Claim(**json.loads(file.read())))
            else:
                path.unlink()
    return found


@contextmanager
def claimed(stage_dir: Path, training: str, cases: Sizes) -> Iterator[None]:
    """Keep these cases from being removed inside the block; it is entered with the lock held.

    Entering and leaving count as using the copies.
    """
    path = stage_dir / CLAIMS / f"{uuid.uuid4().hex}.json"
    with path.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"training": training, "cases": cases}).encode())
        file.flush()
        _mark_used(stage_dir, cases)
        try:
            yield
        finally:
            _mark_used(stage_dir, cases)
            path.unlink(missing_ok=True)


def _mark_used(stage_dir: Path, cases: Mapping[str, int]) -> None:
    now = time.time()
    for key in cases:
        with suppress(FileNotFoundError):
            os.utime(receipt_path(stage_dir, key), (now, now))


def make_room(stage_dir: Path, cases: Sizes, claims: Sequence[Claim], limit_gib: float, what: str) -> None:
    """Remove the least recently used copies until `cases` fit below the limit and on the disk.

    cases: all that the training reads, copied or not; what: names them in messages. Raises StagingError, with the
    numbers and before anything is removed, when they do not fit beside what running trainings use. The caller holds
    the lock.
    """
    copies, rest = list_copies(stage_dir)
    needed = {**{key: size for claim in claims for key, size in claim.cases.items()}, **cases}
    order = sorted(copies.keys() - needed.keys(), key=lambda key: (_last_used(stage_dir, key), key))
    unused = {key: copies[key] for key in order}
    removable = sum(unused.values())
    missing = sum(max(0, size - copies.get(key, 0)) for key, size in needed.items())
    mirrors = {key.split("/")[0] for key in needed}
    total = sum(needed.values()) + sum(size for mirror, size in rest.items() if mirror in mirrors)
    free, limit = shutil.disk_usage(stage_dir).free, limit_gib * GIB
    if total > limit or missing > free + removable:
        others = sum(size for key, size in needed.items() if key not in cases)
        names = ", ".join(sorted({claim.training for claim in claims})) or "none"
        disk = f"its disk has {free / GIB:.3f} GiB free and copies of {removable / GIB:.3f} GiB that nobody uses"
        raise StagingError(
            f"staging {what} needs {sum(cases.values()) / GIB:.3f} GiB; {stage_dir} may hold stage_gib {limit_gib:g}, "
            f"of which trainings that run now ({names}) use {others / GIB:.3f} GiB; {disk}; raise stage_gib, wait for "
            "the other trainings, or leave stage_dir empty to read the store itself"
        )
    surplus = sum(rest.values()) - sum(size for mirror, size in rest.items() if mirror in mirrors)
    _remove(stage_dir, unused, max(total + removable + surplus - limit, missing - free), rest.keys() - mirrors)


def list_copies(stage_dir: Path) -> tuple[Sizes, Sizes]:
    """Return the bytes of the copied cases, complete or not, and of all other files by copied store.

    Folders that are no copies of ours are not looked into: what else lies in `stage_dir` is never removed.
    """
    copies, rest = Counter[str](), Counter[str]()
    for mirror in sorted(path.parent for path in stage_dir.glob(f"*/{RECEIPTS}")):
        for folder, _, names in os.walk(mirror):
            parts, size = Path(folder).relative_to(mirror).parts, sum(_size(Path(folder, name)) for name in names)
            if len(parts) > 3 and parts[1] in SHARD_ARRAYS:  # <dataset>/image/c/<row>/...
                copies[key_of(mirror.name, parts[0], parts[3])] += size
            else:
                rest[mirror.name] += size
    return dict(copies), dict(rest)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a temporary file of a training that is staging, renamed by now
        return 0


def _last_used(stage_dir: Path, key: str) -> float:
    """Return the time of the last use, 0 for a copy that a kill left unfinished."""
    try:
        return receipt_path(stage_dir, key).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(stage_dir: Path, unused: Sizes, wanted: float, idle: Set[str]) -> None:
    """Remove copies in the given order until `wanted` bytes are free, and of the idle stores those without any."""
    freed, left = 0, dict(unused)
    for key, size in unused.items():
        if freed >= wanted:
            break
        remove_copy(stage_dir, key)
        del left[key]
        freed += size
    for mirror in idle - {key.split("/")[0] for key in left} if wanted > 0 else ():
        shutil.rmtree(stage_dir / mirror)
    if len(left) < len(unused):
        cases = len(unused) - len(left)
        log.info("removed the %d least recently used cases (%.3f GiB) from %s", cases, freed / GIB, stage_dir)


def remove_copy(stage_dir: Path, key: str) -> None:
    """Remove a case: its receipt first, so that a kill in between leaves no copy that seems whole."""
    receipt_path(stage_dir, key).unlink(missing_ok=True)
    mirror, dataset, row = key.split("/")
    for array in SHARD_ARRAYS:
        shutil.rmtree(stage_dir / mirror / dataset / array / "c" / row, ignore_errors=True)
