"""The command line: every flow, the store, the server, the phantoms and the demo."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.markup import escape
from yaml.constructor import ConstructorError

from brainloom import __version__
from brainloom.cli_atlas import atlas_app
from brainloom.cli_benchmark import (
    Benchmarks,
    FinetuneEpochs,
    Networks,
    Predictions,
    Runs,
    Seeds,
    Workspace,
    benchmark_options,
    print_summary,
)
from brainloom.cli_benchmarks import benchmarks_app
from brainloom.cli_bootstrap import bootstrap
from brainloom.cli_compare import compare
from brainloom.cli_demo import demo
from brainloom.cli_predictions import predictions
from brainloom.cli_server import deploy, doctor, down, up
from brainloom.cli_split import split_app
from brainloom.cli_store import store_app
from brainloom.cli_weights import weights_app
from brainloom.terminal import ApiUrl, console, folder_of, is_expected, prepare_prefect

app = typer.Typer(
    name="brainloom",
    help="Raw multi-modal brain MRI into Zarr stores, pre-trained 3D networks and honest benchmark tables.\n\n"
    "Research software, not for clinical use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")
app.add_typer(weights_app, name="weights")
app.add_typer(atlas_app, name="atlas")
app.add_typer(split_app, name="split")
app.add_typer(benchmarks_app, name="benchmarks")
for command in (demo, compare, predictions, up, down, doctor, deploy, bootstrap):
    app.command()(command)

CONFIG_HELP = "YAML file with the flow's parameters."
Config = Annotated[Path, typer.Option("--config", "-c", help=CONFIG_HELP)]
Deployment = Annotated[
    str, typer.Option(help="Run as this deployment (`flow/deployment`) on the server instead of in this process.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print time, disk, memory and S3 requests, or what `pretrain` would launch; start nothing."
    ),
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
    "probe": ("flows.probe", "ProbeParams", "Probe frozen encoders linearly and write the tables."),
    "prompt": ("flows.prompt", "PromptParams", "Diagnose images by labelled connectomes and write the tables."),
    "benchmark": (
        "flows.benchmark",
        "BenchmarkParams",
        "Compare trainings, or run the whole chain from NIfTI.",
    ),
    "verify": ("flows.verify", "VerifyParams", "Verify stores: what the weekly schedule runs."),
    "retention": ("flows.retention", "RetentionParams", "List what is old, and remove it on request."),
}

ESTIMATED = ("catalog", "preprocess", "ingest", "pretrain")
"""Verbs whose module has a `dry_run`."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice: plain YAML silently keeps the last, and a second `sources:` drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; raises ConstructorError with the line of a repeated key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} comes twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_config(config: Path) -> dict[str, Any]:
    if not config.is_file():
        raise typer.BadParameter(f"{config} is not a file", param_hint="--config")
    try:
        content = yaml.load(config.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{config} is not YAML: {error}", param_hint="--config") from None
    if not isinstance(content, dict | None):
        found = type(content).__name__
        raise typer.BadParameter(
            f"{config} must hold parameters as `name: value` lines, found a {found}", param_hint="--config"
        )
    return content or {}


def _validate(model: type[BaseModel], content: dict[str, Any], config: Path | None) -> BaseModel:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
        known = ", ".join(model.model_fields)
        text = f"{'; '.join(lines)} (parameters: {known})"
        if config is None:
            raise typer.BadParameter(text) from None
        raise typer.BadParameter(f"{config}: {text}", param_hint="--config") from None


def run_flow(verb: str, params: BaseModel, deployment: str = "") -> Any:
    """Run the flow of a verb against the local server, or as a deployment; returns the flow's result."""
    from flows.start import start  # Prefect must be imported after `connect`

    module, _, _ = FLOWS[verb]
    flow = getattr(import_module(module), verb)
    with folder_of("workspace", Path(getattr(params, "workspace", "") or ".")):
        return start(flow, deployment=deployment or None, params=params)


def _run(
    verb: str, config: Path | None, deployment: str, dry_run: bool, given: Mapping[str, Any] | None = None
) -> None:
    """Run the flow of a verb with the parameters of a file and those given beside it, or print what it would cost."""
    from infra.server import connect  # keeps `--help` fast
    from infra.settings import Settings

    module, params_name, _ = FLOWS[verb]
    content = {**(_read_config(config) if config else {}), **(given or {})}
    settings = Settings()
    prepare_prefect(settings)
    # Wrong parameters are refused before a server is started.
    params = _validate(getattr(import_module(module), params_name), content, config)
    if dry_run:
        typer.echo(import_module(module).dry_run(params))
        return
    console(stderr=True).print(f"Prefect UI: {connect(settings).ui_url}")
    result = run_flow(verb, params, deployment)
    if verb == "benchmark" and result and "summary" in result:
        print_summary(Path(result["summary"]))
    if result is not None:
        Console().print_json(data=result, default=str)


def _register(verb: str) -> None:
    help_text = FLOWS[verb][2]

    def command(config: Config, deployment: Deployment = "", api_url: ApiUrl = None) -> None:
        _run(verb, config, deployment, dry_run=False)

    def estimated(config: Config, deployment: Deployment = "", dry_run: DryRun = False, api_url: ApiUrl = None) -> None:
        _run(verb, config, deployment, dry_run)

    app.command(name=verb, help=help_text)(estimated if verb in ESTIMATED else command)


for _verb in FLOWS:
    if _verb != "benchmark":
        _register(_verb)


@app.command(name="benchmark", help=FLOWS["benchmark"][2])
def benchmark(
    config: Annotated[Path | None, typer.Option("--config", "-c", help=CONFIG_HELP)] = None,
    workspace: Workspace = None,
    runs: Runs = None,
    benchmarks: Benchmarks = None,
    networks: Networks = None,
    seeds: Seeds = None,
    finetune_epochs: FinetuneEpochs = None,
    predictions: Predictions = None,
    deployment: Deployment = "",
    api_url: ApiUrl = None,
) -> None:
    """Compare finished trainings (`--runs`), or run the whole chain of a config; options win over the file."""
    given = benchmark_options(workspace, runs, benchmarks, networks, seeds, finetune_epochs, predictions)
    if config is None and not given:
        raise typer.BadParameter("name the trainings to compare with --runs, or a file with --config")
    _run("benchmark", config, deployment, dry_run=False, given=given)


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
    from infra.settings import Settings  # keeps `--help` fast

    prepare_prefect(Settings())
    from flows.progress import Progress
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


@app.command(name="phantom-anat")
def phantom_anat(
    out: Annotated[Path, typer.Argument(help="Folder to write the cohort into.")],
    subjects: Annotated[int, typer.Option(min=1, help="Subjects.")] = 200,
    seed: Annotated[int, typer.Option(help="The cohort is a function of this number.")] = 0,
    spec: Annotated[str, typer.Option(help="Grid of the maps: vbm_tiny (6 mm) or vbm (1.5 mm).")] = "vbm_tiny",
    t1_spacing_mm: Annotated[
        float | None, typer.Option(help="Voxel size of T1s, 1 to 6; without it there are none.")
    ] = None,
    patients: Annotated[bool, typer.Option(help="A quarter each is schizophrenia-like and ad-like.")] = True,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
) -> None:
    """Write a phantom cohort for AnatCL: CAT12 maps and FreeSurfer tables that change with age and diagnosis."""
    from infra.settings import Settings  # keeps `--help` fast

    prepare_prefect(Settings())
    from flows.progress import Progress
    from tasks.phantom.anatomical import AnatomicalConfig, write_anatomical_cohort

    config = AnatomicalConfig.model_validate(
        {"subjects": subjects, "seed": seed, "spec": spec, "t1_spacing_mm": t1_spacing_mm, "patients": patients}
    )
    with Progress("phantom-anat", subjects, "subjects") as progress:
        paths = write_anatomical_cohort(config, out, lambda done, _: progress.update(done), processes)
    for name in ("root", "cat12", "freesurfer", "participants", "latents"):
        typer.echo(f"{name:13s}{getattr(paths, name)}")


@app.command(name="phantom-connect")
def phantom_connect(
    out: Annotated[Path, typer.Argument(help="Folder to write the cohort into.")],
    subjects: Annotated[int, typer.Option(min=1, help="Subjects.")] = 200,
    seed: Annotated[int, typer.Option(help="The cohort is a function of this number.")] = 0,
    frames: Annotated[int, typer.Option(help="Frames of the resting-state signals, 100 or more.")] = 200,
    t1_spacing_mm: Annotated[float, typer.Option(help="Voxel size of the T1s, 1 to 6.")] = 6.0,
    bold_subjects: Annotated[
        int, typer.Option(min=0, help="The first so many also have BOLD images as of fMRIPrep.")
    ] = 0,
    patients: Annotated[bool, typer.Option(help="A third each is hypoconnected and hyperconnected.")] = True,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
) -> None:
    """Write a phantom cohort for CINP: T1s and time series of people whose cortex and connectome share traits."""
    from infra.settings import Settings  # keeps `--help` fast

    prepare_prefect(Settings())
    from flows.progress import Progress
    from tasks.phantom.connectivity import ConnectivityConfig, write_connectivity_cohort

    config = ConnectivityConfig.model_validate(
        {
            "subjects": subjects,
            "seed": seed,
            "frames": frames,
            "t1_spacing_mm": t1_spacing_mm,
            "bold_subjects": bold_subjects,
            "patients": patients,
        }
    )
    with Progress("phantom-connect", subjects, "subjects") as progress:
        paths = write_connectivity_cohort(config, out, lambda done, _: progress.update(done), processes)
    shown = ("root", "series", *(("fmriprep", "atlas") if bold_subjects else ()), "participants", "latents")
    for name in shown:
        typer.echo(f"{name:13s}{getattr(paths, name)}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `brainloom` itself, without a command."""


def _text(error: Exception) -> str:
    from infra.settings import error_text  # keeps `--help` fast

    return error_text(error)


def main() -> None:
    """Entry point of the `brainloom` command; errors that speak to the user come without a traceback."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    state = Path(os.environ.get("BRAINLOOM_STATE_DIR") or "state")
    try:
        with folder_of("BRAINLOOM_STATE_DIR", state / "server"):
            app()
    except Exception as error:
        if os.environ.get("BRAINLOOM_DEBUG") or not is_expected(error):
            raise
        console(stderr=True).print(f"[bold red]error:[/] {escape(_text(error))}")
        sys.exit(2)
