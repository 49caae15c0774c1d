"""Somebody with the UI open: asks a Prefect server what a flow run's page asks, and notes how long it takes."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np

from infra.api import request_json

EVERY_S = 1.0
TIMEOUT_S = 60.0
LOCKED = "(sqlite3.OperationalError) database is locked"
RETRYABLE = "Encountered retryable exception in request"
"""In the server's log for every answer 503, when it is told to log them (`log_retryable`)."""
FAILED = "Encountered exception in request"
"""For every answer 500."""
_AGAIN = "ERROR:    Exception in ASGI application"
"""The same once more, by the web server."""
_RECORD = re.compile(r"^(?=\d\d:\d\d:\d\d\.\d+ \| |ERROR: )", re.MULTILINE)


class Watcher:
    """Context manager: a thread that asks about once a second for the list of flow runs, and for one flow run's page.

    `seconds` has the latencies by route, `refused` counts answers that are not 200 and requests without an answer.
    """

    def __init__(self, api_url: str, every_s: float = EVERY_S) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.refused: Counter[str] = Counter()
        self._every_s = every_s
        self._client = httpx.Client(base_url=api_url, timeout=TIMEOUT_S, trust_env=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(2 * TIMEOUT_S)
        self._client.close()

    def _watch(self) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            self.look()
            self._stop.wait(max(0.0, self._every_s - (time.perf_counter() - began)))

    def look(self) -> None:
        """Ask once what the list of flow runs and the page of the flow run that started last ask."""
        runs = self._ask("flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 50}) or []
        if not runs:
            return
        newest = {"id": {"any_": [runs[0]["id"]]}}
        self._ask("task_runs/filter", {"flow_runs": newest, "limit": 200})
        self._ask("artifacts/filter", {"flow_runs": newest, "limit": 200})
        self._ask("logs/filter", {"logs": {"flow_run_id": newest["id"]}, "limit": 200, "sort": "TIMESTAMP_ASC"})

    def _ask(self, route: str, body: Mapping[str, Any]) -> Any:
        began = time.perf_counter()
        try:
            answer = self._client.post(route, json=body)
        except httpx.HTTPError as error:
            self.refused[f"{route}: {type(error).__name__}"] += 1
            return None
        self.seconds[route].append(time.perf_counter() - began)
        if answer.status_code != 200:
            self.refused[f"{route}: {answer.status_code}"] += 1
            return None
        return answer.json()


def ended_well(api_url: str, pages: Sequence[str]) -> Counter[str]:
    """Return how many flow and task runs a server knows as completed, and how many artifacts of some keys it has."""
    completed = {"state": {"type": {"any_": ["COMPLETED"]}}}
    asked = {
        "flow runs": ("flow_runs", completed),
        "task runs": ("task_runs", completed),
        "artifacts": ("artifacts", {"key": {"any_": list(pages)}}),
    }
    counts = {
        what: request_json(f"{api_url}/{route}/count", {route: wanted}) for what, (route, wanted) in asked.items()
    }
    return Counter(counts)


def latency_table(watched: Mapping[str, Watcher]) -> str:
    """Return a Markdown table of what each watcher waited, by route in milliseconds."""
    lines = ["| | route | requests | p50, ms | p95, ms | max, ms | refused |", "|---|---|---|---|---|---|---|"]
    for name, watcher in watched.items():
        for route, seconds in watcher.seconds.items():
            half, most, worst = 1000 * np.percentile(seconds, [50, 95, 100])
            refused = sum(count for what, count in watcher.refused.items() if what.startswith(f"{route}:"))
            lines.append(f"| {name} | {route} | {len(seconds)} | {half:.0f} | {most:.0f} | {worst:.0f} | {refused} |")
    return "\n".join(lines)


def log_retryable(server_dir: Path) -> None:
    """Let our own server, which starts in that folder, log what it answers with 503; before it is started."""
    server_dir.mkdir(parents=True, exist_ok=True)
    (server_dir / "prefect.toml").write_text("[server]\nlog_retryable_errors = true\n")


def errors_in(server_log: Path) -> dict[str, int]:
    """Return how often a server's log says that it answered with 503 or 500, and that SQLite was locked in between.

    `locked` counts the server's own services: what is behind an answer 503 is left out.
    """
    records = _RECORD.split(server_log.read_text(errors="replace"))
    ours = [one for one in records if LOCKED in one and RETRYABLE not in one and not one.startswith(_AGAIN)]
    counts = {name: sum(text in one for one in records) for name, text in (("503", RETRYABLE), ("500", FAILED))}
    return {**counts, "locked": len(ours)}
