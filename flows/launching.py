"""Where the ranks of a training run: on this host, on the workers of a work pool, or as a job of SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from flows.node_runs import launch_in_pool
from infra.settings import Settings
from tasks.launch import Rendezvous, launch, training_command
from tasks.launch_slurm import launch_slurm, slurm_script

Launch = Literal["local", "pool", "slurm"]
Launcher = Callable[..., None]
"""As `tasks.launch.launch`: folders, ranks and on_progress, `restarts` and `stall_seconds` by name."""


def launch_settings(where: Launch | None, nodes: int | None) -> Settings:
    """Return the settings with what a flow's parameters say otherwise; raises ValueError when they contradict."""
    wanted: Mapping[str, object] = {"launch": where, "nodes": nodes}
    return Settings(**{name: value for name, value in wanted.items() if value is not None})  # type: ignore[arg-type]


def launcher(settings: Settings) -> Launcher:
    """Return what launches trainings as the settings say."""
    launchers: dict[str, Launcher] = {
        "local": launch,
        "pool": partial(launch_in_pool, nodes=settings.nodes),
        "slurm": partial(launch_slurm, settings=settings),
    }
    return launchers[settings.launch]


def launch_preview(settings: Settings, folder: Path, world_size: int, threads: int) -> str:
    """Return what launching a training would start: the job script of SLURM, or the command of each node."""
    if settings.launch == "slurm":
        return slurm_script([folder], world_size, threads, settings)
    if settings.launch == "local":
        return shlex.join(training_command([folder], world_size))
    nodes = [Rendezvous("<node 0>:<port>", settings.nodes, node) for node in range(settings.nodes)]
    commands = [shlex.join(training_command([folder], world_size, rendezvous=node)) for node in nodes]
    return "\n".join(f"node {number}: {command}" for number, command in enumerate(commands))
