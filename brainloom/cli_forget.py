"""What `brainloom store forget` does and says beyond the store: Prefect, staged copies, workspaces, what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from flows.forget_server import ServerReach
    from tasks.forget import Forgotten
    from tasks.forget_files import Reached
    from tasks.forget_reach import Person

SHOWN = 20
"""Files of each kind that are named."""


@dataclass(frozen=True)
class Places:
    """Where else a subject is looked for."""

    store: str
    stage_dirs: list[Path]
    workspaces: list[Path]

    def in_workspaces(self, person: Person) -> dict[Path, Reached]:
        """Return what each workspace holds."""
        from infra import storage  # keeps `--help` fast
        from tasks.forget_files import reach

        skip = [storage.local_path(self.store)] if storage.is_local(self.store) else []
        return {folder: reach(folder, person, skip) for folder in self.workspaces}


def own_workspace(store: str) -> list[Path]:
    """Return the folder in which a local store lies, when it is a workspace."""
    from infra import storage  # keeps `--help` fast
    from tasks.forget_files import is_workspace

    folder = storage.local_path(store).parent if storage.is_local(store) else None
    return [folder] if folder is not None and is_workspace(folder) else []


def say_dry_run(places: Places, person: Person, rows: Sequence[int]) -> None:
    """Say what would be erased, and change nothing."""
    typer.echo(f"{places.store}: rows {', '.join(map(str, rows)) or 'none'} would be erased")
    found = places.in_workspaces(person)
    _say_server(_search_server(person, found))
    _listed("lines of it would be erased from", _own_logs(person))
    for folder, reached in found.items():
        _say_workspace(folder, reached, person)
    for folder in places.stage_dirs:
        typer.echo(f"{folder}: staged copies of these rows would be erased")
    typer.echo("Dry run: nothing was changed")


def erase_elsewhere(places: Places, done: Forgotten) -> None:
    """Erase what server, staging folders and workspaces hold, and say so."""
    from tasks.forget_files import erase  # keeps `--help` fast
    from tasks.forget_lines import erase_from_log

    found = places.in_workspaces(done.person)
    server = _search_server(done.person, found)
    if server is not None:
        from flows.forget_server import erase_from_server

        erase_from_server(server)
    _say_server(server)
    for log in (logs := _own_logs(done.person)):
        erase_from_log(log, done.person)
    _listed("lines of it erased from", logs)
    for folder in places.stage_dirs:
        _erase_staged(folder, places.store, done)
    for folder, reached in found.items():
        erase(reached, done.person)
        _say_workspace(folder, reached, done.person)


def say_rest(places: Places) -> None:
    """Say what was not looked at, and what cannot be undone."""
    staged = "other folders" if places.stage_dirs else "any folder: name it with --stage-dir"
    searched = "other workspaces" if places.workspaces else "any workspace: name it with --workspace"
    typer.echo(
        "Weights cannot unlearn: trainings that saw it keep theirs and refuse to resume; train anew where it is asked"
    )
    typer.echo("Not looked at:")
    typer.echo("- source files elsewhere, checkpoints, backups")
    typer.echo("- events of a Prefect server, whole pages among them: our own drops them after seven days")
    typer.echo(f"- staged copies in {staged}")
    typer.echo(f"- {searched}")


def _search_server(person: Person, found: dict[Path, Reached]) -> ServerReach | None:
    """Return what the Prefect server holds; None when none runs here and none was named."""
    from brainloom.terminal import prepare_prefect  # keeps `--help` fast
    from infra.server import connect, server_status
    from infra.settings import Settings

    settings = Settings()
    if server_status(settings) is None:
        if settings.api_url:
            raise typer.BadParameter(f"no Prefect server answers at {settings.api_url}", param_hint="--api-url")
        return None
    prepare_prefect(settings)
    connect(settings)
    from flows.forget_server import search_server

    return search_server(person, [name for reached in found.values() for name in reached.trained])


def _own_logs(person: Person) -> list[Path]:
    """Return the logs of our own server and worker that name a subject, whether they run or not."""
    from infra.settings import Settings  # keeps `--help` fast
    from tasks.forget_lines import logs_with

    return logs_with(Settings().server_dir, person)


def _say_server(found: ServerReach | None) -> None:
    if found is None:
        typer.echo("Prefect: no server runs here and none was named (--api-url): artifacts and logs were not looked at")
        return
    typer.echo(
        f"Prefect: {len(found.flow_runs)} flow runs with logs and artifacts, {len(found.artifacts)} artifacts of others"
    )
    _listed("flow run", [run.name for run in found.flow_runs])
    _listed("artifact", [one.key for one in found.artifacts])
    _listed("still running, run `store forget` again when it has ended: flow run", [run.name for run in found.running])


def _erase_staged(folder: Path, store: str, done: Forgotten) -> None:
    from tasks.forget_reach import erase_staged, other_copies  # keeps `--help` fast

    # A store that was never finalised was never staged.
    held, known = erase_staged(folder, store, done.person.dataset, done.rows) if done.digest else ([], [])
    typer.echo(f"{folder}: {len(held)} staged copies erased")
    _listed("erased from", held)
    others = other_copies(folder, known, done.person)
    _listed("not erased, a copy of another store or of this one under another URL:", others)


def _say_workspace(folder: Path, found: Reached, person: Person) -> None:
    from tasks.forget_files import WORDS  # keeps `--help` fast
    from tasks.forget_reach import SHORTEST

    typer.echo(f"{folder}: {len(found.findings)} files hold it, {len(found.trained)} trainings saw it")
    for action, words in WORDS.items():
        _listed(words, [one.path for one in found.findings if one.action == action])
    _listed("its weights saw it: training", found.trained)
    _listed("could not be read:", found.unread)
    if not person.is_told_by_words:
        typer.echo(f"ids of fewer than {SHORTEST} characters were looked for in columns only, not in texts and names")


def _listed(words: str, items: Sequence[Any]) -> None:
    for item in items[:SHOWN]:
        typer.echo(f"  {words} {item}")
    if len(items) > SHOWN:
        typer.echo(f"  {words} ... and {len(items) - SHOWN} more")
