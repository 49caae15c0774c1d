"""What `brainloom store forget` does and says beyond the store: staged copies, workspaces, and what it cannot reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from tasks.forget import Forgotten
    from tasks.forget_reach import Person

SHOWN = 20
"""Files of each kind that are named."""


def own_workspace(store: str) -> list[Path]:
    """Return the folder in which a local store lies, when it is a workspace."""
    from infra import storage  # keeps `--help` fast
    from tasks.forget_reach import is_workspace

    folder = storage.local_path(store).parent if storage.is_local(store) else None
    return [folder] if folder is not None and is_workspace(folder) else []


def say_reach(store: str, done: Forgotten, person: Person, stage_dirs: list[Path], workspaces: list[Path]) -> None:
    """Erase staged copies, and name what else holds the subject and what was not looked at."""
    for folder in stage_dirs:
        _say_staged(folder, store, done, person)
    for folder in workspaces:
        _say_workspace(folder, store, person)
    staged = "other folders" if stage_dirs else "any folder: name it with --stage-dir"
    searched = "other workspaces" if workspaces else "any workspace: name it with --workspace"
    typer.echo("Trainings that used it refuse to resume. Not looked at:")
    typer.echo("- source files elsewhere, pictures and checkpoints, QC pages in Prefect's database, backups")
    typer.echo(f"- staged copies in {staged}")
    typer.echo(f"- {searched}")


def _say_staged(folder: Path, store: str, done: Forgotten, person: Person) -> None:
    from tasks.forget_reach import erase_staged, other_copies  # keeps `--help` fast

    # A store that was never finalised was never staged.
    held, known = erase_staged(folder, store, person.dataset, done.rows) if done.digest else ([], [])
    typer.echo(f"{folder}: {len(held)} staged copies erased")
    _listed("erased from", held)
    others = other_copies(folder, known, person)
    _listed("not erased, a copy of another store or of this one under another URL:", others)


def _say_workspace(folder: Path, store: str, person: Person) -> None:
    from infra import storage  # keeps `--help` fast
    from tasks.forget_reach import SHORTEST, reach

    found = reach(folder, person, [storage.local_path(store)] if storage.is_local(store) else [])
    typer.echo(f"{folder}: {len(found.files)} files name it, {len(found.trained)} trainings saw it; none was changed")
    _listed("names it:", found.files)
    _listed("its weights saw it: training", found.trained)
    _listed("could not be read:", found.unread)
    if len(person.names) < len({person.subject, *person.cases}):
        typer.echo(f"ids of fewer than {SHORTEST} characters were looked for in tables only, not in texts and names")


def _listed(words: str, items: Sequence[Any]) -> None:
    for item in items[:SHOWN]:
        typer.echo(f"  {words} {item}")
    if len(items) > SHOWN:
        typer.echo(f"  {words} ... and {len(items) - SHOWN} more")
