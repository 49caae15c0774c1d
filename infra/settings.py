"""Settings from the environment (`BRAINLOOM_*`), and the environment that every child process gets.

One model says where storage, server, Dask and the ranks of trainings are. Secrets may stand in files instead:
`BRAINLOOM_<SECRET>_FILE` names one (docs/clusters.md).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import psutil
from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from infra.setting_sources import PREFIX, SecretFiles, refuse_unknown

CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMORY_SHARE = 0.8
"""Share of the machine's memory that the Dask workers may use together; the rest is for the flow and the server."""
SHORTEST_KEY = 16
"""Characters of `path_key`."""
SLURM_TIME = re.compile(r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
KUBERNETES_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
WORD = re.compile(r"^[\w.,:=@/+-]*$", re.ASCII)
"""What may stand in a line of a batch script without quotes."""


class Settings(BaseSettings):
    """Where things run. Every field is read from `BRAINLOOM_<FIELD>` unless given."""

    # Errors must not repeat a secret, and pydantic's repeat the input.
    model_config = SettingsConfigDict(env_prefix="BRAINLOOM_", extra="forbid", frozen=True, hide_input_in_errors=True)

    state_dir: Path = Path("state")
    """Folder of the embedded server, its logs and the workers' scratch; made absolute."""
    log: Literal["text", "json"] = "text"
    """How lines of the terminal, of workers and of flow runs look: for people, or a JSON object each."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port of loopback on which the process of a flow run tells Prometheus its gauges, or the next free of ten; 0:
    none."""
    path_key: SecretStr | None = None
    """Key of the hashes that stand in place of paths in stores of `hide_paths`, 16 characters or more."""
    allow_pictures: bool = False
    """Publish pictures and subject ids although the API is neither on loopback nor on a private address."""

    # Server
    api_url: str | None = None
    """API of an existing Prefect server (ends in `/api`); None: our own server on loopback."""
    api_auth: SecretStr | None = None
    """`user:password` that an existing server asks for, or that of our images; that of `brainloom up` asks for none."""
    database_url: SecretStr | None = None
    """SQLAlchemy URL of our own server's database (`postgresql+asyncpg://user@host:5432/name`); None: SQLite in
    `state_dir`."""
    database_password: SecretStr | None = None
    """Password for a `database_url` without one; any characters."""
    work_pool: str = "brainloom-cpu"
    """Prefect work pool of the CPU flows: the worker serves it, and the deployments of `prefect.yaml` go to it."""
    gpu_pool: str = ""
    """Work pool of a group of GPUs, e.g. `brainloom-gpu`: trainings and embeddings go there. Empty: to `work_pool`. One
    training at a time runs in it."""
    alarm_failures: int = Field(3, ge=2)
    """So many failed or crashed flow runs of deployments within `alarm_minutes` are an alarm."""
    alarm_minutes: int = Field(60, ge=1)
    """Window of the failure alarm."""
    notify_url: SecretStr | None = None
    """Address of a webhook that is told about failures and proposals; it may hold a secret. None: nothing is sent,
    unless the server has a block `brainloom-notify`."""
    flow_runs: int = Field(4, ge=1)
    """Flow runs that one worker process runs at once; a flow that starts another holds its own place while it waits."""

    # Storage on S3; where none of these is set, the AWS_* variables say it
    s3_endpoint: str | None = None
    """URL of an S3 server that is not Amazon's, without user info."""
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None
    s3_region: str | None = None
    s3_bucket: str = ""
    """Bucket that `brainloom bootstrap` creates; empty: none."""

    # Dask
    cluster: Literal["local", "address", "cuda", "slurm", "kubernetes"] = "local"
    """Where Dask work runs: processes on this host, an existing scheduler, one process per GPU of this host, jobs of
    SLURM, or pods of Kubernetes."""
    cluster_address: str = ""
    """Address of the Dask scheduler, e.g. `tcp://10.0.0.5:8786`; only for cluster `address`. Its workers must have one
    thread each (`dask worker --nthreads 1`); their number and smallest memory limit are asked of it."""
    workers: int = Field(2, ge=1)
    """Dask worker processes of the clusters `local`, `slurm` (a job each) and `kubernetes` (a pod each), one thread
    each; cluster `cuda` has one per GPU instead."""
    worker_memory: ByteSize | None = None
    """Limit of one Dask worker, e.g. `3GiB`; None: an equal share of 80 % of this machine's memory. For cluster
    `address` an upper bound of what its workers say, and needed when one says nothing. `slurm` and `kubernetes` need
    it: their workers are on other machines."""
    kubernetes_image: str = ""
    """Image of scheduler and workers; the same versions as here."""
    kubernetes_namespace: str = "default"
    kubernetes_secret: str = ""
    """Secret of that namespace whose keys become the pods' environment: S3 keys, PREFECT_API_AUTH_STRING."""
    kubernetes_claim: str = ""
    """Persistent volume claim mounted at `state_dir` in every pod; empty: stores and sources are on S3."""

    # Training
    launch: Literal["local", "pool", "slurm"] = "local"
    """Where the ranks of a pre-training run: on the flow's host, as one flow run per node in the pool of the
    deployment `train-node`, or as one job of SLURM."""
    nodes: int = Field(1, ge=1)
    """Nodes that share the ranks, for launch `pool` and `slurm`."""
    node_address: str = ""
    """Address of this host for the other nodes of a training; empty: its host name. Set it where the
    worker runs when names do not resolve, or for a faster network."""
    gpu_lease: str = ""
    """Folder or s3:// prefix of the lease of a group of GPUs: flow runs with the same one train one at a time. Empty:
    all of this `state_dir`. Hosts whose trainings share GPUs name one that all of them reach."""
    node_gpus: int = Field(0, ge=0)
    """GPUs asked of SLURM per node; 0: none, the ranks use CPUs."""

    # SLURM, of cluster `slurm` and of launch `slurm`
    slurm_partition: str = ""
    slurm_account: str = ""
    slurm_time: str = ""
    """Time limit of a job, `[days-]hours:minutes:seconds`."""
    slurm_signal_s: int = Field(180, ge=30)
    """Seconds before its time limit at which a training writes its checkpoint and is put into the queue again."""
    slurm_options: Annotated[list[str], NoDecode] = []
    """Further options of sbatch, a JSON list: `["--constraint=a100", "--qos=long"]`."""
    slurm_setup: Annotated[list[str], NoDecode] = []
    """Shell lines before the work, a JSON list: `["module load cuda", "source /shared/venv/bin/activate"]`. Secrets go
    into a file that such a line reads, not into the line: the script is written into the training's folder."""
    slurm_interface: str = ""
    """Network interface over which Dask's scheduler and the jobs talk, e.g. `ib0`; empty: Dask's choice."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, then the files that `BRAINLOOM_<SECRET>_FILE` names."""
        refuse_unknown(settings_cls, os.environ)
        return init_settings, env_settings, SecretFiles(settings_cls)

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

    @field_validator("path_key", "api_auth", "database_url", "database_password", "s3_access_key", "s3_secret_key")
    @classmethod
    def _none_when_empty(cls, value: SecretStr | None) -> SecretStr | None:
        stripped = value.get_secret_value().strip() if value else ""
        return SecretStr(stripped) if stripped else None  # as in a file of a secret, spaces at the ends do not count

    @field_validator("path_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value and len(value.get_secret_value()) < SHORTEST_KEY:
            raise ValueError(
                f"path_key has {len(value.get_secret_value())} characters, {SHORTEST_KEY} are needed: a short key can "
                "be guessed (the value is not repeated here)"
            )
        return value

    @field_validator("api_auth")
    @classmethod
    def _user_and_password(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not all(value.get_secret_value().partition(":")):
            raise ValueError("api_auth must be user:password (the value is not repeated here)")
        return value

    @field_validator("s3_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value and (not value.startswith(("http://", "https://")) or "@" in value):
            raise ValueError(
                "s3_endpoint must be http(s)://host:port without user info (the value is not repeated here)"
            )
        return value or None

    @field_validator("slurm_time")
    @classmethod
    def _time(cls, value: str) -> str:
        if value and not SLURM_TIME.match(value):
            raise ValueError(f"slurm_time must be [days-]hours:minutes:seconds, e.g. 1-00:00:00, got {value!r}")
        return value

    @field_validator("kubernetes_namespace", "kubernetes_secret", "kubernetes_claim")
    @classmethod
    def _kubernetes_name(cls, value: str) -> str:
        if value and not KUBERNETES_NAME.match(value):
            raise ValueError(f"names in Kubernetes have small letters, digits and dashes, got {value!r}")
        return value

    @field_validator("slurm_partition", "slurm_account", "slurm_interface", "node_address")
    @classmethod
    def _one_word(cls, value: str) -> str:
        if not WORD.match(value):
            raise ValueError(f"one word of letters, digits and _.,:=@/+- is wanted, got {value!r}")
        return value

    @field_validator("slurm_options", "slurm_setup", mode="before")
    @classmethod
    def _json_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, list):
            raise ValueError('a JSON list of texts is wanted, e.g. ["--qos=long", "--constraint=a100"]')
        return found

    @field_validator("slurm_options")
    @classmethod
    def _options(cls, values: list[str]) -> list[str]:
        for value in values:
            if not value.startswith("--") or not WORD.match(value):
                raise ValueError(f"an option of sbatch starts with -- and is one word, got {value!r}")
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.cluster == "address") != bool(self.cluster_address):
            raise ValueError(
                f"cluster_address is needed for cluster 'address' and refused otherwise, "
                f"got cluster {self.cluster!r} with address {self.cluster_address!r}; "
                "set BRAINLOOM_CLUSTER=address and BRAINLOOM_CLUSTER_ADDRESS=tcp://host:8786"
            )
        for wrong, text in self._contradictions():
            if wrong:
                raise ValueError(text)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        remote, pods = self.cluster in ("slurm", "kubernetes"), self.cluster == "kubernetes"
        pods_only = [self.kubernetes_image, self.kubernetes_secret, self.kubernetes_claim]
        has_password = bool(self.database_url and re.search(r"//[^/@]*:[^/@]*@", self.database_url.get_secret_value()))
        return [
            (
                remote and self.worker_memory is None,
                f"cluster {self.cluster!r} needs a limit for each worker: set BRAINLOOM_WORKER_MEMORY, e.g. 8GiB",
            ),
            (
                pods and not self.kubernetes_image,
                "cluster 'kubernetes' needs an image: set BRAINLOOM_KUBERNETES_IMAGE, e.g. host/brainloom-cpu:0.1.0",
            ),
            (
                any(pods_only) and not pods,
                f"the settings kubernetes_* are for cluster 'kubernetes', got cluster {self.cluster!r}; "
                "set BRAINLOOM_CLUSTER=kubernetes or unset them",
            ),
            (
                self.nodes > 1 and self.launch == "local",
                f"{self.nodes} nodes need launch 'pool' or 'slurm', got 'local'; set BRAINLOOM_LAUNCH, or one node",
            ),
            (
                "slurm" in (self.launch, self.cluster) and not self.slurm_time,
                "SLURM needs a time limit: set BRAINLOOM_SLURM_TIME, e.g. 1-00:00:00",
            ),
            (
                (self.s3_access_key is None) != (self.s3_secret_key is None),
                "s3_access_key and s3_secret_key belong together; set both BRAINLOOM_S3_ACCESS_KEY and "
                "BRAINLOOM_S3_SECRET_KEY (or their _FILE), or neither",
            ),
            (
                self.database_password is not None and (self.database_url is None or has_password),
                "database_password needs a BRAINLOOM_DATABASE_URL with a user and without a password",
            ),
            (
                self.api_url is not None and self.database_url is not None,
                "database_url is for our own server, and BRAINLOOM_API_URL names another one; unset one of them",
            ),
        ]

    @property
    def server_dir(self) -> Path:
        """Home of the embedded Prefect server: database, logs and pid files."""
        return self.state_dir / "server"

    def memory_per_worker(self, workers: int | None = None) -> int:
        """Return the memory limit of one of so many Dask workers in bytes, the container's limit respected."""
        return int(self.worker_memory or MEMORY_SHARE * machine_memory() / (workers or self.workers))


def error_text(error: Exception) -> str:
    """Return an error's text; that of wrong settings is a line for each, with its variable and without its value."""
    if not isinstance(error, ValidationError) or error.title != Settings.__name__:
        return str(error)
    return "\n".join(_line(one["loc"], one["type"], one["msg"]) for one in error.errors())


def _line(place: tuple[int | str, ...], kind: str, message: str) -> str:
    text = "a size such as 3GiB is wanted" if kind == "byte_size" else message.removeprefix("Value error, ")
    if not place:
        return text  # of several settings together: it names them
    variable = f"{PREFIX}{str(place[0]).upper()}"
    if os.environ.get(f"{variable}_FILE"):
        variable += "_FILE"
    entry = f", entry {place[1]}" if len(place) > 1 else ""
    return f"{variable}{entry}: {text}"


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
