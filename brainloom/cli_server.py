"""`brainloom up|down|deploy|doctor`: the embedded Prefect server, its deployments and a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from brainloom.terminal import ApiUrl, console


def up(
    worker: Annotated[bool, typer.Option(help="Register the deployments and start process workers too.")] = True,
    pool: Annotated[
        list[str] | None,
        typer.Option(help="Work pool that a worker of this machine serves; may be repeated. Default: all of ours."),
    ] = None,
    api_url: ApiUrl = None,
) -> None:
    """Start the local Prefect server with its UI; register deployments and automations, and start workers."""
    from infra.server import connect, ensure_server  # keeps `--help` fast
    from infra.settings import Settings

    settings = Settings()
    server = ensure_server(settings)
    connect(settings)
    console().print(f"Prefect UI: [bold]{server.ui_url}[/]")
    if worker:
        from infra.deploy import deploy as register
        from infra.deploy import find_project, served_pools, start_worker

        for name in register(settings):
            console().print(f"deployment: {name}")
        console().print(f"folder of flow runs and their relative paths: {escape(str(find_project()))}")
        for name in pool or served_pools(settings):
            start_worker(settings, name)
            console().print(f"worker: running in {name}; stop everything with `brainloom down`")


def down(api_url: ApiUrl = None) -> None:
    """Stop the worker and the server that `demo` or `up` started; safe to call twice.

    Flow runs at work get up to 40 s to save, and become Crashed.
    """
    from infra.deploy import flow_runs_at_work, stop_worker  # keeps `--help` fast
    from infra.server import stop_server
    from infra.settings import Settings
    from infra.supervised import GRACE_S

    settings = Settings()
    if runs := flow_runs_at_work(settings):
        console().print(f"flow runs at work: {len(runs)}; they get up to {GRACE_S:g} s to save, and become Crashed")
    stopped = [name for name, stop in (("worker", stop_worker), ("server", stop_server)) if stop(settings)]
    console().print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


def deploy(api_url: ApiUrl = None) -> None:
    """Register the deployments of prefect.yaml and the automations on the running server."""
    from infra.deploy import deploy as register  # keeps `--help` fast
    from infra.deploy import find_project
    from infra.server import connect, ensure_server
    from infra.settings import Settings

    settings = Settings()
    ensure_server(settings)
    connect(settings)
    for name in register(settings):
        console().print(name)
    console().print(f"folder of flow runs and their relative paths: {escape(str(find_project()))}")


def doctor(
    store: Annotated[
        list[str] | None,
        typer.Option(help="Folder or s3:// prefix of stores whose rights are tried with a probe; may be repeated."),
    ] = None,
    workspace: Annotated[Path, typer.Option(help="Folder whose disk is looked at.")] = Path(),
    api_url: ApiUrl = None,
) -> None:
    """Check installation, server, workers, storage, memory and GPUs; exit code 1 when something has to be mended."""
    from infra import doctor as checks  # keeps `--help` fast
    from infra.doctor_server import check_server
    from infra.environments import export_storage
    from infra.settings import Settings

    settings = Settings()
    export_storage(settings)
    folders = {"the server": settings.state_dir, "the workspace": workspace}
    findings = [
        *checks.check_packages(),
        *checks.check_versions(),
        *check_server(settings),
        *checks.check_disk(folders),
        *checks.check_shared_memory(),
        *checks.check_memory(settings),
        *checks.check_gpus(settings),
        *(finding for url in store or [] for finding in checks.check_storage(url)),
    ]
    for finding in findings:
        mark = "[red]problem:[/]" if finding.is_problem else "[green]ok[/]"
        console().print(f"{mark} {escape(f'{finding.check}: {finding.text}')}")
        if finding.is_problem:
            console().print(f"    mend: [bold]{escape(finding.mend)}[/]")
    problems = sum(finding.is_problem for finding in findings)
    if problems:
        console().print(f"{problems} problems found")
        raise typer.Exit(1)
    console().print("no problem found")
