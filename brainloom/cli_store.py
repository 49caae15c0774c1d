"""`brainloom store`: look into a store and look after it without writing code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from brainloom.cli_forget import Places, erase_elsewhere, own_workspace, say_dry_run, say_rest
from brainloom.terminal import ApiUrl

store_app = typer.Typer(
    help="Look into a store and look after it: info, verify, show, qc, sources, export, compare, duplicates, "
    "compact, upgrade, forget.",
    no_args_is_help=True,
)
Url = Annotated[str, typer.Argument(help="Path or s3:// URL of the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
SHOWN = 20
"""Lines of each kind that are printed; --json has them all."""


@store_app.command()
def info(store: Url, as_json: AsJson = False) -> None:
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
    if spec.connectome is not None:
        regions = len(spec.connectome.regions)
        console.print(f"connectomes of {spec.connectome.atlas}, {regions} regions, {spec.connectome.kind}")
    console.print(f"digest {digest}")
    table = Table("dataset", "status", "cases")
    for (dataset, status), n in counts.items():
        table.add_row(dataset, status, str(n))
    console.print(table)


@store_app.command()
def verify(
    store: Url,
    deep: Annotated[bool, typer.Option(help="Read every voxel again and recompute the digests.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check receipts, tables and arrays against each other; exit code 1 when something is wrong."""
    from tasks.verify import verify as verify_store  # keeps `--help` fast

    problems = verify_store(store, deep=deep)
    if as_json:
        typer.echo(json.dumps({"store": store, "deep": deep, "problems": problems}))
    for problem in [] if as_json else problems:
        typer.echo(problem)
    if problems and not as_json:
        typer.echo(f"{len(problems)} problems; `brainloom preprocess` with repair: true mends those of stored cases")
    if problems:
        raise typer.Exit(1)
    if not as_json:
        typer.echo(f"{store}: no problem found ({'every voxel read' if deep else 'tables and metadata only'})")


@store_app.command()
def show(
    store: Url,
    case: Annotated[str, typer.Argument(help="`dataset/case`, as in cases.parquet or the catalog.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write; ends in .png.")] = Path("mosaic.png"),
) -> None:
    """Write the tri-planar mosaic of one case, its connectome beside it."""
    from models.store import open_store  # keeps `--help` fast
    from tasks.qc import mosaic_of
    from tasks.stored_cases import stored_rows

    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"{out}: the mosaic is a PNG; give a name that ends in .png", param_hint="--out")
    opened = open_store(store)
    picture = mosaic_of(opened, *stored_rows(opened, [case])[case])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(picture)
    typer.echo(str(out))


@store_app.command()
def qc(
    store: Url,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder or s3:// prefix; default: beside it.")] = None,
    catalog: Annotated[str | None, typer.Option(help="catalog.parquet, for what it left out; default: none.")] = None,
    mosaics: Annotated[int, typer.Option(min=0, help="Cases to draw of each dataset, the worst first.")] = 12,
) -> None:
    """Write the quality report: measures, cases that stand out and why, mosaics, quarantine."""
    from tasks.qc import quarantine_table  # keeps `--help` fast
    from tasks.qc_content import gather
    from tasks.qc_report import write_qc

    found = gather(store, quarantine_table(store, catalog), mosaics)
    for url in write_qc(store, found, out):
        typer.echo(url)
    stored = sum(dataset.counts["stored"] for dataset in found.datasets)
    typer.echo(f"{len(found.outliers)} of {stored} cases stand out")


