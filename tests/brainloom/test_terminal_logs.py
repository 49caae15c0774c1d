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
"""


def test_each_line_is_a_json_object(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "BRAINLOOM_STATE_DIR": str(tmp_path),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json",
    }
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    (line,) = [json.loads(text) for text in done.stderr.splitlines() if "cases" in text]
    assert (line["levelname"], line["name"]) == ("WARNING", "flows.preprocess")
    assert line["msg"] % tuple(line["args"]) == "3 of 4 cases"
