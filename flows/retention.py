"""Retention: what a server and workspaces may lose when it is old, listed first and removed on request."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from pydantic import ConfigDict, Field

from flows.artifacts import publish_markdown, publish_table
from flows.forms import Form, params_of
from tasks.retention import (
    Removal,
    finished_checkpoints,
    leftovers,
    remove,
    staged_copies,
    unfinished_trainings,
)

OUR_FLOWS = (
    *("benchmark", "catalog", "evaluate", "ingest", "phantom", "preprocess", "pretrain", "probe", "prompt"),
    *("propose-pretraining", "retention", "train-node", "verify"),
)
"""Flow runs of other flows, on a server that is shared, are never touched."""
PAGE = 200
SHOWN = 500
_log = logging.getLogger(__name__)


class RetentionParams(Form):
    """What may go, by age. Stores, tables and the weights of finished trainings never go."""

    model_config = ConfigDict(title="Retention")

    dry_run: bool = Field(True, title="Dry run", description="List what would be removed; remove nothing.")
    flow_run_days: int | None = Field(
        90,
        ge=1,
        title="Days of flow runs",
        description="Ended flow runs of brainloom go after so many days, at least 1, with their logs and artifacts. "
        "Empty: they stay.",
    )
    keep_last: int = Field(
        20,
        ge=1,
        le=10_000,
        title="Newest flow runs",
        description="Of each flow that stay whatever their age, 1 to 10000.",
    )
    workspaces: list[str] = Field(
        default=["./state/ingest"],
        title="Workspaces",
        description="Local folders to look into for what is below; may be empty.",
        examples=[["./state/ingest", "./state/demo"]],
    )
    leftover_days: int | None = Field(
        7,
        ge=1,
        title="Days of half-written files",
        description="Files that a killed process left outside of stores go after so many days, at least 1. Empty: "
        "they stay.",
    )
    unfinished_days: int | None = Field(
        None,
        ge=7,
        title="Days of unfinished trainings",
        description="Folders of trainings that never finished go when nothing was written for so many days, at least "
        "7. Empty: they stay, and can be continued.",
    )
    checkpoint_days: int | None = Field(
        None,
        ge=1,
        title="Days of checkpoints",
        description="Checkpoints of finished trainings go after so many days, at least 1; their weights stay. Empty: "
        "they stay.",
    )
    stage_dirs: list[str] = Field(
        default_factory=list, title="Staging folders", description="Local folders with copies of cases; may be empty."
    )
    staged_days: int = Field(
        30,
        ge=1,
        title="Days of staged copies",
        description="Copies that no training used for so many days go, at least 1. They are copied again when needed.",
    )


def _run_name() -> str:
    return "retention (dry run)" if params_of(RetentionParams).dry_run else "retention"


@flow(name="retention", flow_run_name=_run_name)
def retention(params: RetentionParams) -> dict[str, Any]:
    """List what is older than allowed and, unless it is a dry run, remove it; what was used again since then stays."""
    files = list(find_files(params))
    with get_client(sync_client=True) as client:
        runs = old_flow_runs(client, params.flow_run_days, params.keep_last)
        gone = [] if params.dry_run else [one for one, days in files if remove(one, days)]
        deleted = 0 if params.dry_run else sum(delete_flow_run(client, run) for run in runs)
    shown = [one for one, _ in files] if params.dry_run else gone
    count = len(runs) if params.dry_run else deleted
    publish_markdown("retention", summary(shown, count, params.dry_run), "What went, or would go")
    publish_table("retention-files", [_row(one) for one in shown[:SHOWN]], "Files, at most 500")
    publish_table("retention-flow-runs", [_run_row(run) for run in runs[:SHOWN]], "Flow runs, at most 500")
    for one in gone:
        _log.info("removed %s %s (%.3f MB)", one.kind, one.name, one.size / 1e6)
    return {
        "dry_run": params.dry_run,
        "flow_runs": count,
        "files": dict(Counter(one.kind for one in shown)),
        "bytes": sum(one.size for one in shown),
    }


def find_files(params: RetentionParams) -> Iterator[tuple[Removal, int]]:
    """Yield what workspaces and staging folders may lose, with the age in days from which on."""
    finders: tuple[tuple[Callable[[Path, float], list[Removal]], int | None, Sequence[str]], ...] = (
        (leftovers, params.leftover_days, params.workspaces),
        (unfinished_trainings, params.unfinished_days, params.workspaces),
        (finished_checkpoints, params.checkpoint_days, params.workspaces),
        (staged_copies, params.staged_days, params.stage_dirs),
    )
    for find, days, folders in finders:
        if days is not None:
            for folder in folders:
                yield from ((one, days) for one in find(Path(folder).resolve(), days))


def old_flow_runs(client: SyncPrefectClient, days: int | None, keep_last: int) -> list[FlowRun]:
    """Return the ended flow runs of our flows that are older than so many days, but for the newest of each flow."""
    if days is None:
        return []
    limit = _now() - timedelta(days=days)
    ended = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=sorted(TERMINAL_STATES))))
    found: list[FlowRun] = []
    for name in OUR_FLOWS:
        offset = keep_last
        while page := client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[name])),
            flow_run_filter=ended,
            sort=FlowRunSort.END_TIME_DESC,
            limit=PAGE,
            offset=offset,
        ):
            found += [run for run in page if run.end_time is not None and run.end_time < limit]
            offset += PAGE
    return found


def delete_flow_run(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Delete a flow run with its logs, which the server deletes, and its artifacts; False when it is gone already."""
    one = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    while artifacts := client.read_artifacts(artifact_filter=one, limit=PAGE):
        for artifact in artifacts:
            client.delete_artifact(artifact.id)
    try:
        client.delete_flow_run(run.id)
    except ObjectNotFound:
        return False
    return True


def summary(files: Sequence[Removal], flow_runs: int, dry_run: bool) -> str:
    """Return Markdown with counts and bytes by kind."""
    kinds = sorted({one.kind for one in files})
    lines = [f"- {flow_runs} flow runs with their logs and artifacts"]
    for kind in kinds:
        sizes = [one.size for one in files if one.kind == kind]
        lines.append(f"- {kind}: {len(sizes)}, {sum(sizes) / 1e6:.1f} MB")
    first = "**Dry run: nothing was removed.** These would go:" if dry_run else "Removed:"
    return "\n".join([first, "", *lines])


def _now() -> datetime:
    return datetime.now(UTC)


def _row(one: Removal) -> dict[str, Any]:
    return {"what": one.kind, "where": one.name, "MB": one.size / 1e6, "age in days": round(one.age_days, 1)}


def _run_row(run: FlowRun) -> dict[str, Any]:
    return {"flow run": run.name, "state": run.state_name, "ended": str(run.end_time)[:19]}
