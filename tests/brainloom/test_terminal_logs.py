"""Log lines of a terminal as JSON, when asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import logging
from brainloom.terminal import prepare_prefect
from infra.settings import Settings
prepare_prefect(Settings())
logging.getLogger("flows.preprocess").warning("%d of %d cases", 3, 4)

from types import SimpleNamespace
from uuid import uuid4
from prefect import flow
from prefect.client.schemas import FlowRun
from prefect.context import FlowRunContext
from infra.log_lines import doing

small = flow(name="small")(lambda: None)
run = FlowRun(id=uuid4(), flow_id=uuid4(), name="small one")
with FlowRunContext.model_construct(flow=small, flow_run=run), doing(stage="score"):
    logging.getLogger("tasks.scores").warning("inside")
"""


def test_each_line_is_a_json_object(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "BRAINLOOM_STATE_DIR": str(tmp_path),
        "BRAINLOOM_LOG": "json",
    }
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    (line,) = [json.loads(text) for text in done.stderr.splitlines() if "cases" in text]
    assert (line["level"], line["logger"], line["message"]) == ("WARNING", "flows.preprocess", "3 of 4 cases")
    inside = next(json.loads(text) for text in done.stderr.splitlines() if "inside" in text)
    assert (inside["flow"], inside["stage"]) == ("small", "score")
    assert len(inside["flow_run_id"]) == 36
