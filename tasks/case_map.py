"""Doing one thing with many cases: here, or where a flow says (flows.case_workers); the results never depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class CaseMap(Protocol):
    """Works on items, in their order."""

    @property
    def own_gpus(self) -> bool:
        """Whether every item that needs a GPU gets one that no other is worked on with."""
        ...

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], voxels: int) -> Iterator[Result]:
        """Yield `function(item)` of every item, in their order; the first error in that order is raised.

        voxels: of one item, as a measure of the work that scoring so many is. Function and items are picklable.
        """
        ...


class Here:
    """Works on one item after another in this process."""

    own_gpus = True

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], voxels: int) -> Iterator[Result]:
        """Yield `function(item)` of every item."""
        yield from map(function, items)


HERE = Here()
