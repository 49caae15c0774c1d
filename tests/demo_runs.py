"""Running `brainloom demo --preset tiny` as people do: a process of its own, with its own server and folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.server import request_json, without_prefect

COMMAND = Path(sys.executable).with_name("brainloom")
RESULT = re.compile(r"^(store|weights) +(\S+) +\(digest (\w+)\)$", re.MULTILINE)
TIMEOUT_S = 900


@dataclass(frozen=True)
class DemoRun:
    """One finished tiny demo; its server still runs."""

    workspace: Path
    state_dir: Path
    stdout: str
    stderr: str
    seconds: float

    @property
    def ui_url(self) -> str:
        """Address that the terminal shows."""
        return re.findall(r"^UI +(http\S+)$", self.stdout, re.MULTILINE)[-1]

    @property
    def api_url(self) -> str:
        return f"{self.ui_url}/api"

    @property
    def digests(self) -> dict[str, str]:
        """First 16 digits of the digests of `store` and `weights`, as printed."""
        return {name: digest for name, _, digest in RESULT.findall(self.stdout)}

    def ask(self, what: str, **body: Any) -> Any:
        """POST to the server's API, e.g. `ask("flow_runs/filter")`."""
        return request_json(f"{self.api_url}/{what}", {"limit": 200, **body})

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """Return the newest artifact of every key; tables are decoded."""
        found = self.ask("artifacts/latest/filter")
        for artifact in found:
            if artifact["type"] == "table":
                artifact["data"] = json.loads(artifact["data"], parse_constant=_not_finite)
        return {artifact["key"]: artifact for artifact in found}


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} in a table artifact: the page would die")


def environment(state_dir: Path) -> dict[str, str]:
    """Return the environment of a command with its own server below `state_dir`."""
    kept = {name: value for name, value in without_prefect(os.environ).items() if not name.startswith("BRAINLOOM_")}
    return {**kept, "BRAINLOOM_STATE_DIR": str(state_dir), "OMP_NUM_THREADS": "1"}


def run(*arguments: str, state_dir: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `brainloom <arguments>` to its end; `more` goes into its environment."""
    return subprocess.run(
        [COMMAND, *arguments],
        env={**environment(state_dir), **more},
        cwd=state_dir.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run_demo(workspace: Path, state_dir: Path) -> DemoRun:
    """Run the tiny demo to its end; raises AssertionError with the end of what it wrote when it fails."""
    began = time.monotonic()
    done = run("demo", "--preset", "tiny", "--workspace", str(workspace), state_dir=state_dir)
    seconds = time.monotonic() - began
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return DemoRun(workspace, state_dir, done.stdout, done.stderr, seconds)


def start_demo(workspace: Path, state_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the tiny demo and return its process; all it writes goes into `log`."""
    command = [COMMAND, "demo", "--preset", "tiny", "--workspace", str(workspace)]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment(state_dir),
            cwd=state_dir.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def snapshot(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Return size and modification time (ns) of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
