"""Log lines as JSON objects (BRAINLOOM_LOG=json), and what the code that logs is doing: dataset, case, stage."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

CONSOLE_FORMATTER = "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER"
JSON_CLASS = "PREFECT_LOGGING_FORMATTERS_JSON_CLASS"
"""Keys of Prefect's logging.yml (3.8.8), which it takes from the environment."""
_doing: ContextVar[dict[str, str]] = ContextVar("doing", default={})  # noqa: B039 - never changed in place
FROM_PREFECT = ("flow_run_id", "flow_run_name", "flow_name", "task_run_id", "task_run_name")


def log_environment(kind: str) -> dict[str, str]:
    """Return what makes Prefect's console write a line as a JSON object; nothing for kind `text`."""
    return {CONSOLE_FORMATTER: "json", JSON_CLASS: "infra.log_lines.JsonLines"} if kind == "json" else {}


def is_asked_for() -> bool:
    """Say whether lines of this process are to be JSON objects."""
    return os.environ.get(CONSOLE_FORMATTER) == "json" and JSON_CLASS in os.environ


def json_line(logger: str, message: str) -> str:
    """Return what is said outside of logging, as progress is, as a line like those of the log."""
    return JsonLines().format(logging.LogRecord(logger, logging.INFO, "", 0, message, None, None))


@contextmanager
def doing(**what: str) -> Iterator[None]:
    """Name what runs inside in its log lines: `stage`, `dataset`, `case`; inner names win, outer ones stay."""
    token = _doing.set({**_doing.get(), **what})
    try:
        yield
    finally:
        _doing.reset(token)


class JsonLines(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message; flow run and task run; what is being done.

    The ids of runs come from the record where Prefect's run loggers made it, else from the run that is active here.
    """

    def __init__(self, *_unused: Any) -> None:
        super().__init__()  # the format of Prefect's logging.yml is that of its own class

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a line break inside."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": when,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_runs(record),
            **_doing.get(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _runs(record: logging.LogRecord) -> dict[str, str]:
    found = {**_active(), **{name: str(value) for name in FROM_PREFECT if (value := getattr(record, name, None))}}
    named = {"flow_run_name": "flow_run", "flow_name": "flow", "task_run_name": "task_run"}
    return {named.get(name, name): value for name, value in found.items() if value not in ("", "<unknown>")}


def _active() -> dict[str, str]:
    """Return the run of this thread; nothing in a process that does not know Prefect."""
    if "prefect.context" not in sys.modules:
        return {}
    from prefect.context import FlowRunContext, TaskRunContext

    found: dict[str, str] = {}
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    if task is not None:
        found = {"task_run_id": str(task.task_run.id), "task_run_name": task.task_run.name}
        found["flow_run_id"] = str(task.task_run.flow_run_id or "")
    if flow is not None and flow.flow_run is not None:
        found |= {"flow_run_id": str(flow.flow_run.id), "flow_run_name": flow.flow_run.name}
        found["flow_name"] = flow.flow.name if flow.flow else ""
    return found
