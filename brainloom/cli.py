"""The command line: every flow, the store, the server, the phantoms and the demo."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ValidationError
from rich.console import Console

from brainloom import __version__
from brainloom.cli_demo import demo
from brainloom.cli_server import deploy, doctor, down, up
from brainloom.cli_store import store_app

app = typer.Typer(
    name="brainloom",
    help="Raw multi-modal brain MRI into Zarr stores, pre-trained 3D networks and honest benchmark tables.\n\n"
    "Research software, not for clinical use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")
for command in (demo, up, down, doctor, deploy):
    app.command()(command)

console = Console(stderr=True)

Config = Annotated[Path, typer.Option("--config", "-c", help="YAML file with the flow's parameters.")]
Deployment = Annotated[
    str, typer.Option(help="Run as this deployment (`flow/deployment`) on the server instead of in this process.")
]

# Verb of the shell -> where its flow and its parameters live.
FLOWS: dict[str, tuple[str, str, str]] = {
    "catalog": ("flows.catalog", "CatalogParams", "List the scans at the sources, with why any was left out."),
    "preprocess": (
        "flows.preprocess",
        "PreprocessParams",
        "Turn catalogued scans into voxels of a Zarr store.",
    ),
    "ingest": ("flows.ingest", "IngestParams", "Catalog, then preprocess: what the nightly schedule runs."),
    "pretrain": ("flows.pretrain", "PretrainParams", "Pre-train a network on a store under torchrun."),
    "evaluate": ("flows.evaluate", "EvaluateParams", "Fine-tune on benchmarks and write the tables."),
    "benchmark": ("flows.benchmark", "BenchmarkParams", "The whole chain, from NIfTI to the table."),
}


def _load_params(model: type[BaseModel], config: Path) -> BaseModel:
    if not config.is_file():
        raise typer.BadParameter(f"{config} is not a file", param_hint="--config")
    try:
        return model.model_validate(yaml.safe_load(config.read_text()) or {})
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{config} is not YAML: {error}", param_hint="--config") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise typer.BadParameter(f"{config}: " + "; ".join(lines), param_hint="--config") from None


def run_flow(verb: str, params: BaseModel, deployment: str = "") -> Any:
    """Run the flow of a verb against the local server, or as a deployment; returns the flow's result."""
    from flows.start import start  # Prefect must be imported after `connect`

    module, _, _ = FLOWS[verb]
    return start(getattr(import_module(module), verb), deployment=deployment or None, params=params)


def _register(verb: str) -> None:
    module, params_name, help_text = FLOWS[verb]

    def command(config: Config, deployment: Deployment = "") -> None:
        from infra.server import connect, ensure_server  # keeps `--help` fast
        from infra.settings import Settings

        settings = Settings()
        info = ensure_server(settings)
        connect(settings)
        params = _load_params(getattr(import_module(module), params_name), config)
        console.print(f"Prefect UI: {info.ui_url}")
        result = run_flow(verb, params, deployment)
        if result is not None:
            Console().print_json(data=result, default=str)

    command.__doc__ = help_text
    app.command(name=verb, help=help_text)(command)


for _verb in FLOWS:
    _register(_verb)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write the cohort into.")],
    subjects: Annotated[int, typer.Option(min=1, help="Subjects of each of the two datasets.")] = 24,
    seed: Annotated[int, typer.Option(help="The cohort is a function of this number.")] = 0,
    spacing_mm: Annotated[float, typer.Option(min=0.5, max=10, help="Voxel size of the scans.")] = 2.0,
    broken: Annotated[bool, typer.Option(help="Add files that are broken on purpose.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
) -> None:
    """Write a phantom cohort made from real anatomy: NIfTI in a BIDS tree and in the BrainMVP-16k layout."""
    from flows.progress import Progress  # keeps `--help` fast
    from tasks.phantom import PhantomConfig, write_cohort

    config = PhantomConfig(
        bids_subjects=subjects, datalist_subjects=subjects, seed=seed, spacing_mm=spacing_mm, broken=broken
    )
    with Progress("phantom", 0, "subjects") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        paths = write_cohort(config, out, progress=show, processes=processes)
    for name in ("bids", "datalist", "broken"):
        typer.echo(f"{name:9s}{getattr(paths, name)}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of the `brainloom` command; errors of the user's input come without a traceback."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        app()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        if os.environ.get("BRAINLOOM_DEBUG"):
            raise
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
