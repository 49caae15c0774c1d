"""Options of `brainloom benchmark`: which trainings are compared on what, without a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from brainloom.terminal import print_table

Workspace = Annotated[Path | None, typer.Option(help="Folder with store, splits and trainings.")]
Runs = Annotated[
    list[str] | None,
    typer.Option(
        help="Finished or imported training to compare, as `NAME` or `LABEL=NAME`; may come several times. The first "
        "is tested against every other row. `LABEL=NAME+NAME`: seeds of one pre-training are one row."
    ),
]
Benchmarks = Annotated[
    list[str] | None,
    typer.Option(help="Registered benchmark, probe or prompting task; may come several times. Default: the phantoms'."),
]
Networks = Annotated[
    list[str] | None, typer.Option(help="Network from scratch as a further row: swin_unetr or dynunet; may repeat.")
]
Predictions = Annotated[
    list[str] | None,
    typer.Option(
        help="Label maps that others predicted, as `NAME=BENCHMARK:FOLDER`, one NIfTI a test case: a further row of "
        "that segmentation; may come several times."
    ),
]
Seeds = Annotated[int | None, typer.Option(help="Fine-tunings of each row, from 1 to 20.")]
FinetuneEpochs = Annotated[int | None, typer.Option(help="Epochs of every fine-tuning; default: as the recipe says.")]


def benchmark_options(
    workspace: Path | None,
    runs: Sequence[str] | None,
    benchmarks: Sequence[str] | None,
    networks: Sequence[str] | None,
    seeds: int | None,
    finetune_epochs: int | None,
    predictions: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the parameters of the flow that were given as options."""
    found: dict[str, Any] = {
        "workspace": str(workspace) if workspace else None,
        "runs": [_run_row(text) for text in runs or ()] or None,
        "benchmarks": list(benchmarks or ()) or None,
        "networks": list(networks or ()) or None,
        "predictions": [_prediction_row(text) for text in predictions or ()] or None,
        "seeds": seeds,
        "finetune_epochs": finetune_epochs,
    }
    return {name: value for name, value in found.items() if value is not None}


def _run_row(text: str) -> dict[str, Any]:
    """Return the row of `NAME` or `LABEL=NAME`, where NAME may be several, joined by `+`."""
    label, equals, names = text.rpartition("=")
    training, *repeats = names.split("+")
    named = {"name": label.strip()} if equals else {}
    return {"training": training, **named, **({"repeats": repeats} if repeats else {})}


def _prediction_row(text: str) -> dict[str, str]:
    """Return the row of `NAME=BENCHMARK:FOLDER`."""
    name, equals, rest = text.partition("=")
    benchmark, colon, folder = rest.partition(":")
    if not (equals and colon and name.strip() and folder):
        raise typer.BadParameter(
            f"--predictions {text!r} is not NAME=BENCHMARK:FOLDER, e.g. nnU-Net=brats2023-ped:/data/predictions"
        )
    return {"name": name.strip(), "benchmark": benchmark.strip(), "folder": folder}


def print_summary(path: Path) -> None:
    """Print the tables of a comparison."""
    for part in path.read_text(encoding="utf-8").split("\n## ")[1:]:
        print_table(f"## {part}")
