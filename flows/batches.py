"""Submitting case batches to Dask workers, and surviving the workers that die of them.

A dead worker ends as `KilledWorker` in the future of its batch, and Prefect leaves that task run `Running` for ever:
the future is asked here, the task run is marked, and the batch's cases without a receipt are submitted one by one. A
batch for which storage or Prefect server were away longer than its retries last is submitted again. A scheduler that is
lost forgets what it was asked to do: its batches are submitted again when it is back, else the flow ends.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import distributed
import httpx
from distributed.client import FutureCancelledError
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed
from prefect_dask import DaskTaskRunner

from flows.artifacts import pictures_allowed
from infra.clusters import ClusterLostError, worker_seen
from infra.storage import StorageError
from models.records import PlannedCase
from tasks import receipts

TASK_RUNS_MAX = 400
"""Case batches of one flow run: beyond 500 task runs the UI's graph is of no use, beyond 10,000 events are lost."""
TASK_RUNS, TASK_RUNS_PER_WORKER = 32, 8
"""Case batches are enlarged beyond these: a task run costs 0.1 s, and with fewer workers would idle at the end."""
TICK_SECONDS = 1.0
ROUNDS = 3
"""How often cases are submitted again when storage, server or scheduler were away, or workers died without a case."""
WATCH_SHARE = 0.05
"""Share of the flow's time that it may spend on listing receipts, however many there are and however slow a list."""
API_ERRORS = (httpx.HTTPError, ObjectNotFound, OSError)
"""What telling the server a state may end with; a server that is away is no reason to end a flow."""
SCHEDULER_LOST = (
    "the connection to the Dask scheduler was lost; finished cases stay. See why it ended (its log, its host's memory, "
    "the network), start it and its workers, and start the flow again"
)
_log = logging.getLogger(__name__)

Outcome = tuple[dict[str, dict[str, Any]], BaseException | None]
"""`cases` of a batch by status and its `seconds` by step, and what it raised."""


