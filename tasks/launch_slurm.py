"""Training as a job of SLURM: the script, and sbatch with the job followed through the training's folder.

There was no SLURM where this was written: the script is checked by bash and by its content, and was run with stand-ins
for srun and scontrol only (docs/clusters.md).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from infra.environments import public_storage_environment
from infra.setting_sources import PREFIX, secret_fields
from infra.settings import Settings
from tasks.follow import MetricsFollower, OnProgress, Vital
from tasks.launch import (
    LOG_NAME,
    TrainingFailed,
    failure_text,
    forget_failures,
    own_failure,
    ranks_per_node,
    run_tied,
    threads_of,
    training_environment,
)

SCRIPT_NAME = "train.sbatch"
SUBMIT_LOG = "sbatch.log"
QUEUE_POLL_SECONDS = 10.0
PLAIN_PATH = re.compile(r"^[\w./+@=,-]+$", re.ASCII)
"""sbatch expands % in the name of its log, and reads no quotes."""

_BODY = """\
set -u
{exports}
unset SLURM_EXPORT_ENV  # srun shall hand on what stands above
{setup}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint="${{hosts%%$'\\n'*}}:$((29400 + SLURM_JOB_ID % 1000))"
requeue= signalled=
# Before the time limit: the ranks finish their step, write a checkpoint and leave; the job goes into the queue again.
stop() {{ requeue=1; signalled=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap stop USR1
srun --kill-on-bad-exit=1 \\
    {python} -m torch.distributed.run --nnodes {nodes} --nproc-per-node {ranks} \\
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" \\
    -m models.train {configs} &
step=$!
wait "$step"; code=$?
# The signal ends a wait early, with a code of its own.
while [ -n "$signalled" ]; do signalled=; wait "$step"; code=$?; done
if [ -n "$requeue" ] && [ "$code" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def slurm_script(folders: Sequence[Path], world_size: int, threads: int, settings: Settings) -> str:
    """Return the batch script that runs trainings one after another on the nodes of the settings.

    It holds no secret: of those it names the files (`BRAINLOOM_<SECRET>_FILE`). Raises ValueError when the nodes do not
    divide the ranks, a node has fewer GPUs than ranks, or a path has characters that sbatch does not take.
    """
    ranks = ranks_per_node(world_size, settings.nodes)
    if 0 < settings.node_gpus < ranks:
        raise ValueError(
            f"{ranks} ranks on a node need as many GPUs, BRAINLOOM_NODE_GPUS is {settings.node_gpus}; raise it, or the "
            "number of nodes"
        )
    if not PLAIN_PATH.match(str(folders[0])):
        raise ValueError(f"SLURM cannot log into {folders[0]}: use letters, digits and ./+@=,_- in paths")
    configs = " ".join(f"--config {shlex.quote(str(folder / 'run.json'))}" for folder in folders)
    body = _BODY.format(
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in _variables(threads, settings)),
        setup="\n".join(settings.slurm_setup),
        python=shlex.quote(sys.executable),
        nodes=settings.nodes,
        ranks=ranks,
        configs=configs,
    )
    return "\n".join(["#!/bin/bash", *_directives(folders[0], ranks * threads, settings), body])


def _directives(folder: Path, cpus: int, settings: Settings) -> list[str]:
    options = {
        "job-name": f"brainloom-{folder.name}",
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cpus,
        "gpus-per-node": settings.node_gpus or "",
        "time": settings.slurm_time,
        "partition": settings.slurm_partition,
        "account": settings.slurm_account,
        "signal": f"B:USR1@{settings.slurm_signal_s}",
        "output": folder / LOG_NAME,
        "open-mode": "append",
        "chdir": folder,
        "export": "NONE",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    return [*lines, "#SBATCH --requeue", *(f"#SBATCH {option}" for option in settings.slurm_options)]


def _variables(threads: int, settings: Settings) -> list[tuple[str, str]]:
    """Return what the ranks have in their environment."""
    files = {f"{PREFIX}{name.upper()}_FILE" for name in secret_fields(Settings)}
    named = {name: os.environ[name] for name in sorted(files) if os.environ.get(name)}
    return [*{**training_environment(threads, {}), **public_storage_environment(settings), **named}.items()]


def launch_slurm(
    run_dirs: Sequence[Path],
    world_size: int,
    on_progress: OnProgress | None = None,
    *,
    settings: Settings,
    restarts: int = 1,
    stall_seconds: float = 600.0,
) -> None:
    """Submit the trainings as one job, follow them to their end, and cancel the job on any exception.

    The folders are on a disk that the nodes share. A job that fails without a reason of its own is submitted again,
    `restarts` times, and continues from its checkpoints. Raises TrainingFailed, also after `stall_seconds` without a
    sign of life while the job runs, and ValueError as `slurm_script` does.
    """
    folders = [Path(folder).resolve() for folder in run_dirs]
    threads = max(threads_of(folder) for folder in folders)
    script, said = folders[0] / SCRIPT_NAME, folders[0] / SUBMIT_LOG
    script.write_text(slurm_script(folders, world_size, threads, settings), encoding="utf-8")
    follower, vital = MetricsFollower(folders, on_progress), Vital(folders)
    for attempt in range(restarts + 1):
        forget_failures(folders)
        said.unlink(missing_ok=True)
        job = _Job(said, folders[0] / LOG_NAME)
        try:
            code = run_tied(
                ["sbatch", "--parsable", "--wait", str(script)],
                log_file=said,
                cwd=folders[0],
                environment=dict(os.environ),
                poll=lambda job=job: follower.poll() or vital.poll() or job.poll(),  # type: ignore[misc]
                stall_seconds=stall_seconds,
            )
        except BaseException:
            job.cancel()
            raise
        follower.poll()
        if code == 0:
            return
        own = own_failure(folders)
        if own or attempt == restarts:
            raise TrainingFailed(failure_text(folders, job.log if job.log.exists() else said, code, own))


class _Job:
    """One submitted job."""

    def __init__(self, said: Path, log: Path) -> None:
        self.said, self.log = said, log
        self._size, self._asked = -1, 0.0

    @property
    def number(self) -> str:
        """What sbatch printed, empty before that; on a federation `<job>;<cluster>`."""
        text = self.said.read_text(errors="replace") if self.said.exists() else ""
        found = re.search(r"^\d+", text, re.MULTILINE)
        return found.group() if found else ""

    def poll(self) -> bool:
        """Say whether the job's log grew, or the job waits in the queue."""
        size = self.log.stat().st_size if self.log.exists() else -1
        grew, self._size = size != self._size, size
        if grew or not self.number or time.monotonic() - self._asked < QUEUE_POLL_SECONDS:
            return grew
        self._asked = time.monotonic()
        command = ["squeue", "--noheader", "--jobs", self.number, "--format", "%T"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return asked.stdout.strip() in ("PENDING", "REQUEUED", "CONFIGURING", "COMPLETING")

    def cancel(self) -> None:
        """End the job; the ranks get SLURM's SIGTERM and write a checkpoint."""
        if self.number:
            subprocess.run(["scancel", self.number], timeout=60, check=False)
