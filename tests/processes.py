"""What a process of a test was started with, also while it comes or goes."""

from __future__ import annotations

import psutil


def words_of(process: psutil.Process) -> list[str]:
    """Return the command line; of a process that has ended, collected by its parent or not, there is none."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # zombies included
        return []
