"""Working on many cases on the Dask workers of the settings: scoring them, or predicting them without a modality.

Raw Dask, not Prefect's tasks: a task run costs as much as scoring a small case (0.1 s), and nobody asks for one a case.
"""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from infra.clusters import ClusterError, cluster_options, worker_count, worker_seen
from infra.settings import Settings
from tasks.case_map import HERE, Item, Result
from tasks.processes import usable_cores

if TYPE_CHECKING:
    from distributed import Client, Future

LARGE = 1_000_000_000
"""Voxels of all cases from which on they are worth workers. Measured: scoring 9 million takes 0.3 s of a core, starting
a worker (torch, MONAI) 5 s."""
AHEAD = 4
"""Cases by worker that are handed out before the first of them is back: workers never wait, and few results do."""
TICK_SECONDS = 1.0


class CaseWorkers:
    """A tasks.case_map.CaseMap: cases are worked on here while they are few, and by Dask's workers when they are many.

    Workers are started when first needed, and stay until the end of the `with` block. A case whose worker dies is
    worked on again by another one; a case that kills every worker (`distributed.scheduler.allowed-failures`) fails the
    flow.
    """

    def __init__(self, settings: Settings, large: int = LARGE) -> None:
        self.settings, self.large = settings, large
        self.show: Callable[[str], None] = lambda _: None
        """Is told how many cases of the present row are done, in words."""
        self._open = ExitStack()
        self._client: Client | None = None
        self._count = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client = None
        self._open.close()

    @property
    def own_gpus(self) -> bool:
        """Whether every worker has a GPU of its own."""
        return self.settings.cluster == "cuda"

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], voxels: int) -> Iterator[Result]:
        """Yield `function(item)` of every item, in their order; see tasks.case_map.CaseMap.

        Raises ClusterError when there are no workers, and for an item that killed too many of them.
        """
        many = len(items) > 1 and len(items) * voxels >= self.large
        results = self._on_workers(function, items) if many else HERE(function, items, voxels)
        where = f" on {self._started()} workers" if many else ""
        for done, result in enumerate(results, start=1):
            self.show(f"{done} of {len(items)} cases{where}")
            yield result

    def _started(self) -> int:
        """Start the cluster unless it runs, and return how many workers it has."""
        if self._client is None:
            from distributed import Client  # few evaluations need it

            self._count = worker_count(self.settings)
            place = _cluster(self.settings, self._count, self._open)
            self._client = self._open.enter_context(Client(place, set_as_default=False))
        return self._count

    def _on_workers(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        self._started()
        client, todo, waiting = self._client, iter(items), deque[Any]()
        assert client is not None
        # Sent once, and made again on another worker when the one that holds it dies.
        held = client.submit(_same, function, pure=False)
        try:
            while True:
                room = AHEAD * self._count - len(waiting)
                waiting.extend(client.submit(_call, held, item, pure=False) for item in islice(todo, room))
                if not waiting:
                    return
                yield _result(client, waiting[0])
                waiting.popleft()
        finally:
            client.cancel([*waiting, held])


def _cluster(settings: Settings, count: int, stack: ExitStack) -> Any:
    """Return what a client connects to: an address, or a cluster that is closed with the stack."""
    options = cluster_options(settings)
    if "address" in options:
        return options["address"]
    module, _, name = options["cluster_class"].rpartition(".")
    given = dict(options["cluster_kwargs"])
    if settings.cluster in ("local", "cuda"):
        # Dask gives a worker one thread for arithmetic; a prediction may use the cores that nobody else has.
        threads = str(max(1, usable_cores() // count))
        given["env"] = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return stack.enter_context(getattr(importlib.import_module(module), name)(**given))


def _result(client: Client, future: Future) -> Any:
    """Return what a worker answered; raises what the function raised, and ClusterError where nobody answers."""
    from distributed import KilledWorker, wait

    seen = time.monotonic()
    while not future.done():
        try:
            with client.as_current():
                wait(future, timeout=TICK_SECONDS)
        except TimeoutError:
            seen = worker_seen(client, seen, "finished rows are kept")
    try:
        return future.result()
    except KilledWorker as error:
        raise ClusterError(
            "a case killed every worker that had it, probably for want of memory: give workers more "
            "(BRAINLOOM_WORKER_MEMORY), or start fewer of them (BRAINLOOM_WORKERS); finished rows are kept"
        ) from error


def _same(function: Any) -> Any:
    return function


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)
