"""A Dask scheduler and its workers as processes of their own, for tests that lose them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import dask.config
from waiting import until

from infra.clusters import DASK_CONFIG

MEMORY = "2GiB"


class DaskProcesses:
    """A scheduler and workers of one thread below a folder, with our Dask configuration, as docker-compose.yml has."""

    def __init__(
        self, folder: Path, port: int, host: str = "127.0.0.1", config: Mapping[str, object] | None = None
    ) -> None:
        self.folder, self.host, self.port = folder, host, port
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {
            **os.environ,
            "DASK_INTERNAL_INHERIT_CONFIG": _serialised({**DASK_CONFIG, **(config or {})}),
        }

    @property
    def address(self) -> str:
        """Where the scheduler listens."""
        return f"tcp://{self.host}:{self.port}"

    def start_scheduler(self, place: Sequence[str] = ()) -> None:
        """Start the scheduler and wait until it listens; place: words before its command, e.g. to enter a network."""
        options = ["--host", self.host, "--port", str(self.port), "--dashboard-address", f"{self.host}:0", "--no-show"]
        options += ["--preload", "flows.preprocess", "--preload", "tasks.preprocess"]  # docs/clusters.md says why
        self._start("scheduler", "scheduler", options, place)
        until(lambda: "Scheduler at:" in self.log("scheduler"), "the scheduler listens")

    def start_worker(self, name: str, place: Sequence[str] = (), host: str = "127.0.0.1") -> None:
        """Start a worker with its nanny."""
        options = [self.address, "--name", name, "--host", host, "--nthreads", "1", "--memory-limit", MEMORY]
        options += ["--no-dashboard", "--local-directory", str(self.folder / name)]
        self._start(name, "worker", options, place)

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many workers came to this scheduler."""
        told = "Register worker addr: tcp://"
        until(lambda: self.log("scheduler").count(told) == count, f"{count} workers of {self.address}")

    def kill(self, name: str) -> None:
        """End a process by SIGKILL; the worker of a nanny is its daemon and goes with it."""
        self.running[name].kill()
        self.running.pop(name).wait()

    def log(self, name: str) -> str:
        """Return what a process wrote since it was started."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        """End all that run."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()

    def _start(self, name: str, kind: str, options: Sequence[str], place: Sequence[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [*place, sys.executable, "-m", "dask", kind, *options],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def _serialised(config: Mapping[str, object]) -> str:
    """Return a configuration in the form that Dask hands to its children; keys have dots here and are nested there."""
    whole: dict[str, object] = {}
    with dask.config.set(config, config=whole):
        return str(dask.config.serialize(whole))


@contextmanager
def stopped_at_the_end(cluster: DaskProcesses) -> Iterator[DaskProcesses]:
    """Give a cluster and end all its processes."""
    try:
        yield cluster
    finally:
        cluster.stop()


def at_address(cluster: DaskProcesses) -> Mapping[str, str]:
    """Return the settings with which flows use a cluster."""
    return {"BRAINLOOM_CLUSTER": "address", "BRAINLOOM_CLUSTER_ADDRESS": cluster.address}
