"""Disk or memory that a training has used up: told apart from other failures, in words that help.

Starting again is in vain until somebody made room, so no restart is spent on it. What the kernel's out-of-memory killer
ends leaves no reason: that is a process killed from outside, and a restart is tried.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, a limit on the size of files."""
LEAST_BYTES = 1 << 20
_RUST = re.compile(r"\(os error (\d+)\)")
"""How errors of safetensors end."""
_NO_MEMORY = re.compile(r"can(no|')t allocate memory|out of (shared )?memory|insufficient shared memory", re.IGNORECASE)
"""What torch says of a CPU, of any GPU, and of `/dev/shm`, by which loader processes hand over batches."""
TOLD_CHARACTERS = 300


class FullDiskError(ValueError):
    """A file of a training could not be written: there is no room."""


class NoMemoryError(ValueError):
    """A rank or one of its loader processes got no memory."""


def exhausted(folder: Path, error: BaseException) -> FullDiskError | NoMemoryError | None:
    """Return what to raise for a training in a folder when an error says that disk or memory is used up.

    Removes half-written files of a full disk: whatever is written as a whole is written under a temporary name first.
    """
    if words := full_disk(error):
        _remove_partial(folder)
        free = shutil.disk_usage(folder).free >> 20
        return FullDiskError(
            f"{folder} could not be written: {words}; {free} MiB are free there. Make room (`brainloom retention` "
            "lists what may go) or keep fewer checkpoints, then start again: it continues from its newest checkpoint"
        )
    if words := no_memory(error):
        return NoMemoryError(
            f"{folder.name} got no memory: {words}. Free the device (or raise the limit of /dev/shm) and start again: "
            "it continues from its newest checkpoint. Or begin a training that needs less: a lower batch_size with as "
            "much more accumulation, precision bf16, fewer loader processes, a smaller crop"
        )
    return None


def full_disk(error: BaseException) -> str:
    """Return the system's words when an error, or one that it came from, says that there is no room; empty else."""
    for one in _chain(error):
        found = _RUST.search(str(one))
        number = int(found[1]) if found else getattr(one, "errno", None)
        if number in FULL:
            return os.strerror(number)
    return ""


def no_memory(error: BaseException) -> str:
    """Return the first words when an error, or one that it came from, says that memory is used up; empty else."""
    for one in _chain(error):
        told = isinstance(one, RuntimeError | OSError) and _NO_MEMORY.search(str(one))
        if told or isinstance(one, MemoryError):
            return str(one).strip().partition("\n")[0].rstrip(".")[:TOLD_CHARACTERS] or type(one).__name__
    return ""


def no_room(folder: Path) -> bool:
    """Say whether the disk of a folder is so full that not even a reason could be written there."""
    return shutil.disk_usage(folder).free < LEAST_BYTES


def _remove_partial(folder: Path) -> None:
    for pattern in ("*.partial", "checkpoints/*.partial", "predictions/*.partial"):
        for partial in folder.glob(pattern):
            partial.unlink(missing_ok=True)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
