"""What a Prefect server holds of a forgotten subject: artifacts, and flow runs whose logs, tasks or states name it.

A log line or a task run cannot be erased alone, so an ended flow run that names the subject goes as a whole: its logs,
task runs and artifacts with it. Of all others only the artifacts that show it go. Events name task runs, too: the
server drops them by their age alone (seven days on our own). Nothing outside of brainloom's flows is touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.exceptions import ObjectNotFound

from flows.artifacts import artifact_key
from flows.retention import OUR_FLOWS, PAGE, delete_flow_run
from tasks.forget_reach import Person

PICTURES = ("reconstruction-", "templates-")
"""Starts of keys of artifacts with pictures of a training: whom they show stands in no word."""
QC = "qc"
"""Key of quality pages, whose pictures bear the names of their cases."""
COLUMNS = ("subject", "subject_a", "subject_b")


@dataclass
class ServerReach:
    """What a server holds of a subject."""

    artifacts: list[Artifact] = field(default_factory=list)
    """That name it or may show it, of flow runs that stay."""
    flow_runs: list[FlowRun] = field(default_factory=list)
    """Ended ones, whose logs, task runs or states name it."""
    running: list[FlowRun] = field(default_factory=list)
    """Not ended yet: what they say of it later is not known, so forget has to be run again."""


def search_server(person: Person, trained: Sequence[str] = ()) -> ServerReach:
    """Return what the current Prefect API holds of a subject; changes nothing.

    trained: trainings that selected it, whose pictures may show it.
    """
    found = ServerReach()
    with get_client(sync_client=True) as client:
        for run in _flow_runs(client):
            artifacts = [one for one in _artifacts(client, run) if _shows(one, person, trained)]
            named = _is_named(client, run, person)
            if not (artifacts or named):
                continue
            if run.state is None or not run.state.is_final():
                found.running.append(run)
            elif named:
                found.flow_runs.append(run)
                continue
            found.artifacts += artifacts
    return found


def erase_from_server(found: ServerReach) -> None:
    """Delete what was found; what is gone already is no error."""
    with get_client(sync_client=True) as client:
        for artifact in found.artifacts:
            try:
                client.delete_artifact(artifact.id)
            except ObjectNotFound:
                continue
        for run in found.flow_runs:
            delete_flow_run(client, run)


def _flow_runs(client: SyncPrefectClient) -> Iterator[FlowRun]:
    flows = FlowFilter(name=FlowFilterName(any_=list(OUR_FLOWS)))
    yield from _pages(lambda offset: client.read_flow_runs(flow_filter=flows, limit=PAGE, offset=offset))


def _artifacts(client: SyncPrefectClient, run: FlowRun) -> Iterator[Artifact]:
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    yield from _pages(lambda offset: client.read_artifacts(artifact_filter=mine, limit=PAGE, offset=offset))


def _is_named(client: SyncPrefectClient, run: FlowRun, person: Person) -> bool:
    """Say whether name, parameters, state, a log line or a task run of a flow run names the subject."""
    if person.is_in(f"{run.name} {run.parameters} {run.state.message if run.state else ''}"):
        return True
    logs = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    lines = _pages(lambda offset: client.read_logs(logs, limit=PAGE, offset=offset))
    if any(person.is_in(line.message) for line in lines):
        return True
    mine = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run.id]))
    tasks = _pages(lambda offset: client.read_task_runs(task_run_filter=mine, limit=PAGE, offset=offset))
    return any(person.is_in(f"{task.name} {task.state.message if task.state else ''}") for task in tasks)


def _shows(artifact: Artifact, person: Person, trained: Sequence[str]) -> bool:
    key = artifact.key or ""
    if key.startswith(PICTURES) and any(key.endswith(f"-{artifact_key(Path(name).name)}") for name in trained):
        return True
    if key == QC and not person.is_told_by_words:
        return True
    if person.is_in(f"{artifact.data} {artifact.description or ''}"):
        return True
    data = artifact.data if artifact.type == "table" else None
    rows: Any = json.loads(data) if isinstance(data, str) else data or []
    return any(row.get(name) == person.subject for row in rows for name in COLUMNS)


def _pages(read: Callable[[int], list[Any]]) -> Iterator[Any]:
    offset = 0
    while page := read(offset):
        yield from page
        offset += PAGE
