"""Many flow runs at once through deployments on a real worker, on SQLite and on PostgreSQL, while somebody watches.

The deployments are those of prefect.yaml with their limits: catalogs run side by side, one preprocess and one verify at
a time. Nothing may be lost: every flow run ends as Completed, with all its task runs, and its result is right.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.catalog import write_cohort
from bench.postgres import PostgresServer, processor_seconds
from bench.scale import SPEC, write_brain
from bench.timing import machine
from bench.watching import Watcher, errors_in, latency_table, log_retryable
from infra.api import FINAL_STATES, request_json
from infra.deploy import PROJECT_FILE, deploy, find_project, start_worker, stop_worker
from infra.server import ServerInfo, ensure_server, stop_server
from infra.settings import Settings
from models.store import store_digest
from tasks.catalog import read_catalog, rows_digest

RUNS = 20
PLACES = 8
"""Flow runs that the worker runs at once."""
SHARE = 1 / 150
"""Of BrainMVP-16k, as files of 24x24x16 voxels: some hundred scans of two dozen cases."""
MIX = ("catalog/catalog", "preprocess/preprocess", "catalog/catalog", "verify/verify")
"""Started in turn: half of the flow runs may run side by side, the others wait for one another."""
WAIT_S = 1800.0
POLL_S = 1.0
ERRORS = {"503": "answered 503", "500": "answered 500", "locked": "locked, in services"}
"""Counts of the server's log, and their heads in the table."""


@dataclass(frozen=True)
class Place:
    """A server with our deployments and a worker."""

    folder: Path
    settings: Settings
    server: ServerInfo
    database: PostgresServer | None

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Sources of the cohort, as parameters."""
        return list(yaml.safe_load((self.folder / "sources.yaml").read_text()))

    @property
    def reference(self) -> tuple[str, str]:
        """Catalog and store that were there before the flow runs began."""
        return str(self.folder / "ws"), str(self.folder / "reference.zarr")

    def params(self, deployment: str, number: int) -> dict[str, Any]:
        """Return the parameters of a numbered flow run."""
        workspace, store = self.reference
        if deployment == "catalog/catalog":
            return {"sources": self.sources, "workspace": str(self.folder / f"ws-{number}")}
        if deployment == "verify/verify":
            return {"stores": [store], "deep": True}
        own = SPEC.model_dump(mode="json")
        return {"catalog": workspace, "store": str(self.folder / f"{number}.zarr"), "own_spec": own, "workers": 1}

    def processor_s(self) -> float:
        """Processor seconds of the Prefect server and its database so far."""
        family = [psutil.Process(self.server.pid)] if self.server.pid else []
        family += [child for process in family for child in process.children(recursive=True)]
        return processor_seconds(family) + (self.database.processor_s if self.database else 0.0)


@dataclass
class LoadResult:
    """What became of the flow runs."""

    runs: int
    seconds: float
    """From the first request to start one to the end of the last."""
    processor_s: float
    """Of server and database in that time."""
    watcher: Watcher
    states: Counter[str] = field(default_factory=Counter)
    """Of the flow runs at the end, by name; `lost` counts those that the server does not know or that never ended,
    `refused` those that it did not make."""
    late: int = 0
    """Flow runs that were shown as Late while they waited for a place."""
    wrong: list[str] = field(default_factory=list)
    """Sentences about task runs that did not complete and results that are not right."""
    errors: dict[str, int] = field(default_factory=dict)
    """Counts of the server's log."""

    @property
    def whole(self) -> bool:
        """Say whether nothing is lost or wrong."""
        return self.states["Completed"] == self.runs and not self.wrong


@contextmanager
def place(folder: Path, postgres: bool, places: int = PLACES) -> Iterator[Place]:
    """Start server, database, deployments and worker below an empty folder; end them all afterwards."""
    settings, database = Settings(state_dir=folder / "state", flow_runs=places), None
    before = dict(os.environ)
    try:
        if postgres:
            database = PostgresServer(_free_port(), secrets.token_hex(8))
            database.start()
            database.wait()
            database.make_database()
            settings = Settings(state_dir=folder / "state", flow_runs=places, database_url=database.url)
        log_retryable(settings.server_dir)
        # What a flow run starts finds the same state folder.
        os.environ["BRAINLOOM_STATE_DIR"] = str(settings.state_dir)
        server = ensure_server(settings)
        _write_project(folder)
        deploy(settings, folder)
        start_worker(settings)
        found = write_cohort(folder / "cohort", SHARE, write_brain)
        (folder / "sources.yaml").write_text(yaml.safe_dump([source.model_dump(mode="json") for source in found]))
        yield Place(folder, settings, server, database)
    finally:
        stop_worker(settings)
        stop_server(settings)
        if database:
            database.stop()
        os.environ.clear()
        os.environ.update(before)


