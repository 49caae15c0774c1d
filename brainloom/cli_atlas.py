"""`brainloom atlas`: which atlases connectomes know, and how to name one of your own in a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

atlas_app = typer.Typer(
    help="Atlases of connectomes: list, show (the block of a spec), make, fetch.", no_args_is_help=True
)


@atlas_app.command(name="list")
def list_atlases() -> None:
    """List the atlases that a spec knows by name."""
    from models.connectomes import KNOWN_ATLASES  # keeps `--help` fast
    from tasks.atlas_table import FETCHED

    table = Table("atlas", "regions", "first", "label image")
    for name, regions in KNOWN_ATLASES.items():
        image = "brainloom atlas fetch" if name in FETCHED else "your own"
        image = "brainloom atlas make" if name == "desikan_killiany" else image
        table.add_row(name, str(len(regions)), next(iter(regions.values())), image)
    Console().print(table)


@atlas_app.command()
def show(
    atlas: Annotated[str, typer.Argument(help="A known name, a label image (NIfTI), or a file of ROI time series.")],
    labels: Annotated[str, typer.Option(help="Table of values and names: tsv, csv, or FreeSurfer's colours.")] = "",
    name: Annotated[str, typer.Option(help="Name of the atlas; default: from the file's name.")] = "",
) -> None:
    """Print the block `connectome` of a spec for an atlas, ready to paste into `own_spec`."""
    from tasks.atlas_table import atlas_block  # keeps `--help` fast

    typer.echo(atlas_block(atlas, labels, name), nl=False)


@atlas_app.command()
def make(
    atlas: Annotated[str, typer.Argument(help="desikan_killiany: the only one that is installed with us.")],
    out: Annotated[Path, typer.Argument(help="NIfTI file to write; ends in .nii.gz or .nii.")],
) -> None:
    """Write the label image of an atlas that is installed, and print its block."""
    from tasks.atlas_table import atlas_block, make_desikan_killiany  # keeps `--help` fast
    from tasks.headers import is_nifti

    if atlas != "desikan_killiany":
        raise typer.BadParameter(
            f"{atlas!r} is not installed, desikan_killiany is; see `brainloom atlas list`", param_hint="ATLAS"
        )
    if not is_nifti(out.name):
        raise typer.BadParameter(f"{out}: a label image ends in .nii.gz or .nii", param_hint="OUT")
    make_desikan_killiany(out)
    typer.echo(atlas_block(str(out), name=atlas), nl=False)


@atlas_app.command()
def fetch(
    atlas: Annotated[str, typer.Argument(help="aal116, schaefer_100, schaefer_200 or schaefer_400.")],
    to: Annotated[Path, typer.Option(help="Folder to write into.")],
) -> None:
    """Download the label image of a known atlas (this uses the network), and print its block."""
    from tasks.atlas_table import atlas_block, fetch_atlas  # keeps `--help` fast

    typer.echo(atlas_block(str(fetch_atlas(atlas, to)), name=atlas), nl=False)
