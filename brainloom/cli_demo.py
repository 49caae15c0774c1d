"""`brainloom demo`: the main job on phantoms made from real anatomy, watched in the Prefect UI."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from brainloom.terminal import ApiUrl, console, folder_of, prepare_prefect, print_table


class Preset(StrEnum):
    """Names of flows.benchmark_params.PRESETS, known here without importing Prefect."""

    DEMO = "demo"
    TINY = "tiny"


def demo(
    workspace: Annotated[Path, typer.Option(help="Everything the demo makes lands here.")] = Path("state/demo"),
    preset: Annotated[
        Preset, typer.Option(help="`demo` (about 10 minutes on 2 cores) or `tiny` (smoke test).")
    ] = Preset.DEMO,
    seed: Annotated[int | None, typer.Option(help="Cohort seed; the preset's own by default.")] = None,
    api_url: ApiUrl = None,
) -> None:
    """Phantom NIfTI -> catalog -> Zarr store -> BrainMVP pre-training -> benchmark table -> report.

    Run it again after any interruption: it goes on where it was, and takes seconds when all is done.
    """
    from infra.server import connect  # keeps `--help` fast
    from infra.settings import Settings

    begin = time.monotonic()
    settings = Settings()
    out = console()
    out.print("[bold]brainloom demo[/]: starting the local Prefect server ...")
    prepare_prefect(settings)
    server = connect(settings)
    out.print(f"Prefect UI: [bold]{server.ui_url}[/]  (watch the flow run `benchmark {preset}` there)")

    from flows.benchmark import benchmark  # Prefect must be imported after `prepare_prefect`
    from flows.benchmark_params import PRESETS
    from flows.start import start

    params = PRESETS[preset](workspace.resolve())
    if seed is not None and params.phantom is not None:
        params = params.model_copy(update={"phantom": params.phantom.replace(seed=seed)})
    with folder_of("workspace", workspace):
        result = start(benchmark, params=params)
    _print_result(result, server.ui_url, time.monotonic() - begin)


def _print_result(result: dict[str, Any], ui_url: str, seconds: float) -> None:
    out = console()
    for path in result["tables"]:
        out.print()
        print_table(Path(path).read_text(encoding="utf-8"))
        out.print(f"how to read it, and where it comes from: {path}")
    out.print(f"\nstore    {result['store']}  (digest {result['store_digest'][:16]})")
    out.print(f"weights  {result['weights']}  (digest {result['weights_digest'][:16]})")
    out.print(f"report   {result['report']}")
    out.print(f"UI       {ui_url}")
    out.print(f"done in {seconds:.0f} s; `make down` stops the server; `make up` adds deployments and a worker")
