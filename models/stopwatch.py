"""Where the seconds of a piece of work go: named steps, each with the time that no step inside it took.

Costs some microseconds a step, and nothing is kept where nobody measures.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Seconds = dict[str, float]
"""By step."""
_watch: ContextVar[Seconds | None] = ContextVar("watch", default=None)
_inner: ContextVar[list[float] | None] = ContextVar("inner", default=None)
"""Seconds of the steps inside the one that runs."""
OTHER = "other"


@contextmanager
def measuring(seconds: Seconds | None = None) -> Iterator[Seconds]:
    """Collect the seconds of all steps inside, by name; `other` is the rest. Raises nothing of its own.

    seconds: a dictionary to fill, which is there also when the work raises; None: a new one.
    """
    found: Seconds = defaultdict(float) if seconds is None else seconds
    tokens = _watch.set(found), _inner.set([0.0])
    try:
        with step(OTHER):
            yield found
    finally:
        _watch.reset(tokens[0])
        _inner.reset(tokens[1])


@contextmanager
def step(name: str) -> Iterator[None]:
    """Count what runs inside as a step; also a decorator."""
    seconds, outer = _watch.get(), _inner.get()
    if seconds is None or outer is None:
        yield
        return
    mine = [0.0]
    token = _inner.set(mine)
    began = time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - began
        _inner.reset(token)
        outer[0] += took
        seconds[name] = seconds.get(name, 0.0) + took - mine[0]
