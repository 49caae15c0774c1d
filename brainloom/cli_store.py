"""`brainloom store`: look into a store without writing code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

store_app = typer.Typer(help="Look into a store: info, verify, show.", no_args_is_help=True)
Url = Annotated[str, typer.Argument(help="Path or s3:// URL of the store.")]


@store_app.command()
def info(store: Url, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Print the spec, the digest and the cases by dataset and status."""
    from models.store import open_store, store_digest  # keeps `--help` fast

    opened = open_store(store)
    frame = opened.cases().select(["dataset", "status"]).to_pandas()
    counts = frame.value_counts(["dataset", "status"]).sort_index()
    digest = store_digest(store)
    if as_json:
        rows = {f"{dataset}/{status}": int(n) for (dataset, status), n in counts.items()}
        typer.echo(json.dumps({"store": store, "spec": opened.spec.model_dump(), "digest": digest, "cases": rows}))
        return
    spec = opened.spec
    console = Console()
    console.print(f"[bold]{store}[/]  spec {spec.name}, {spec.spacing_mm:g} mm, grid {'x'.join(map(str, spec.grid))}")
    console.print(f"digest {digest}")
    table = Table("dataset", "status", "cases")
    for (dataset, status), n in counts.items():
        table.add_row(dataset, status, str(n))
    console.print(table)


@store_app.command()
def verify(
    store: Url,
    deep: Annotated[bool, typer.Option(help="Read every voxel again and recompute the digests.")] = False,
) -> None:
    """Check receipts, tables and arrays against each other; exit code 1 when something is wrong."""
    from models.store import verify as verify_store  # keeps `--help` fast

    problems = verify_store(store, deep=deep)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{store}: no problem found ({'every voxel read' if deep else 'tables and metadata only'})")


@store_app.command()
def show(
    store: Url,
    case: Annotated[str, typer.Argument(help="`dataset/case`, as in `store info --json` or the catalog.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")] = Path("mosaic.png"),
) -> None:
    """Write the tri-planar mosaic of one case."""
    from models.store import open_store  # keeps `--help` fast
    from tasks.qc import mosaic_of

    opened = open_store(store)
    rows = {
        f"{line['dataset']}/{line['case']}": line for line in opened.cases().to_pylist() if line["status"] == "stored"
    }
    if case not in rows:
        raise typer.BadParameter(f"no stored case {case!r} in {store}; for example {next(iter(rows), 'none')!r}")
    out.write_bytes(mosaic_of(opened, rows[case]["dataset"], rows[case]["row"]))
    typer.echo(str(out))
