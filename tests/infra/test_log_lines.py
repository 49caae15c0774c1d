"""Log lines as JSON: what each says, and that a line stays a line."""

from __future__ import annotations

import json
import logging

from infra.log_lines import JsonLines, doing, is_asked_for, log_environment


def line(message: str, *values: object, **more: object) -> dict[str, str]:
    record = logging.LogRecord("tasks.preprocess", logging.WARNING, "a.py", 1, message, values, None)
    record.__dict__.update({"created": 1795392000.25, **more})
    text = JsonLines().format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_a_line_says_when_what_and_of_which_case() -> None:
    with doing(stage="preprocess", dataset="toy"), doing(case="s1"):
        found = line("%d of %d\nfailed", 3, 4)
    assert found == {
        "time": "2026-11-23T00:00:00.250+00:00",
        "level": "WARNING",
        "logger": "tasks.preprocess",
        "message": "3 of 4\nfailed",
        "stage": "preprocess",
        "dataset": "toy",
        "case": "s1",
    }
    assert "case" not in line("after")


def test_the_ids_of_a_run_logger_are_kept_and_an_error_has_its_traceback() -> None:
    ids = {"flow_run_id": "1", "flow_run_name": "preprocess toy", "flow_name": "preprocess", "task_run_id": "2"}
    try:
        raise ValueError("cut\nin two")
    except ValueError as error:
        found = line("failed", exc_info=(ValueError, error, error.__traceback__), **ids)
    assert (found["flow_run"], found["flow"], found["task_run_id"]) == ("preprocess toy", "preprocess", "2")
    assert found["error"].endswith("ValueError: cut\nin two")


def test_text_is_the_default() -> None:
    assert log_environment("text") == {}
    assert not is_asked_for()
    assert set(log_environment("json").values()) == {"json", "infra.log_lines.JsonLines"}
