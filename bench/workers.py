"""Two Dask workers against one, on the same full-size cases, through the cluster that the flow uses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from distributed import Client, LocalCluster

from bench.inputs import DATASET
from bench.timing import Ratio, Rounds, Target, race
from infra.clusters import cluster_options
from infra.settings import Settings
from models.records import PlannedCase, Scan
from models.spec import PreprocessSpec
from models.store import create_or_open
from models.store_writer import open_writer
from tasks import plan as plans
from tasks.preprocess import preprocess_case

CASES = 16
"""Enough that the end, when one worker has nothing more to do, weighs little."""
ONE, TWO = "one worker", "two workers"


def measure(
    folder: Path, scans: list[Scan], spec: PreprocessSpec, rounds: int
) -> tuple[dict[str, Rounds], list[Target]]:
    """Let one worker and both preprocess the same cases in turn; both workers are up all the time."""
    url, cases = _planned(folder / "workers.zarr", scans, spec)
    options = cluster_options(Settings(state_dir=folder / "state", workers=2))["cluster_kwargs"]
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        workers = sorted(client.scheduler_info()["workers"])
        rivals = {ONE: workers[:1], TWO: workers}
        results = race({name: partial(_run, client, used, cases, spec, url) for name, used in rivals.items()}, rounds)
    return results, [
        Target("two workers / one worker, cases per second", Ratio.of(results[ONE], results[TWO]), 1.8, True)
    ]


def _planned(store: Path, scans: list[Scan], spec: PreprocessSpec) -> tuple[str, list[PlannedCase]]:
    """Plan the same files as CASES cases of a new store."""
    copies = [scan.replace(case=f"case{k}", subject=f"case{k}") for k in range(CASES) for scan in scans]
    writer = create_or_open(str(store), spec)
    cases = list(plans.plan_rows(plans.cases_from_scans(copies), (), spec).added)
    plans.write_plan(writer.url, cases, spec.content_digest())
    writer.grow(DATASET, len(cases), with_label=False)
    return writer.url, cases


def _run(client: Client, workers: list[str], cases: list[PlannedCase], spec: PreprocessSpec, url: str) -> None:
    """Deal the cases to the workers in turn and wait for all of them."""
    client.gather(
        [
            client.submit(_write, case, spec, url, workers=[workers[k % len(workers)]], pure=False)
            for k, case in enumerate(cases)
        ]
    )


def _write(case: PlannedCase, spec: PreprocessSpec, url: str) -> None:
    preprocess_case(case, spec, open_writer(url))
