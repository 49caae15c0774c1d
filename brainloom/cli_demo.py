"""`brainloom demo`: the main job on phantoms made from real anatomy, watched in the Prefect UI."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

console = Console()


def demo(
    workspace: Annotated[Path, typer.Option(help="Everything the demo makes lands here.")] = Path("state/demo"),
    preset: Annotated[str, typer.Option(help="`demo` (about 10 minutes on 2 cores) or `tiny` (smoke test).")] = "demo",
    seed: Annotated[int | None, typer.Option(help="Cohort seed; the preset's own by default.")] = None,
) -> None:
    """Phantom NIfTI -> catalog -> Zarr store -> BrainMVP pre-training -> benchmark table -> report.

    Run it again after any interruption: it goes on where it was, and takes seconds when all is done.
    """
    from infra.server import connect, ensure_server  # keeps `--help` fast
    from infra.settings import Settings

    begin = time.monotonic()
    settings = Settings()
    console.print("[bold]brainloom demo[/]: starting the local Prefect server ...")
    server = ensure_server(settings)
    connect(settings)
    console.print(f"Prefect UI: [bold]{server.ui_url}[/]  (watch the flow run `benchmark {preset}` there)")

    from flows.benchmark import PRESETS, benchmark  # Prefect must be imported after `connect`
    from flows.start import start

    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}", param_hint="--preset")
    params = PRESETS[preset](workspace.resolve())
    if seed is not None and params.phantom is not None:
        params = params.model_copy(update={"phantom": params.phantom.replace(seed=seed)})
    result = start(benchmark, params=params)
    _print_result(result, server.ui_url, time.monotonic() - begin)


def _print_result(result: dict[str, Any], ui_url: str, seconds: float) -> None:
    console.print()
    for table in result["tables"]:
        console.print(Markdown(Path(table).read_text()))
    console.print(f"\nstore    {result['store']}  (digest {result['store_digest'][:16]})")
    console.print(f"weights  {result['weights']}  (digest {result['weights_digest'][:16]})")
    console.print(f"report   {result['report']}")
    console.print(f"UI       {ui_url}")
    console.print(f"done in {seconds:.0f} s; `make down` stops the server; `make up` adds deployments and a worker")
