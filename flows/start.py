"""One way to start a flow from a flow or the command line: inline, or through its deployment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefect import Flow
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from pydantic import BaseModel

PARAMETER_BYTES_MAX = 524_288
"""Prefect refuses larger flow parameters (422)."""
POLL_S = 2.0


class FlowRunError(RuntimeError):
    """A flow run that was started through its deployment did not complete, or could not be started."""


def start(flow: Flow[..., Any], deployment: str | None = None, **parameters: Any) -> Any:
    """Run a flow and wait for it: inline when `deployment` is None, else by `<flow>/<deployment>` on its work pool.

    Inline the flow's own value is returned. A deployed flow runs elsewhere and leaves its results in the workspace,
    so None is returned. Parameters are plain values or pydantic models. Raises FlowRunError when a deployed flow run
    does not complete, when no such deployment is registered, or when the parameters are above 512 kB: pass paths.
    """
    if deployment is None:
        return flow(**parameters)
    flow_run = _run(deployment, parameters)
    state = flow_run.state
    if state is None or not state.is_completed():
        why = f"{state.name}: {state.message}" if state else "without a state"
        raise FlowRunError(f"flow run {flow_run.name!r} ({flow_run.id}) of {deployment} ended {why}")
    return None


def schedule(deployment: str, key: str, **parameters: Any) -> Any:
    """Start a deployment and return its flow run at once, without waiting; raises FlowRunError as `start` does.

    key: a second call with the same one returns the flow run of the first, so a repeated step starts nothing twice.
    """
    return _run(deployment, parameters, timeout=0, as_subflow=False, idempotency_key=key)


def _run(deployment: str, parameters: Mapping[str, Any], **options: Any) -> Any:
    """Create a flow run with these options of `run_deployment` and return it as it is when that returns."""
    plain = {name: _plain(value) for name, value in parameters.items()}
    if (size := len(json.dumps(plain))) > PARAMETER_BYTES_MAX:
        raise FlowRunError(
            f"the parameters of {deployment} have {size} bytes, Prefect takes at most {PARAMETER_BYTES_MAX}; "
            "write them to a file and pass its path"
        )
    try:
        return run_deployment(deployment, parameters=plain, poll_interval=POLL_S, **options)
    except ObjectNotFound as error:
        raise FlowRunError(
            f"no deployment {deployment!r} is registered at {get_current_settings().api.url}; "
            "register the deployments of prefect.yaml (`brainloom up`) or run the flow inline"
        ) from error


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
