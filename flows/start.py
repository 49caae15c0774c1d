"""One way to start a flow from a flow or the command line: inline, or through its deployment."""

from __future__ import annotations

import json
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
    plain = {name: _plain(value) for name, value in parameters.items()}
    if (size := len(json.dumps(plain))) > PARAMETER_BYTES_MAX:
        raise FlowRunError(
            f"the parameters of {deployment} have {size} bytes, Prefect takes at most {PARAMETER_BYTES_MAX}; "
            "write them to a file and pass its path"
        )
    try:
        flow_run: Any = run_deployment(deployment, parameters=plain, poll_interval=POLL_S)
    except ObjectNotFound as error:
        raise FlowRunError(
            f"no deployment {deployment!r} is registered at {get_current_settings().api.url}; "
            "register the deployments of prefect.yaml (`brainloom up`) or run the flow inline"
        ) from error
    state = flow_run.state
    if state is None or not state.is_completed():
        why = f"{state.name}: {state.message}" if state else "without a state"
        raise FlowRunError(f"flow run {flow_run.name!r} ({flow_run.id}) of {deployment} ended {why}")
    return None


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
