"""`brainloom predictions`: the predicted segmentations of a fine-tuning as NIfTI files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predictions(
    training: Annotated[Path, typer.Argument(help="Folder of a finished segmentation training.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path("predictions"),
    case: Annotated[list[str] | None, typer.Option(help="`dataset/case`; may be repeated. Default: all.")] = None,
    native: Annotated[bool, typer.Option(help="On the grid of each case's reference scan, or as stored.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
) -> None:
    """Write the segmentations of a training's test cases as NIfTI labels of the dataset's own scheme."""
    from tasks.native import export_predictions  # keeps `--help` fast

    for path in export_predictions(training, out, cases=case or (), native=native, overwrite=overwrite):
        typer.echo(str(path))
