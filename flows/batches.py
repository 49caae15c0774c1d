"""Submitting case batches to Dask workers, and surviving the workers that die of them.

A dead worker ends as `KilledWorker` in the future of its batch, and Prefect leaves that task run `Running` for ever:
the future is asked here, the task run is marked, and the batch's cases without a receipt are submitted one by one.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import distributed
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Crashed
from prefect_dask import DaskTaskRunner

from models.records import PlannedCase
from tasks.preprocess import preprocess_batch_task

TASK_RUNS_MAX = 400
"""Case batches of one flow run: beyond 500 task runs the UI's graph is of no use, beyond 10,000 events are lost."""
TICK_SECONDS = 1.0
WORKERLESS_SECONDS = 300.0
"""How long the scheduler may be without any worker before the flow fails instead of waiting."""
ROUNDS = 3
"""How often cases without a receipt are submitted again after their workers died."""
_log = logging.getLogger(__name__)

Line = dict[str, Any]


def split_batches(cases: Sequence[PlannedCase], size: int, workers: int = 1) -> list[list[PlannedCase]]:
    """Cut cases into batches of one dataset each, of at most `size` cases.

    Smaller when workers would idle, larger when there would be too many task runs.
    """
    fair = max(1, min(size, -(-len(cases) // max(1, 2 * workers))))
    fair = max(fair, -(-len(cases) // TASK_RUNS_MAX))
    batches: list[list[PlannedCase]] = []
    for case in sorted(cases, key=lambda c: (c.dataset, c.row)):
        if not batches or len(batches[-1]) >= fair or batches[-1][-1].dataset != case.dataset:
            batches.append([])
        batches[-1].append(case)
    return batches


class BatchRunner:
    """Runs case batches of one store on a started DaskTaskRunner."""

    def __init__(
        self, runner: DaskTaskRunner, store_url: str, token: str, memory_bytes: int, device: str = "cpu"
    ) -> None:
        self.runner = runner
        self.store_url = store_url
        self.token = token
        self.memory_bytes = memory_bytes
        self.device = device

    def run(
        self,
        batches: Sequence[Sequence[PlannedCase]],
        missing: Callable[[Sequence[PlannedCase]], list[PlannedCase]],
        on_tick: Callable[[], None],
    ) -> list[str]:
        """Run all batches and return what went wrong, one sentence per failed batch.

        missing: returns those of some cases that have no receipt yet; on_tick: called about once a second.
        """
        failures: list[str] = []
        waiting = [list(batch) for batch in batches]
        for _ in range(ROUNDS + 1):
            killed: list[PlannedCase] = []
            for batch, error in self._round(waiting, on_tick):
                if isinstance(error, distributed.KilledWorker):
                    killed += missing(batch)
                elif error is not None:
                    failures.append(f"batch of {len(batch)} cases from {_name(batch[0])}: {_short(error)}")
            if not killed:
                return failures
            _log.warning("%d cases have no receipt after their worker died; running each alone", len(killed))
            waiting = [[case] for case in killed]
        return [*failures, f"{len(waiting)} cases from {_name(waiting[0][0])} on lost their worker in every round"]

    def _round(
        self, batches: Sequence[Sequence[PlannedCase]], on_tick: Callable[[], None]
    ) -> Iterator[tuple[Sequence[PlannedCase], BaseException | None]]:
        """Submit batches and yield each with its error as it ends."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        futures = [self._submit(batch) for batch in batches]
        seen = time.monotonic()
        for index, future in enumerate(futures):
            # A worker's death ends a future too, while Prefect's own waiting would go on for ever.
            future.wrapped_future.add_done_callback(lambda _, index=index: ended.put(index))
        left = len(futures)
        while left:
            try:
                index = ended.get(timeout=TICK_SECONDS)
            except queue.Empty:
                seen = self._worker_seen(seen)
                on_tick()
                continue
            left -= 1
            yield batches[index], _outcome(futures[index])
            on_tick()

    def _worker_seen(self, last: float) -> float:
        """Return when a worker was last there; raises RuntimeError when that is too long ago."""
        now = time.monotonic()
        if self.runner.client.ncores():
            return now
        if now - last > WORKERLESS_SECONDS:
            raise RuntimeError(
                f"no Dask worker for {now - last:.0f} s; finished cases stay. See why workers do not start "
                "(memory, BRAINLOOM_CLUSTER) and start the flow again"
            )
        return last

    def _submit(self, batch: Sequence[PlannedCase]) -> Any:
        parameters = {
            "store_url": self.store_url,
            "cases": [case.model_dump(mode="json") for case in batch],
            "token": self.token,
            "memory_bytes": self.memory_bytes,
            "device": self.device,
            "dataset": batch[0].dataset,
            "first": batch[0].case,
            "others": len(batch) - 1,
        }
        return self.runner.submit(preprocess_batch_task, parameters=parameters)


def _outcome(future: Any) -> BaseException | None:
    """Return what a batch raised, or None; a batch whose worker died is marked, for Prefect would show it running."""
    try:
        future.result()
    except distributed.KilledWorker as error:
        _mark_crashed(future.task_run_id)
        return error
    except Exception as error:  # noqa: BLE001 - whatever a batch raised is reported when the others have finished
        return error
    return None


def _mark_crashed(task_run_id: Any) -> None:
    state: Any = Crashed(message="the Dask worker died; its cases run again, each alone")
    try:
        with get_client(sync_client=True) as client:
            client.set_task_run_state(task_run_id, state, force=True)
    except (PrefectHTTPStatusError, OSError) as error:
        _log.warning("task run %s could not be marked as crashed: %s", task_run_id, error)


def _name(case: PlannedCase) -> str:
    return f"{case.dataset}/{case.case}"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
