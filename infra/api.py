"""Requests to a Prefect server's REST API with the standard library alone: Prefect need not be imported."""

from __future__ import annotations

import base64
import json
import os
import random
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any

# Loopback must not pass through a proxy of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
FINAL_STATES = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
"""Types of states from which no flow run and no task run goes on."""
BUSY_ATTEMPTS = 9
"""Of a request that is answered with 503: SQLite is locked for a moment while others write."""
BUSY_WAIT_S = 1.0
"""Before the second attempt; twice as long before each further one up to 16 times, drawn from half to one and a half of
it: those that were refused together must not come back together."""


def request_json(url: str, body: Any = None, method: str | None = None, timeout_s: float = 10.0) -> Any:
    """Send a JSON request to a server's API (POST when there is a body) and return the decoded answer.

    PREFECT_API_AUTH_STRING (`user:password`) goes along to the servers of BRAINLOOM_API_URL and PREFECT_API_URL alone.
    """
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked by Settings
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **_authorisation(url)},
        method=method,
    )
    for attempt in range(BUSY_ATTEMPTS):
        try:
            with _OPENER.open(request, timeout=timeout_s) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            if error.code != 503 or attempt == BUSY_ATTEMPTS - 1:
                raise
            time.sleep(BUSY_WAIT_S * min(16, 2**attempt) * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
    raise AssertionError("unreachable")


def _authorisation(url: str) -> dict[str, str]:
    given = os.environ.get("PREFECT_API_AUTH_STRING")
    known = [os.environ.get(name, "").rstrip("/") for name in ("BRAINLOOM_API_URL", "PREFECT_API_URL")]
    if not given or not any(one and url.startswith(f"{one}/") for one in known):
        return {}
    return {"Authorization": f"Basic {base64.b64encode(given.encode()).decode()}"}


def clock_skew_s(api_url: str) -> float:
    """Return how many seconds the clock of this machine is ahead of the server's, which tells whole seconds."""
    with _OPENER.open(f"{api_url}/health", timeout=10.0) as answer:
        told = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    ahead = time.time() - told
    return ahead if ahead < 0 else max(0.0, ahead - 1.0)
