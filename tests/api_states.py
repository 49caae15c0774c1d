"""What the Prefect server says about flow runs and their task runs."""

from __future__ import annotations

import time
import urllib.error
from typing import Any

from infra.api import FINAL_STATES, request_json

POLL_S = 0.25


def ask(api_url: str, what: str, body: Any = None, seconds: float = 120.0, **options: Any) -> Any:
    """Ask the API, again while it is away, or its SQLite file locked (503), as Prefect's own client does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return request_json(f"{api_url}/{what}", body, timeout_s=60, **options)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def start_deployment(api_url: str, deployment: str, params: dict[str, Any]) -> str:
    """Start a deployment as its form does and return the id of the flow run."""
    found = ask(api_url, f"deployments/name/{deployment}")
    body = {"parameters": {"params": params}, "state": {"type": "SCHEDULED"}}
    return str(ask(api_url, f"deployments/{found['id']}/create_flow_run", body)["id"])


def state_of(api_url: str, flow_run: str) -> dict[str, Any]:
    """Return the state of a flow run."""
    return dict(ask(api_url, f"flow_runs/{flow_run}")["state"])


def wait_for_state(api_url: str, flow_run: str, wanted: str, seconds: float = 400.0) -> dict[str, Any]:
    """Wait until a flow run is in a state (its name) and return it; fails when it ends in another one."""
    deadline = time.monotonic() + seconds
    while (state := state_of(api_url, flow_run))["name"] != wanted:
        assert state["type"] not in FINAL_STATES, state
        assert time.monotonic() < deadline, state
        time.sleep(POLL_S)
    return state


def last_runs(api_url: str, flow: str) -> list[dict[str, Any]]:
    """Return the flow runs of a flow, the newest first."""
    body = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC"}
    return list(ask(api_url, "flow_runs/filter", body))


def unfinished_task_runs(api_url: str, flow_run: str, seconds: float = 30.0) -> list[str]:
    """Return names and states of task runs that are still shown as unfinished; their events may take some seconds."""
    deadline = time.monotonic() + seconds
    body = {"flow_runs": {"id": {"any_": [flow_run]}}}
    while True:
        runs = ask(api_url, "task_runs/filter", body)
        left = [f"{run['name']}: {run['state_name']}" for run in runs if run["state_type"] not in FINAL_STATES]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)
