"""Running a flow of ours inside a study, by the command line, on a server of the study's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from infra.server import child_environment, ensure_server, stop_server
from infra.settings import Settings


def run_flow(verb: str, folder: Path, parameters: dict[str, Any], workers: int) -> None:
    """Run a flow by the command line with its server and settings below the folder; the server is stopped after."""
    config = folder / f"{verb}.yaml"
    config.write_text(yaml.safe_dump(parameters))
    settings = Settings(state_dir=folder / "state", workers=workers)
    command = [str(Path(sys.executable).with_name("brainloom")), verb, "--config", str(config)]
    try:
        environment = child_environment(settings, ensure_server(settings))
        subprocess.run(command, env=environment | {"BRAINLOOM_STATE_DIR": str(settings.state_dir)}, check=True)
    finally:
        stop_server(settings)
