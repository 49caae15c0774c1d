"""Training on the workers of a work pool: a flow run per node, followed together and ended together."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Cancelling

from flows.start import FlowRunError
from flows.train_node import NodeParams
from tasks.follow import MetricsFollower, OnProgress
from tasks.launch import LOG_NAME, TrainingFailed, failure_text, forget_failures, own_failure, ranks_per_node

_log = logging.getLogger(__name__)

DEPLOYMENT = "train-node/train-node"
POLL_S = 2.0
END_S = 120.0
"""For cancelled nodes to write their checkpoint and end."""


def launch_in_pool(
    run_dirs: Sequence[Path],
    world_size: int,
    on_progress: OnProgress | None = None,
    *,
    nodes: int,
    restarts: int = 1,
    stall_seconds: float = 600.0,
    deployment: str = DEPLOYMENT,
) -> None:
    """Run trainings to their end with a flow run of `deployment` per node; their folders are on a shared disk.

    The nodes meet as `tasks.meeting` says. When one of them ends badly the others are cancelled and all begin again
    from their checkpoints, `restarts` times, unless the training failed for a reason of its own or somebody cancelled a
    node. On any exception, KeyboardInterrupt too, all nodes are cancelled and have ended before it is raised again.
    Raises TrainingFailed with the reason, FlowRunError when the deployment is not registered, ValueError when the nodes
    do not divide the ranks.
    """
    ranks_per_node(world_size, nodes)
    folders = [Path(folder).resolve() for folder in run_dirs]
    follower = MetricsFollower(folders, on_progress)
    with get_client(sync_client=True) as client:
        _end_left_behind(client, _tag(folders))
        for attempt in range(restarts + 1):
            forget_failures(folders)
            found = _attempt(client, folders, follower, world_size, nodes, int(stall_seconds), deployment)
            follower.poll()
            bad = [state for state in found if not state.is_completed()]
            if not bad:
                return
            own = own_failure(folders)
            cancelled = any(state.is_cancelled() for state in found) and all(state.is_cancelled() for state in bad)
            if own or cancelled or attempt == restarts:
                words = own or "; ".join(sorted({f"a node ended {state.name}: {state.message}" for state in bad}))
                raise TrainingFailed(failure_text(folders, folders[0] / LOG_NAME, 1, words))
            _log.warning("a node of %s ended %s; all nodes begin again", folders[0].name, bad[0].name)


def _attempt(
    client: SyncPrefectClient,
    folders: list[Path],
    follower: MetricsFollower,
    world_size: int,
    nodes: int,
    stall_seconds: int,
    deployment: str,
) -> list[State]:
    """Start all nodes, wait until all have ended, and return their states as they were before any was cancelled."""
    attempt, started = uuid.uuid4().hex[:12], []
    try:
        for node in range(nodes):
            params = NodeParams(
                folders=[str(folder) for folder in folders],
                ranks=world_size,
                nodes=nodes,
                node=node,
                run_id=attempt,
                stall_seconds=stall_seconds,
            )
            started.append(_start(deployment, params, _tag(folders)))
        return _follow(client, started, follower)
    finally:
        _end(client, started)


def _start(deployment: str, params: NodeParams, tag: str) -> UUID:
    try:
        started: Any = run_deployment(deployment, parameters={"params": params.model_dump()}, timeout=0, tags=[tag])
    except ObjectNotFound as error:
        raise FlowRunError(
            f"no deployment {deployment!r} is registered at {get_current_settings().api.url}, which launch 'pool' "
            "starts once per node; register the deployments (`brainloom deploy`) and start a worker of its pool"
        ) from error
    return UUID(str(started.id))


def _follow(client: SyncPrefectClient, nodes: Sequence[UUID], follower: MetricsFollower) -> list[State]:
    """Hand on progress until every node ended, or one of them badly; return what each was then."""
    while True:
        states = [_state(client.read_flow_run(node)) for node in nodes]
        if all(state.is_final() for state in states) or any(_ended_badly(state) for state in states):
            return [state for state in states if state.is_final()]
        follower.poll()
        time.sleep(POLL_S)


def _state(run: FlowRun) -> State:
    if run.state is None:
        raise FlowRunError(f"flow run {run.name!r} ({run.id}) has no state")
    return run.state


def _ended_badly(state: State) -> bool:
    return state.is_final() and not state.is_completed()


def _end(client: SyncPrefectClient, nodes: Sequence[UUID]) -> None:
    """Cancel the nodes that run and wait until they ended: only one launch may train in a folder."""
    left = [node for node in nodes if not _state(client.read_flow_run(node)).is_final()]
    for node in left:
        client.set_flow_run_state(node, Cancelling())
    deadline = time.monotonic() + END_S
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = [node for node in left if not _state(client.read_flow_run(node)).is_final()]
    if left:
        _log.warning("%d nodes did not end within %g s after they were cancelled", len(left), END_S)


def _end_left_behind(client: SyncPrefectClient, tag: str) -> None:
    """End nodes of a launch that was killed: they would hold the training's folder."""
    unfinished = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]}}
    chosen = FlowRunFilter.model_validate({"tags": {"all_": [tag]}, "state": unfinished})
    left = client.read_flow_runs(flow_run_filter=chosen)
    if left:
        _log.warning("%d nodes of an earlier launch still run; they are ended first", len(left))
        _end(client, [run.id for run in left])


def _tag(folders: Sequence[Path]) -> str:
    return f"training:{folders[0]}"