def _write_project(folder: Path) -> None:
    """Write those deployments of prefect.yaml that are used, without schedules."""
    content = yaml.safe_load((find_project() / PROJECT_FILE).read_text())
    names = {name.rpartition("/")[2] for name in MIX}
    used = [{**one, "schedules": []} for one in content["deployments"] if one["name"] in names]
    (folder / PROJECT_FILE).write_text(yaml.safe_dump({**content, "deployments": used}))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(where: Place, runs: int = RUNS) -> LoadResult:
    """Start all flow runs at once, wait for them while somebody watches, and look at what became of them."""
    api = where.server.api_url
    workspace, store = where.reference
    first = {"catalog/catalog": {"workspace": workspace}, "preprocess/preprocess": {"store": store}}
    for deployment, told in first.items():
        _wait(api, [_start(api, deployment, {**where.params(deployment, 0), **told})])
    wanted = [(MIX[number % len(MIX)], number) for number in range(runs)]
    began, busy = time.perf_counter(), where.processor_s()
    with Watcher(api) as watcher:
        with ThreadPoolExecutor(runs) as pool:
            started = list(pool.map(lambda one: _start_or_none(api, one[0], where.params(*one)), wanted))
        ids = [run_id for run_id in started if run_id]
        ended = _wait(api, ids)
        result = LoadResult(runs, time.perf_counter() - began, where.processor_s() - busy, watcher)
    result.states["refused"] = runs - len(ids)
    for run_id in ids:
        run = ended.get(run_id)
        result.states[run["state_name"] if run and run["state_type"] in FINAL_STATES else "lost"] += 1
        result.late += "Late" in _former_states(api, run_id)
    result.wrong = [*_unfinished_tasks(api, ids), *_wrong_results(where, wanted)]
    result.errors = errors_in(where.settings.server_dir / "server.log")
    return result


def _start(api: str, deployment: str, params: dict[str, Any]) -> str:
    found = request_json(f"{api}/deployments/name/{deployment}", timeout_s=60)
    body = {"parameters": {"params": params}, "state": {"type": "SCHEDULED"}}
    return str(request_json(f"{api}/deployments/{found['id']}/create_flow_run", body, timeout_s=60)["id"])


def _start_or_none(api: str, deployment: str, params: dict[str, Any]) -> str | None:
    try:
        return _start(api, deployment, params)
    except OSError:  # busy for longer than our retries last: `HTTPError` is one, too
        return None


def _wait(api: str, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Wait until all flow runs have ended, half an hour at most, and return what the server knows of them by id."""
    deadline = time.monotonic() + WAIT_S
    while True:
        runs = request_json(f"{api}/flow_runs/filter", {"flow_runs": {"id": {"any_": ids}}}, timeout_s=60)
        if time.monotonic() > deadline or sum(run["state_type"] in FINAL_STATES for run in runs) == len(ids):
            return {run["id"]: run for run in runs}
        time.sleep(POLL_S)


def _former_states(api: str, run_id: str) -> set[str]:
    states = request_json(f"{api}/flow_run_states/?flow_run_id={run_id}", timeout_s=60)
    return {state["name"] for state in states}


def _unfinished_tasks(api: str, ids: list[str]) -> Iterator[str]:
    """Yield what is wrong with the task runs: that one did not complete."""
    body = {"flow_runs": {"id": {"any_": ids}}, "limit": 200}
    for task in request_json(f"{api}/task_runs/filter", body, timeout_s=60):
        if task["state_type"] != "COMPLETED":
            yield f"task run {task['name']} is {task['state_name']}"


def _wrong_results(where: Place, wanted: list[tuple[str, int]]) -> Iterator[str]:
    """Yield what is wrong with catalogs and stores, compared with those that were made before."""
    workspace, store = where.reference
    rows, digest = rows_digest(read_catalog(workspace)), store_digest(store)
    for deployment, number in wanted:
        params = where.params(deployment, number)
        try:
            if deployment == "catalog/catalog" and rows_digest(read_catalog(params["workspace"])) != rows:
                yield f"the catalog of {number} differs from the reference"
            if deployment == "preprocess/preprocess" and store_digest(params["store"]) != digest:
                yield f"the store of {number} differs from the reference"
        except (OSError, ValueError) as error:
            yield f"{deployment} left nothing: {error}"


def table(results: dict[str, LoadResult]) -> str:
    """Return what became of the flow runs as a Markdown table."""
    columns = (
        "seconds",
        "server and database, CPU s",
        "Completed",
        "refused, failed, crashed or lost",
        "wrong",
        "late meanwhile",
    )
    lines = [f"| | {' | '.join((*columns, *ERRORS.values()))} |", "|---" * (len(columns) + 4) + "|"]
    for name, one in results.items():
        done = one.states["Completed"]
        cells = (
            f"{one.seconds:.0f} | {one.processor_s:.0f} | {done} of {one.runs} | {one.runs - done} | {len(one.wrong)}"
        )
        counts = " | ".join(str(one.errors[key]) for key in ERRORS)
        lines.append(f"| {name} | {cells} | {one.late} | {counts} |")
    return "\n".join(lines)


def report(folder: Path, runs: int = RUNS, places: int = PLACES) -> Iterator[str]:
    """Yield the parts of the report as Markdown."""
    yield f"Machine: {machine()}\n"
    results: dict[str, LoadResult] = {}
    for name, postgres in (("SQLite", False), ("PostgreSQL", True)):
        own = folder / name.lower()
        own.mkdir()
        with place(own, postgres, places) as where:
            results[name] = measure(where, runs)
        yield "\n".join([f"{name}: {results[name].seconds:.0f} s", *results[name].wrong, ""])
    yield f"## Load: {runs} flow runs at once, {places} places of one worker\n\n{table(results)}\n"
    yield f"{latency_table({name: one.watcher for name, one in results.items()})}\n"
    yield f"Machine at the end: {machine()}"


def main(runs: int = RUNS) -> None:
    """Print the report, in a quarter of an hour or more. Needs PostgreSQL's server (Debian's package `postgresql`)."""
    with tempfile.TemporaryDirectory(prefix="brainloom-load-") as folder:
        for part in report(Path(folder), runs):
            print(part, flush=True)
