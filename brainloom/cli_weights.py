"""`brainloom weights`: released weights become trainings, trainings become files for others."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

weights_app = typer.Typer(
    help="Import released weights, export trained ones, and say what a training's weights are: import, export, info.",
    no_args_is_help=True,
)
Training = Annotated[Path, typer.Argument(help="Folder of a finished training.")]


class Variant(StrEnum):
    """Of AnatCL's files."""

    GLOBAL = "global"
    LOCAL = "local"


class Format(StrEnum):
    """Names of tasks.weights_export.FORMATS, known here without importing torch."""

    BRAINMVP = "brainmvp"
    ANATCL = "anatcl"
    SAFETENSORS = "safetensors"
    MONAI_BUNDLE = "monai-bundle"


@weights_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="BrainMVP_uniformer.pt, BrainMVP_unet.pt, or a checkpoint of AnatCL.")],
    to: Annotated[Path, typer.Option("--to", help="Training folder to make; <workspace>/trainings/<name> for flows.")],
    like: Annotated[
        Path | None,
        typer.Option(help="Finished training whose network and template grid the file has; default: as released."),
    ] = None,
    variant: Annotated[Variant | None, typer.Option(help="Of a file of AnatCL, which does not tell it.")] = None,
    fold: Annotated[int | None, typer.Option(min=0, help="Of a file of AnatCL: which fold was held out.")] = None,
) -> None:
    """Make a finished training of a released checkpoint; every tensor is used, or kept and named."""
    from tasks.weights_import import SIDE_FILE, import_weights  # keeps `--help` fast

    imported = import_weights(file, to, like, variant.value if variant else "", fold)
    if not imported.fresh:
        typer.echo(f"{to} holds the weights of {file.name} already; nothing was done")
        return
    origin = imported.done["origin"]
    typer.echo(f"{to}: {origin['layout']}, weights digest {imported.done['weights_digest']}")
    if origin["unused"]:
        typer.echo(f"{len(origin['unused'])} tensors are kept in {SIDE_FILE}: {next(iter(origin['unused'].values()))}")
    if origin["left_behind"]:
        typer.echo(f"left behind in the file: {', '.join(origin['left_behind'])}")
    typer.echo(f"licence and data: {to / 'model_card.md'}")


@weights_app.command()
def export(
    training: Training,
    out: Annotated[Path, typer.Option("--out", "-o", help="File (brainmvp, anatcl) or new folder (others) to write.")],
    form: Annotated[
        Format, typer.Option("--format", "-f", help="brainmvp, anatcl: the released layout, a .pt file.")
    ] = Format.SAFETENSORS,
) -> None:
    """Write the weights of a finished training for others; nothing is overwritten."""
    from tasks.weights_export import export_weights  # keeps `--help` fast

    typer.echo(str(export_weights(training, out, form.value)))


@weights_app.command()
def info(
    training: Training, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False
) -> None:
    """Print recipe, network, origin, digests, sizes by part and the formats that can hold a training."""
    from tasks.weights_info import weights_info  # keeps `--help` fast

    found = weights_info(training)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name in ("training", "recipe", "preset", "network", "origin", "weights_digest", "spec"):
        console.print(f"{name.replace('_', ' '):15s}{found[name]}", markup=False)
    console.print(_parts(found["parts"]))
    for form, why in found["formats"].items():
        console.print(f"--format {form:13s} {why or 'possible'}", markup=False)


def _parts(parts: dict[str, Any]) -> Table:
    table = Table("part", "tensors", "entries")
    for name, (tensors, entries) in parts.items():
        table.add_row(name, str(tensors), f"{entries:,}")
    return table
