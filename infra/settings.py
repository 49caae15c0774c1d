"""Settings from the environment (`BRAINLOOM_*`), and the environment that every child process gets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMORY_SHARE = 0.8
"""Share of the machine's memory that the Dask workers may use together; the rest is for the flow and the server."""


class Settings(BaseSettings):
    """Where things run. Every field is read from `BRAINLOOM_<FIELD>` unless given."""

    model_config = SettingsConfigDict(env_prefix="BRAINLOOM_", extra="ignore", frozen=True)

    state_dir: Path = Path("state")
    """Folder of the embedded server, its logs and the workers' scratch; made absolute."""
    api_url: str | None = None
    """API of an existing Prefect server (ends in `/api`); None: our own server on loopback."""
    database_url: str | None = None
    """SQLAlchemy URL of the embedded server's database (`postgresql+asyncpg://...`); None: SQLite in `state_dir`."""
    cluster: Literal["local", "address", "cuda"] = "local"
    """Where Dask work runs: processes on this host, an existing scheduler, or one process per GPU of this host."""
    cluster_address: str = ""
    """Address of the Dask scheduler, e.g. `tcp://10.0.0.5:8786`; only for cluster `address`. Its workers must have one
    thread each (`dask worker --nthreads 1`); their number and smallest memory limit are asked of it."""
    workers: int = Field(2, ge=1)
    """Dask worker processes of cluster `local`, one thread each; cluster `cuda` has one per GPU instead."""
    worker_memory: ByteSize | None = None
    """Limit of one Dask worker, e.g. `3GiB`; None: an equal share of 80 % of this machine's memory. For cluster
    `address` an upper bound of what its workers say, and needed when one says nothing."""
    work_pool: str = "brainloom-cpu"
    """Prefect work pool of the CPU flows: the worker serves it, and the deployments of `prefect.yaml` go to it."""
    flow_runs: int = Field(4, ge=1)
    """Flow runs that one worker process runs at once; a flow that starts another holds its own place while it waits."""
    allow_pictures: bool = False
    """Publish pictures and subject ids although the API is neither on loopback nor on a private address."""

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @field_validator("api_url")
    @classmethod
    def _api_url(cls, value: str | None) -> str | None:
        if not value:
            return None
        url = value.rstrip("/")
        if not url.startswith(("http://", "https://")) or not url.endswith("/api"):
            raise ValueError(f"the API URL must look like http://host:4200/api, got {value!r}")
        return url

    @model_validator(mode="after")
    def _address_given(self) -> Self:
        if (self.cluster == "address") != bool(self.cluster_address):
            raise ValueError(
                f"cluster_address is needed for cluster 'address' and refused otherwise, "
                f"got cluster {self.cluster!r} with address {self.cluster_address!r}; "
                "set BRAINLOOM_CLUSTER=address and BRAINLOOM_CLUSTER_ADDRESS=tcp://host:8786"
            )
        return self

    @property
    def server_dir(self) -> Path:
        """Home of the embedded Prefect server: database, logs and pid files."""
        return self.state_dir / "server"

    def memory_per_worker(self, workers: int | None = None) -> int:
        """Return the memory limit of one of so many Dask workers in bytes, the container's limit respected."""
        return int(self.worker_memory or MEMORY_SHARE * machine_memory() / (workers or self.workers))


def machine_memory() -> int:
    """Return the memory in bytes that this process may use: the machine's, or the control group's limit if lower."""
    total = int(psutil.virtual_memory().total)
    if CGROUP_MEMORY_LIMIT.exists():
        limit = CGROUP_MEMORY_LIMIT.read_text().strip()
        if limit.isdigit():
            return min(total, int(limit))
    return total


def private_environment() -> dict[str, str]:
    """Return what every child process must have in its environment.

    All telemetry opt-outs of Prefect 3.8.8, and `PYTHONSAFEPATH=1`: without it a folder called `models` in the
    working directory would be imported instead of ours.
    """
    return {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PYTHONSAFEPATH": "1",
    }
