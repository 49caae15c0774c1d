"""The services of docker-compose.yml as processes of this host: same commands, environment, secrets and health checks.

What differs is said in one place, `native_text`: host names and ports become free ones of loopback, and the containers'
folders become folders of a test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from s3_server import free_ports

from infra.server import without_prefect

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("server", "postgres", "s3", "scheduler")
SHARED = ("8786", "8787", "8788", "8080", "4200", "5432", "8333")
"""Ports inside the containers; no two services have the same."""
OF_SEAWEEDFS = ("master", "volume", "filer")
"""Its other ports, which no other container sees."""
SETTINGS = {"DASK_WORKER_MEMORY": "1500MiB", "BRAINLOOM_GPU_POOL": "brainloom-gpu"}
"""Of the .env file."""
HEALTHY_S = 600.0
"""A server on a busy host takes minutes."""


def entry_point() -> list[str]:
    """Return what our image runs before a service's command."""
    text = (ROOT / "infra/docker/Dockerfile").read_text()
    (found,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    return list(yaml.safe_load(found))


def native_text(text: str, folder: Path, ports: dict[str, str]) -> str:
    """Return the compose file with addresses and folders of this host."""
    text = re.sub(rf"(?<=[/@])(?:{'|'.join(HOSTS)}):(?=\d)", "127.0.0.1:", text)
    text = text.replace("-ip=s3 ", "-ip=127.0.0.1 ").replace("0.0.0.0", "127.0.0.1")
    text = re.sub(rf"\b(?:{'|'.join(SHARED)})\b", lambda found: ports[found.group()], text)
    for inside, outside in {"/srv/brainloom": "srv", "/run/secrets": "secrets", "-dir=/data": "-dir=s3"}.items():
        text = text.replace(inside, f"-dir={folder / 's3'}" if inside.startswith("-") else str(folder / outside))
    return text


def interpolated(value: Any) -> Any:
    """Return a part of the file with its variables filled in, as Compose does after it has read the YAML."""
    if isinstance(value, dict):
        return {name: interpolated(part) for name, part in value.items()}
    if isinstance(value, list):
        return [interpolated(part) for part in value]
    if isinstance(value, str):
        filled = re.sub(r"(?<!\$)\$\{(\w+):-([^}]*)\}", lambda found: SETTINGS.get(found[1], found[2]), value)
        return filled.replace("$$", "$")
    return value


class Composed:
    """The services of docker-compose.yml below a folder; `stop` ends all that run."""

    def __init__(self, folder: Path, secrets: dict[str, str]) -> None:
        self.folder = folder
        *found, of_gpus = (str(port) for port in free_ports(len(SHARED) + len(OF_SEAWEEDFS) + 1))
        self.ports = dict(zip((*SHARED, *OF_SEAWEEDFS), found, strict=True))
        text = native_text((ROOT / "docker-compose.yml").read_text(), folder, self.ports)
        self.services: dict[str, Any] = interpolated(yaml.safe_load(text)["services"])
        # Both workers are asked for their health at one port, each in a container of its own.
        worker = yaml.safe_dump(self.services["gpu-worker"]).replace(self.ports["8080"], of_gpus)
        self.services["gpu-worker"] = yaml.safe_load(worker)
        for name in ("srv/state", "secrets", "s3", "logs", "home"):
            (folder / name).mkdir(parents=True)
        for name, value in secrets.items():
            (folder / "secrets" / name).write_text(value)
        shutil.copy(ROOT / "prefect.yaml", folder / "srv")
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def api_url(self) -> str:
        """Address of the server's API."""
        return f"http://127.0.0.1:{self.ports['4200']}/api"

    def environment(self, service: str) -> dict[str, str]:
        """Return the environment of a service: that of its image and of the compose file, nothing of the caller's."""
        kept = {
            k: v for k, v in without_prefect(os.environ).items() if not k.startswith(("BRAINLOOM_", "AWS_", "FSSPEC"))
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        of_image = {
            "PATH": path,
            "HOME": str(self.folder / "home"),
            "PREFECT_HOME": str(self.folder / "home" / service),
        }
        return {**kept, **of_image, **self.services[service].get("environment", {})}

    def command(self, service: str, extra: str = "") -> list[str]:
        """Return the whole command of a service; extra: options for the last part of a shell's command."""
        found = self.services[service]
        words = [*(found.get("entrypoint") or entry_point()), *found["command"]]
        return [*words[:-1], words[-1].rstrip() + extra] if extra else words

    def start(self, service: str, extra: str = "") -> None:
        """Start a service; its output goes into its log."""
        with self.log(service).open("ab") as log:
            self.running[service] = subprocess.Popen(
                self.command(service, extra),
                env=self.environment(service),
                cwd=self.folder / "srv",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, service: str) -> Path:
        """Log of a service."""
        return self.folder / "logs" / f"{service}.log"

    def wait_healthy(self, service: str) -> None:
        """Wait until the service's own health check succeeds; raises AssertionError with the end of its log."""
        kind, *words = self.services[service]["healthcheck"]["test"]
        command = ["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else words
        deadline = time.monotonic() + HEALTHY_S
        environment = self.environment(service)
        while subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
            process = self.running.get(service)
            gone = process is not None and process.poll() is not None
            if gone or time.monotonic() > deadline:
                raise AssertionError(f"{service} is not healthy:\n{self.tail(service)}")
            time.sleep(0.5)

    def tail(self, service: str) -> str:
        """Return the end of a service's log."""
        return self.log(service).read_text(errors="replace")[-4000:] if self.log(service).exists() else ""

    def stop(self) -> None:
        """End all services, the workers first: without a server they would look for it before they end."""
        for workers in (True, False):
            group = [process for name, process in self.running.items() if name.endswith("worker") == workers]
            for process in group:
                process.terminate()
            for process in group:
                try:
                    process.wait(45)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
