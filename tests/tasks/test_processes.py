"""Work in other processes: the order of the items, errors in that order, and a process that is killed."""

from __future__ import annotations

import math
import os

import pytest

from tasks.processes import WorkerDiedError, in_order, usable_cores


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(in_order(math.sqrt, [9.0, 4.0, 1.0], workers)) == [3.0, 2.0, 1.0]
    assert list(in_order(math.sqrt, [], workers)) == []
    found = in_order(math.sqrt, [4.0, -1.0, 9.0], workers)
    assert next(found) == 2.0
    with pytest.raises(ValueError, match="math domain error"):
        next(found)


def test_a_killed_worker_is_an_error_that_says_so() -> None:
    with pytest.raises(WorkerDiedError, match=r"one of 2 worker processes was killed, probably for want of memory"):
        list(in_order(os._exit, [1, 1], 2))


def test_no_workers_are_refused_and_some_core_is_usable() -> None:
    with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
        list(in_order(math.sqrt, [1.0], 0))
    assert usable_cores() >= 1