@store_app.command()
def sources(
    store: Url,
    catalog: Annotated[str, typer.Option(help="catalog.parquet, or the workspace that holds it.")],
    case: Annotated[list[str] | None, typer.Option(help="Only this `dataset/case`; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say where the files of each row lie, by the catalog: the way back in a store that hides paths."""
    from models.store import open_store  # keeps `--help` fast
    from tasks.catalog import read_catalog
    from tasks.hidden_paths import identified
    from tasks.stored_cases import stored_rows

    opened = open_store(store)
    wanted = set(stored_rows(opened, case).values()) if case else None
    rows = [
        row
        for row in identified(opened.url, read_catalog(catalog))
        if wanted is None or (row["dataset"], int(row["row"])) in wanted
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        place = row["path"] if row["found"] == "same" else f"{row['path']} ({row['found']})".strip()
        typer.echo(f"{row['dataset']}/{row['case']} (row {row['row']})  {row['modality']}  {place}")


@store_app.command()
def export(
    store: Url,
    cases: Annotated[list[str], typer.Argument(help="One or more `dataset/case`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path("export"),
    native: Annotated[bool, typer.Option(help="On each source's own grid, with its intensities.")] = False,
    modality: Annotated[
        list[str] | None, typer.Option(help="Only this one, `label`, `descriptors` or `connectome`; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
) -> None:
    """Write cases back: NIfTI on the stored grid or on their sources' grids; tables of descriptors and connectomes."""
    from tasks.export_nifti import export_cases  # keeps `--help` fast

    for path in export_cases(store, cases, out, native=native, modalities=modality or (), overwrite=overwrite):
        typer.echo(str(path))


@store_app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Path or s3:// URL of one store.")],
    b: Annotated[str, typer.Argument(help="Path or s3:// URL of the other.")],
    voxels: Annotated[bool, typer.Option(help="Read changed cases: how far apart are they?")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how two stores differ; exit code 1 when they do."""
    from tasks.compare import compare as compare_stores  # keeps `--help` fast

    found = compare_stores(a, b, voxels)
    typer.echo(found.model_dump_json() if as_json else "\n".join(found.sentences(SHOWN)))
    if not found.equal:
        raise typer.Exit(1)


@store_app.command()
def duplicates(
    store: Url,
    search: Annotated[bool, typer.Option(help="Search again instead of reading duplicates.parquet.")] = False,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Similarity from which on pairs are listed; searches again.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List pairs of subjects that look like one person; splits keep them together."""
    from models.store import open_store  # keeps `--help` fast
    from tasks import duplicates as search_of

    opened = open_store(store)
    cases, order = opened.cases(), opened.spec.reference_order
    pairs = search_of.read_duplicates(store)
    if search or threshold is not None:
        pairs = search_of.find_duplicates(cases, order, threshold)
    if as_json:
        typer.echo(json.dumps(pairs))
        return
    for pair in pairs:
        one, other = (f"{pair[f'dataset_{side}']}/{pair[f'subject_{side}']}" for side in "ab")
        typer.echo(f"{pair['similarity']:.3f}  {one}  {other}")
    typer.echo(f"{store}: {len(pairs)} pairs of subjects look alike")
    for reference, count in search_of.passed_over(cases, order).items():
        typer.echo(f"not compared: {count} subjects with {reference}; at least {search_of.MIN_SUBJECTS} are needed")


@store_app.command()
def compact(store: Url) -> None:
    """Erase the voxels of retired rows; digests and the rows of all current cases stay."""
    from tasks.compact import compact as compact_store  # keeps `--help` fast

    done = compact_store(store)
    typer.echo(
        f"{store}: {done.rows} retired rows dropped, {done.freed_bytes / 1e6:.1f} MB freed; digest {done.digest}"
    )


@store_app.command()
def upgrade(store: Url) -> None:
    """Bring a store that an older version made to the schema of this one; no voxel and no digest changes."""
    from tasks.upgrade import upgrade as upgrade_store  # keeps `--help` fast

    done = upgrade_store(store)
    what = f"{done.before} -> {done.now}" if done.before != done.now else f"{done.now}, nothing to do"
    typer.echo(f"{store}: schema {what}")


@store_app.command()
def forget(
    store: Url,
    subject: Annotated[str, typer.Argument(help="`dataset/subject`, as in cases.parquet or the catalog.")],
    lift: Annotated[
        bool, typer.Option(help="Remove the tombstone: the next ingest may bring the subject back.")
    ] = False,
    stage_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Staging folder of trainings: copies in it are erased too. May be repeated."),
    ] = None,
    workspace: Annotated[
        list[Path] | None,
        typer.Option(
            help="Workspace whose tables, pages and predictions lose the subject; may be repeated. Default: that of "
            "the store, when it is a workspace."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be erased; change nothing.")] = False,
    api_url: ApiUrl = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Erase a subject for good: store, workspaces, staged copies, Prefect; if it was interrupted, run it again."""
    from tasks import forget as forgetting  # keeps `--help` fast

    dataset, slash, name = subject.partition("/")
    if not slash or not dataset or not name:
        raise typer.BadParameter(f"{subject!r}: name the subject as DATASET/SUBJECT", param_hint="SUBJECT")
    if lift:
        forgetting.lift(store, dataset, name)
        typer.echo(f"{store}: the next ingest may bring {subject} back")
        return
    for option, folders in (("--stage-dir", stage_dir), ("--workspace", workspace)):
        if absent := [folder for folder in folders or () if not folder.is_dir()]:
            raise typer.BadParameter(f"{absent[0]} is not a folder; nothing was erased", param_hint=option)
    places = Places(store, stage_dir or [], workspace or own_workspace(store))
    if dry_run:
        say_dry_run(
            places, forgetting.find_person(store, dataset, name), sorted(forgetting.rows_of(store, dataset, name))
        )
        return
    if not yes:
        typer.confirm(f"Erase {subject} from {store} and what was made of it? It cannot be undone", abort=True)
    done = forgetting.forget(store, dataset, name, lambda done: erase_elsewhere(places, done))
    rows = ", ".join(map(str, done.rows))
    typer.echo(f"{store}: {subject} is forgotten (rows {rows}); digest {done.digest or 'none yet'}")
    for other, other_name in done.linked:
        typer.echo(f"{other}/{other_name} looks like the same person and is still stored; forget it too if it is")
    say_rest(places)