def split_batches(cases: Sequence[PlannedCase], size: int, workers: int = 1) -> list[list[PlannedCase]]:
    """Cut cases into batches of one dataset each, of at most `size` cases.

    Smaller when workers would idle, larger when there would be too many task runs.
    """
    fair = max(1, min(size, -(-len(cases) // max(1, 2 * workers))))
    fair = max(fair, -(-len(cases) // min(TASK_RUNS_MAX, max(TASK_RUNS, TASK_RUNS_PER_WORKER * workers))))
    batches: list[list[PlannedCase]] = []
    for case in sorted(cases, key=lambda c: (c.dataset, c.row)):
        if not batches or len(batches[-1]) >= fair or batches[-1][-1].dataset != case.dataset:
            batches.append([])
        batches[-1].append(case)
    return batches


@dataclass(frozen=True)
class _Batch:
    """Cases of one task run, and how often storage, server or scheduler were away while they ran."""

    cases: tuple[PlannedCase, ...]
    away: int = 0

    @property
    def name(self) -> str:
        return f"{self.cases[0].dataset}/{_label(self.cases[0])}"


class ReceiptWatch:
    """How many of some cases have a receipt, told from listings."""

    def __init__(
        self, store_url: str, cases: Sequence[PlannedCase], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store_url = store_url
        self.cases = cases
        self._clock = clock
        self._done = 0
        self._not_before = -math.inf

    def missing(self, some: Sequence[PlannedCase]) -> list[PlannedCase]:
        """Return those of some cases that have no receipt; raises StorageError when the store does not answer."""
        there = receipts.receipt_rows(self.store_url, (case.dataset for case in some))
        return [case for case in some if (case.dataset, case.row) not in there]

    def done(self, now: bool = False) -> int:
        """Return how many of the cases had a receipt when it was last looked; looks again when it is time to, or now.

        A store that does not answer is no reason to end the flow: workers have retries of their own.
        """
        began = self._clock()
        if now or began >= self._not_before:
            try:
                self._done = len(self.cases) - len(self.missing(self.cases))
            except StorageError as error:
                _log.warning("receipts cannot be counted at the moment: %s", error)
            ended = self._clock()
            self._not_before = ended + (ended - began) / WATCH_SHARE
        return self._done


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
        self.status: Counter[str] = Counter()
        """Cases of the finished batches by status."""
        self.seconds: Counter[str] = Counter()
        """Of the workers in finished batches, by step."""

    def run(
        self,
        batches: Sequence[Sequence[PlannedCase]],
        missing: Callable[[Sequence[PlannedCase]], list[PlannedCase]],
        on_tick: Callable[[], None],
    ) -> list[str]:
        """Run all batches and return what went wrong, one sentence per failed batch.

        missing: returns those of some cases that have no receipt yet; on_tick: called about once a second. Raises
        ClusterLostError.

        A worker that dies may take cases along that only waited for it, so a round of deaths counts when no case was
        begun in it; a case is begun receipts.MAX_ATTEMPTS times, so there is an end.
        """
        failures: list[str] = []
        waiting = [_Batch(tuple(batch)) for batch in batches]
        begun, in_vain = 0, 0
        while waiting:
            alone: list[_Batch] = []
            again: list[_Batch] = []
            for batch, (told, error) in self._round(waiting, on_tick):
                self.status.update(told.get("cases", {}))
                self.seconds.update(told.get("seconds", {}))
                if isinstance(error, distributed.KilledWorker):
                    alone += [_Batch((case,), batch.away) for case in missing(batch.cases)]
                elif error is not None and _away(error) and batch.away < ROUNDS:
                    _log.warning("batch from %s runs again: %s", batch.name, _short(error))
                    again.append(_Batch(batch.cases, batch.away + 1))
                elif isinstance(error, FutureCancelledError) and batch.away < ROUNDS:
                    self._await_scheduler(error)
                    again.append(_Batch(batch.cases, batch.away + 1))
                elif error is not None:
                    failures.append(f"batch of {len(batch.cases)} cases from {batch.name}: {_short(error)}")
            if alone:
                before, begun = begun, receipts.begun(self.store_url, self.token)
                in_vain = in_vain + 1 if begun == before else 0
                if in_vain > ROUNDS:
                    what = f"{len(alone)} cases from {alone[0].name} on lost their worker before any of them was begun"
                    return [*failures, f"{what}, {in_vain} times: see the logs of the workers"]
                _log.warning("%d cases have no receipt after their worker died; running each alone", len(alone))
            waiting = [*again, *alone]
        return failures

    def _round(self, batches: Sequence[_Batch], on_tick: Callable[[], None]) -> Iterator[tuple[_Batch, Outcome]]:
        """Submit batches and yield each with its outcome as it ends."""
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
                seen = worker_seen(self.runner.client, seen, "finished cases stay")
                on_tick()
                continue
            left -= 1
            yield batches[index], _outcome(futures[index])
            on_tick()

    def _await_scheduler(self, error: FutureCancelledError) -> None:
        """Wait while Dask tries to reach the scheduler again, its time limit for connections; one may be back, empty.

        Raises ClusterLostError when it is not.
        """
        client = self.runner.client
        while client.status == "connecting":
            time.sleep(TICK_SECONDS)
        if client.status != "running":
            raise ClusterLostError(SCHEDULER_LOST) from error

    def _submit(self, batch: _Batch) -> Any:
        parameters = {
            "store_url": self.store_url,
            "cases_json": json.dumps([case.model_dump(mode="json") for case in batch.cases]),
            "token": receipts.attempt_token(self.token, batch.away),
            "memory_bytes": self.memory_bytes,
            "device": self.device,
            "dataset": batch.cases[0].dataset,
            "first": _label(batch.cases[0]),
            "others": len(batch.cases) - 1,
            "named": pictures_allowed(),
        }
        from tasks.preprocess import preprocess_batch_task  # loads torch: a flow run with nothing to do goes without

        return self.runner.submit(preprocess_batch_task, parameters=parameters)


def _label(case: PlannedCase) -> str:
    """Return what calls a case in names and states of runs, which everybody sees who reaches the API."""
    return case.case if pictures_allowed() else f"row {case.row}"


def _outcome(future: Any) -> Outcome:
    """Return what became of a batch; one whose worker died is marked, for Prefect would show it running."""
    try:
        return future.result(), None
    except distributed.KilledWorker as error:
        _mark_crashed(future.task_run_id)
        return {}, error
    except Exception as error:  # noqa: BLE001 - whatever a batch raised is reported when the others have finished
        return {}, error


def _away(error: BaseException) -> bool:
    """Say whether storage or Prefect server did not answer: then a batch is worth another try.

    A task run that does not come about for that says so in prefect 3.8.8's words.
    """
    unreached = isinstance(error, RuntimeError) and str(error).startswith("Failed to reach API")
    return unreached or isinstance(error, StorageError | httpx.TransportError)


def _mark_crashed(task_run_id: Any) -> None:
    state: Any = Crashed(message="the Dask worker died; its cases run again, each alone")
    try:
        with get_client(sync_client=True) as client:
            client.set_task_run_state(task_run_id, state, force=True)
    except API_ERRORS as error:
        _log.warning("task run %s could not be marked as crashed: %s", task_run_id, error)


@contextmanager
def none_left_running() -> Iterator[None]:
    """Mark the task runs that nobody waits for any more when what is inside raises; Prefect would show them running.

    Meant for around the cluster: its workers are gone then and have told what they could. One of a worker that lives on
    tells its end itself.
    """
    try:
        yield
    except BaseException as error:
        _end_task_runs(f"the flow run ended before this case batch did: {type(error).__name__}")
        raise


def _end_task_runs(why: str) -> None:
    if (flow_run := runtime.flow_run.id) is None:
        return
    ours = FlowRunFilter.model_validate({"id": {"any_": [UUID(flow_run)]}})
    unfinished = TaskRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
    state: Any = Crashed(message=why)
    try:
        with get_client(sync_client=True) as client:
            for run in client.read_task_runs(flow_run_filter=ours, task_run_filter=unfinished):
                client.set_task_run_state(run.id, state, force=True)
    except API_ERRORS as error:
        _log.warning("task runs of flow run %s could not be marked as crashed: %s", flow_run, error)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
