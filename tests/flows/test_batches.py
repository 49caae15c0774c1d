"""Batches on a Dask cluster whose only worker dies again and again, as its scheduler tells with 0 allowed failures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import distributed
import pytest

from flows import batches
from flows.batches import ROUNDS, BatchRunner
from models.records import PlannedCase, SourceFile
from tasks import receipts

SOURCE = SourceFile(modality="t1", path="t1.nii", size_bytes=1, etag="")
CASES = [PlannedCase(dataset="toy", row=k, case=f"s{k}", subject=f"s{k}", files=(SOURCE,)) for k in range(5)]


class Run:
    """The future of a task run whose worker died before it ended, or whose case was given up."""

    task_run_id = "1"

    def __init__(self, given_up: bool) -> None:
        self.given_up = given_up
        self.wrapped_future: Future[None] = Future()
        self.wrapped_future.set_result(None)

    def result(self) -> dict[str, dict[str, int]]:
        if self.given_up:
            return {"cases": {"quarantined": 1}, "seconds": {}}
        raise distributed.KilledWorker("batch", None, 1)


class OneWorker:
    """A cluster of one worker, which dies of every case that it begins, and takes along those that wait for it."""

    client = None

    def __init__(self, url: str, *, begins: bool = True) -> None:
        self.url = url
        self.begins = begins
        self.left = [case.case for case in CASES]

    def submit(self, _: Any, parameters: dict[str, Any]) -> Run:
        case = PlannedCase.model_validate(json.loads(parameters["cases_json"])[0])
        begun = self.begins and case.case == self.left[0]
        given_up = begun and not receipts.claim_attempt(self.url, parameters["token"], case)
        if given_up:
            self.left.remove(case.case)
        return Run(given_up)


@pytest.fixture(autouse=True)
def _without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_mark_crashed", lambda _: None)


def run(cluster: OneWorker) -> list[str]:
    def missing(cases: Sequence[PlannedCase]) -> list[PlannedCase]:
        return [case for case in cases if case.case in cluster.left]

    runner: Any = cluster
    return BatchRunner(runner, cluster.url, "lease", 1).run([[case] for case in CASES], missing, lambda: None)


def test_five_cases_that_kill_their_worker_twice_each_are_all_given_up(tmp_path: Path) -> None:
    """Ten deaths of one worker, more than the rounds that are allowed when nothing was begun."""
    cluster = OneWorker(str(tmp_path))
    assert run(cluster) == []
    assert cluster.left == []
    assert receipts.begun(cluster.url, "lease") == len(CASES) * receipts.MAX_ATTEMPTS


def test_workers_that_die_before_they_begin_a_case_end_it(tmp_path: Path) -> None:
    (told,) = run(OneWorker(str(tmp_path), begins=False))
    assert told == (
        f"5 cases from toy/s0 on lost their worker before any of them was begun, {ROUNDS + 1} times: see the logs of "
        "the workers"
    )


def test_attempts_of_another_lease_are_not_counted(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert receipts.begun(url, "mine") == 0
    for token in ("mine~0", "mine~1", "minestrone~0"):
        receipts.claim_attempt(url, token, CASES[0])
    assert receipts.begun(url, "mine") == 2
