"""`brainloom split`: the splits of papers in, what a split holds, and whom the crosswalks of a workspace name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

split_app = typer.Typer(
    help="Splits of a workspace: import (a paper's file), show, people (crosswalks).", no_args_is_help=True
)
Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="Folder with the splits.")]
StoreUrl = Annotated[str, typer.Option("--store", help="Path or s3:// URL; default: <workspace>/store.zarr.")]
Name = Annotated[str, typer.Option("--name", help="Of the split in <workspace>/splits.")]


@split_app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON datalist, or CSV, TSV or Parquet table of subjects and roles.")],
    workspace: Workspace,
    name: Name = "default",
    store: StoreUrl = "",
    dataset: Annotated[str, typer.Option(help="Whose subjects they are; default: the table's column `dataset`.")] = "",
    subject: Annotated[str, typer.Option(help="Column of the subjects; default: a usual name.")] = "",
    role: Annotated[str, typer.Option(help="Column of the roles; default: role, split, set, subset, partition.")] = "",
    prefix: Annotated[str, typer.Option(help="Put before subjects that lack it, e.g. `sub-`.")] = "",
    word: Annotated[list[str] | None, typer.Option(help="WORD=ROLE of the file; may be repeated.")] = None,
    rest: Annotated[str, typer.Option(help="Role of subjects of the dataset that the file does not name.")] = "",
    known_only: Annotated[bool, typer.Option("--known-only", help="Pass over subjects the store lacks.")] = False,
) -> None:
    """Take the roles of subjects from a paper's file; they stay when the split is extended."""
    from tasks.split_import import Reading, import_split  # keeps `--help` fast

    words = dict(_word(text) for text in word or ())
    reading = Reading(dataset, subject, role, prefix, words)
    url, stored = _stored(workspace, store)
    done = import_split(workspace, name, url, stored, file, reading, rest, known_only)
    for (whose, what), count in done.counts.items():
        typer.echo(f"{whose}: {count} {what}")
    if done.rest:
        typer.echo(f"not in the file: {done.rest} {rest}")
    if done.unknown:
        typer.echo(f"not in the store, passed over: {done.unknown}")
    typer.echo(f"{done.path}  digest {done.digest}")


@split_app.command()
def show(workspace: Workspace, name: Name = "default") -> None:
    """Print the subjects of a split by dataset and role, its digest and where it comes from."""
    from tasks.split_import import check_name, split_counts  # keeps `--help` fast
    from tasks.splits import IMPORTED, ROLES, read_record

    check_name(name)
    path = workspace / "splits" / f"{name}.parquet"
    counts = split_counts(path)
    table = Table("dataset", *ROLES)
    for dataset, line in counts.iterrows():
        table.add_row(str(dataset), *(str(count) for count in line))
    record = read_record(path)
    Console().print(table)
    typer.echo(f"digest {record['digest']}  seed {record.get('seed')}  shares {record.get('shares')}")
    for source in record.get(IMPORTED, []):
        rest = f", others {source['rest']}" if source["rest"] else ""
        typer.echo(
            f"{source['subjects']} subjects of {', '.join(source['datasets'])} from {source['file']} "
            f"(SHA-256 {source['sha256'][:12]}){rest}"
        )


@split_app.command()
def people(workspace: Workspace, store: StoreUrl = "") -> None:
    """Print whom the crosswalks of a workspace call one person, and what they name that is not in the store."""
    from tasks.crosswalk import FOLDER, read_crosswalks, remarks  # keeps `--help` fast

    _, stored = _stored(workspace, store)
    found = read_crosswalks(workspace)
    for crosswalk in found:
        both = sum(sum(subject in stored for subject in ids) > 1 for ids in crosswalk.people.values())
        typer.echo(f"{crosswalk.path.name}: {len(crosswalk.people)} persons, {both} with two ids or more in the store")
        for sentence in remarks(crosswalk, stored):
            typer.echo(f"  {sentence}")
    if not found:
        typer.echo(f"no crosswalk in {workspace / FOLDER}")


def _stored(workspace: Path, store: str) -> tuple[str, set[tuple[str, str]]]:
    """Return the URL of the store and its subjects."""
    from models.store import open_store  # keeps `--help` fast
    from tasks.split_import import stored_subjects

    url = store or str(workspace / "store.zarr")
    return url, stored_subjects(open_store(url).cases().to_pandas())


def _word(text: str) -> tuple[str, str]:
    theirs, separator, ours = text.partition("=")
    if not separator or not theirs or not ours:
        raise typer.BadParameter(f"{text!r} is not WORD=ROLE, e.g. internal_test=val", param_hint="--word")
    return theirs, ours
