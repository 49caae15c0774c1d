"""Work on many items by other processes on this host, with the results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDiedError(RuntimeError):
    """A worker process ended without an answer."""


def in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` of every item, in their order: computed here, or in as many spawned processes.

    `function` is sent to each process once, the items one by one; all must be picklable when workers > 1. The first
    error in the order of the items is raised, and what was not begun is not done. Raises WorkerDiedError when a process
    was killed (out of memory?), and ValueError for workers < 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    if min(workers, len(items)) == 1 or not items:
        yield from map(function, items)
        return
    # A forked child that reads a store hangs: models.store.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), context, initializer=_begin, initargs=(function,)) as pool:
        futures = [pool.submit(_call, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise WorkerDiedError(
                f"one of {workers} worker processes was killed, probably for want of memory; free some, or use fewer"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """Return the cores that this process may use; 1 in a process that may not start others (a Dask worker)."""
    return 1 if multiprocessing.current_process().daemon else len(os.sched_getaffinity(0))


_function: Callable[[Any], Any] | None = None
"""What this worker process does with an item."""


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    _die_with_parent()


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
