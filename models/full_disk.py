"""A disk that is full while a training writes: told apart from other failures, and in words that help.

Whatever is written here is written under a temporary name first, so what was there before stays valid.
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


class FullDiskError(ValueError):
    """A file of a training could not be written: there is no room."""


def full_disk(error: BaseException) -> str:
    """Return the system's words when an error, or one that it came from, says that there is no room; empty else."""
    for one in _chain(error):
        found = _RUST.search(str(one))
        number = int(found[1]) if found else getattr(one, "errno", None)
        if number in FULL:
            return os.strerror(number)
    return ""


def full_disk_error(folder: Path, words: str) -> FullDiskError:
    """Return what to raise for a training in a folder; removes its half-written files, which take room for nothing."""
    for pattern in ("*.partial", "checkpoints/*.partial", "predictions/*.partial"):
        for partial in folder.glob(pattern):
            partial.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free >> 20
    return FullDiskError(
        f"{folder} could not be written: {words}; {free} MiB are free there. Make room (`brainloom retention` lists "
        "what may go) or keep fewer checkpoints, then start again: it continues from its newest checkpoint"
    )


def no_room(folder: Path) -> bool:
    """Say whether the disk of a folder is so full that not even a reason could be written there."""
    return shutil.disk_usage(folder).free < LEAST_BYTES


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
