"""Cases on Dask workers: the same results as here, in order; errors, deaths, and workers that are not needed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pandas as pd
import pytest

from flows import case_workers
from flows.case_workers import AHEAD, CaseWorkers
from infra import clusters
from infra.clusters import DASK_CONFIG, ClusterError
from infra.settings import Settings
from models.records import SelectedCase
from tasks.benchmarks import BENCHMARKS
from tasks.scores import RowKey, segmentation_scores

TUMOUR = BENCHMARKS["phantom-tumour"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(workers=2, state_dir=tmp_path / "state", worker_memory="1GiB")


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers in this process; returns one entry for every cluster that was started."""
    started: list[str] = []

    def cluster(_: Settings, count: int, stack: Any) -> Any:
        started.append(f"{count} workers")
        options = {"processes": False, "dashboard_address": None, "threads_per_worker": 1}
        return stack.enter_context(distributed.LocalCluster(n_workers=count, **options))

    monkeypatch.setattr(case_workers, "_cluster", cluster)
    return started


def test_few_cases_are_worked_on_here_and_many_by_workers_that_are_started_once(
    settings: Settings, in_threads: list[str]
) -> None:
    told: list[str] = []
    with CaseWorkers(settings, large=100) as work:
        work.show = told.append
        assert list(work(math.sqrt, [9.0, 4.0], 10)) == [3.0, 2.0]
        assert list(work(math.sqrt, [4.0], 1000)) == [2.0], "of one case there is nothing to share"
        assert list(work(math.sqrt, [], 1000)) == []
        assert not in_threads
        items = [float(k) for k in range(3 * 2 * AHEAD)]
        assert list(work(math.sqrt, items, 10)) == [math.sqrt(k) for k in items]
        assert list(work(math.sqrt, [9.0, 4.0], 50)) == [3.0, 2.0]
    assert in_threads == ["2 workers"]
    assert told[:2] == ["1 of 2 cases", "2 of 2 cases"]
    assert told[-1] == "2 of 2 cases on 2 workers"


def test_the_first_error_in_order_is_raised_and_workers_go_on(settings: Settings, in_threads: list[str]) -> None:
    with CaseWorkers(settings, large=0) as work:
        found = work(math.sqrt, [4.0, -1.0, 9.0, -2.0], 1)
        assert next(found) == 2.0
        with pytest.raises(ValueError, match="math domain error"):
            next(found)
        assert list(work(abs, [-1, -2], 1)) == [1, 2]


def test_a_scheduler_without_workers_is_not_waited_for_for_ever(
    settings: Settings, in_threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case_workers, "worker_count", lambda _: 0)
    monkeypatch.setattr(case_workers, "AHEAD", 2)
    monkeypatch.setattr(clusters, "WORKERLESS_SECONDS", 0.0)
    monkeypatch.setattr(case_workers, "TICK_SECONDS", 0.01)
    with CaseWorkers(settings, large=0) as work:
        monkeypatch.setattr(work, "_started", lambda start=work._started: setattr(work, "_count", 1 + start()))
        with pytest.raises(ClusterError, match=r"no Dask worker for \d+ s; finished rows are kept. See why workers do"):
            list(work(math.sqrt, [4.0, 9.0], 1))


def cube(stop: int) -> np.ndarray:
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[4:stop, 4:8, 4:8] = 1
    return mask


def read_prediction(case: SelectedCase) -> np.ndarray:
    return np.stack([cube(8 + case.row)] * 3)


def read_truth(case: SelectedCase) -> tuple[np.ndarray, tuple[float, float, float]]:
    return cube(8) * 3, (3.0, 3.0, 3.0)


def dies_once(folder: Path, case: SelectedCase) -> np.ndarray:
    """Return a prediction, but kill the process that reads one case for the first time."""
    marker = folder / "died"
    if case.row == 1 and not marker.exists():
        marker.touch()
        os._exit(1)
    return read_prediction(case)


def scored(read: Callable[[SelectedCase], np.ndarray], work: CaseWorkers) -> pd.DataFrame:
    cases = [SelectedCase(dataset="d", row=k, case=f"c{k}", subject=f"s{k}", digest="d", role="test") for k in range(4)]
    return segmentation_scores(RowKey(TUMOUR.name, "scratch", 0), TUMOUR, cases, read, read_truth, work, 1)


@pytest.mark.full
def test_processes_score_what_this_process_scores_and_a_killed_one_is_survived(
    settings: Settings, tmp_path: Path
) -> None:
    with CaseWorkers(settings) as work:
        here = scored(read_prediction, work)
    with CaseWorkers(settings, large=0) as work:
        pd.testing.assert_frame_equal(scored(read_prediction, work), here)
        pd.testing.assert_frame_equal(scored(partial(dies_once, tmp_path), work), here)
    assert (tmp_path / "died").exists()


@pytest.mark.full
def test_a_case_that_kills_every_worker_says_what_to_do(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DASK_CONFIG, "distributed.scheduler.allowed-failures", 0)
    with (
        CaseWorkers(settings, large=0) as work,
        pytest.raises(
            ClusterError, match=r"a case killed every worker that had it, .* \(BRAINLOOM_WORKER_MEMORY\), or"
        ),
    ):
        list(work(os._exit, [1, 1], 1))
