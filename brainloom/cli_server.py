"""`brainloom up|down|deploy|doctor`: the embedded Prefect server, its deployments and a worker."""

from __future__ import annotations

import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Annotated

import typer

from brainloom.terminal import ApiUrl, console

PACKAGES = ("brainloom", "flows", "tasks", "models", "infra")


def up(
    worker: Annotated[bool, typer.Option(help="Register the deployments and start a process worker too.")] = True,
    api_url: ApiUrl = None,
) -> None:
    """Start the local Prefect server with its UI; register the deployments and start a worker."""
    from infra.server import connect, ensure_server  # keeps `--help` fast
    from infra.settings import Settings

    settings = Settings()
    server = ensure_server(settings)
    connect(settings)
    console().print(f"Prefect UI: [bold]{server.ui_url}[/]")
    if worker:
        from infra.deploy import deploy as register
        from infra.deploy import start_worker

        for name in register(settings):
            console().print(f"deployment: {name}")
        start_worker(settings)
        console().print("worker: running; stop everything with `brainloom down`")


def down(api_url: ApiUrl = None) -> None:
    """Stop the worker and the server that `demo` or `up` started; safe to call twice."""
    from infra.deploy import stop_worker  # keeps `--help` fast
    from infra.server import stop_server
    from infra.settings import Settings

    settings = Settings()
    stopped = [name for name, stop in (("worker", stop_worker), ("server", stop_server)) if stop(settings)]
    console().print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


def deploy(api_url: ApiUrl = None) -> None:
    """Register the flows of prefect.yaml as deployments on the running server."""
    from infra.deploy import deploy as register  # keeps `--help` fast
    from infra.server import connect, ensure_server
    from infra.settings import Settings

    settings = Settings()
    ensure_server(settings)
    connect(settings)
    for name in register(settings):
        console().print(name)


def doctor() -> None:
    """Check the installation and say how to mend what is wrong; exit code 1 when something is."""
    problems = [*_foreign_packages(), *_wrong_versions(), *_disk()]
    for line in problems:
        console().print(f"[red]problem:[/] {line}")
    if problems:
        raise typer.Exit(1)
    console().print("no problem found")


def _foreign_packages() -> list[str]:
    """Packages with our names that come from elsewhere, e.g. a `models/` of the working directory."""
    homes = {}
    for name in PACKAGES:
        spec = util.find_spec(name)
        homes[name] = Path(spec.origin).parent.parent if spec and spec.origin else None
    ours = homes["brainloom"]
    return [
        f"package `{name}` comes from {home}, not from {ours}: leave that folder or set PYTHONSAFEPATH=1"
        for name, home in homes.items()
        if home != ours
    ]


def _wrong_versions() -> list[str]:
    """Installed versions that are known to break."""
    fastapi = metadata.version("fastapi")
    if tuple(int(part) for part in fastapi.split(".")[:2]) >= (0, 151):
        return [f"fastapi {fastapi} breaks the Prefect server; run: pip install 'fastapi<0.151'"]
    return []


def _disk(minimum_gb: float = 2.0) -> list[str]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return [f"only {free:.1f} GB of disk free here; {minimum_gb:g} GB are needed"] if free < minimum_gb else []
