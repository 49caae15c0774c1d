"""Whose turn it is on the GPUs: code that is about to use them says so, and whoever runs it decides how to wait.

The ranks of a training and scripts without a flow have nobody to ask, and go on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_take: ContextVar[Callable[[], None] | None] = ContextVar("take", default=None)


def need_gpus() -> None:
    """Return when the GPUs may be used; to be called, as often as one likes, before they are."""
    if (take := _take.get()) is not None:
        take()


def turn_is_asked() -> bool:
    """Say whether somebody waits for the GPUs on behalf of the code that runs here."""
    return _take.get() is not None


@contextmanager
def asking(take: Callable[[], None]) -> Iterator[None]:
    """Let `need_gpus` call a function inside the context."""
    token = _take.set(take)
    try:
        yield
    finally:
        _take.reset(token)
