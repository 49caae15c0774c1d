"""Waiting for what other processes do, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

POLL_S = 0.02
T = TypeVar("T")


def until(ask: Callable[[], T], what: str | Callable[[], str], seconds: float = 400.0, poll_s: float = POLL_S) -> T:
    """Return the first true answer; raises AssertionError saying what did not come within so many seconds.

    what: words, or what makes them at the end of the time, such as the end of a log then.
    """
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what() if callable(what) else what}"
        time.sleep(poll_s)
    return answer
