"""What a workspace holds of a forgotten subject: found, told apart by what is to be done with it, and erased.

Tables lose the subject's lines, selections of trainings its names, pages and pictures that show it are deleted: the
flow that made them makes them again without it. Source files, notes of people and other stores are named and left.
Doing it again after a kill completes it: what leads to other files (the catalog) is changed last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from models.records import SelectedCase
from models.selection import read_selection, write_selection
from models.store_layout import CASES
from tasks.catalog import CATALOG_FILE
from tasks.crosswalk import FOLDER as CROSSWALKS
from tasks.descriptors import FOLDER as DESCRIPTORS
from tasks.forget_lines import is_line_text, lines_of, mine_in, without_subject
from tasks.forget_reach import Person
from tasks.phenotypes import PHENOTYPES_FILE
from tasks.sources.dicom import FOLDER as CONVERTED
from tasks.sources.dicom import INDEX

Action = Literal["lines", "names", "file", "left"]
WORDS: dict[Action, str] = {
    "lines": "its lines are erased in",
    "names": "its names are erased in",
    "file": "deleted:",
    "left": "names it and is left for you:",
}
"""How each action is told."""
PAGES = frozenset({"report", "tables", "probes", "prompts"})
"""Folders of a workspace whose pages a flow makes again."""
OURS = PAGES | {"trainings", "scores", "embeddings", "splits", "versions", CROSSWALKS, CONVERTED, DESCRIPTORS}
OWN_FILES = frozenset({CATALOG_FILE, PHENOTYPES_FILE, "scores.parquet"})
PAGE_SUFFIXES = frozenset({".html", ".md", ".tex", ".json", ".png", ".svg"})
OTHER_TEXTS = frozenset({".yaml", ".yml"})
SELECTION, PREDICTIONS = "selection.parquet", "predictions"


@dataclass(frozen=True)
class Finding:
    """One file, or one folder of a converted series, that holds the subject."""

    path: Path
    action: Action


@dataclass(frozen=True)
class Reached:
    """What was found in a workspace."""

    findings: tuple[Finding, ...] = ()
    trained: tuple[str, ...] = ()
    """Trainings whose weights saw it, by name; they stay, for weights cannot unlearn."""
    unread: tuple[Path, ...] = ()
    """Files that could not be read."""


def is_workspace(folder: Path) -> bool:
    """Say whether a folder looks like a workspace of ours."""
    return any((folder / name).exists() for name in (CATALOG_FILE, "trainings", "splits"))


def reach(workspace: Path, person: Person, skip: Sequence[Path] = ()) -> Reached:
    """Return what in a workspace holds a subject, and what would be done with it; nothing is changed.

    skip: folders that are not looked into (the store itself). Of other stores only the table of cases is read.
    """
    held = dict(_trainings(workspace, person))
    found: dict[Path, Action] = dict.fromkeys(_made_from_it(workspace, person), "file")
    found |= dict.fromkeys((path for folder in held for path in _pictures(folder)), "file")
    unread = []
    for path in _files(workspace, {folder.resolve() for folder in skip}):
        if any(known in found for known in (path, *path.parents)):
            continue
        try:
            action = _action(path, path.relative_to(workspace), person)
        except (OSError, ValueError, pa.ArrowException):
            unread.append(path)
            continue
        if action:
            found[path] = action
    trained = sorted(str(folder.relative_to(workspace / "trainings")) for folder, roles in held.items() if roles)
    return Reached(tuple(Finding(path, action) for path, action in found.items()), tuple(trained), tuple(unread))


def erase(reached: Reached, person: Person) -> None:
    """Do what `reach` found; raises OSError as the file system does, and may be done again after that."""
    for found in sorted(reached.findings, key=lambda one: (one.path.name == CATALOG_FILE, one.path)):
        if found.action == "file":
            shutil.rmtree(found.path) if found.path.is_dir() else found.path.unlink(missing_ok=True)
        elif found.action == "lines":
            _delete_predictions(found.path, person)
            without_subject(found.path, person)
        elif found.action == "names":
            without_names(found.path, person)


def without_names(path: Path, person: Person) -> None:
    """Write a selection with a mark in the place of a subject's names, target and age.

    Row and role stay: they tell which trainings saw it, and the resume of such a training refuses by the row.
    """
    write_selection(path, [_nameless(case, person) if person.owns(case) else case for case in read_selection(path)])


def _nameless(case: SelectedCase, person: Person) -> SelectedCase:
    return case.replace(case=f"{person.mark}-{case.row}", subject=person.mark, target="", age=None, person="")


def _action(path: Path, relative: Path, person: Person) -> Action | None:
    """Return what is to be done with a file; None when it holds nothing of the subject."""
    top = relative.parts[0]
    ours = top in OURS or str(relative) in OWN_FILES
    named = person.is_in(path.name)
    if named and ours and (top in (CONVERTED, DESCRIPTORS) or top in PAGES or path.parent.name == PREDICTIONS):
        return "file"
    if path.suffix == ".parquet":
        return _table_action(path, ours, person) or ("left" if named else None)
    if is_line_text(path) and lines_of(path, person, relative):
        return "lines" if ours else "left"
    if path.suffix in PAGE_SUFFIXES | OTHER_TEXTS and person.is_in(path.read_text("utf-8", errors="replace")):
        return "file" if top in PAGES and path.suffix in PAGE_SUFFIXES else "left"
    return "left" if person.is_in(str(relative)) else None


def _table_action(path: Path, ours: bool, person: Person) -> Action | None:
    if not mine_in(path, person):
        return None
    if path.name == SELECTION:
        named = any(person.owns(case) and case.subject != person.mark for case in read_selection(path))
        return "names" if ours and named else None
    return "lines" if ours else "left"


def _files(folder: Path, skip: Collection[Path]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if "zarr.json" in names:
            folders.clear()
            names = [name for name in names if name == CASES]
        folders[:] = sorted(name for name in folders if (here / name).resolve() not in skip)
        yield from (here / name for name in sorted(names))


def _trainings(workspace: Path, person: Person) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of trainings that selected the subject, set-aside ones too, and whether it had another role
    than `test`.
    """
    for path in sorted((workspace / "trainings").rglob(SELECTION)):
        try:
            roles = {case.role for case in read_selection(path) if person.owns(case)}
        except (OSError, ValueError, pa.ArrowException):
            continue  # `reach` tells it as unread
        if roles:
            yield path.parent, roles != {"test"}


def _pictures(training: Path) -> Iterator[Path]:
    """Yield pictures that a training drew, and event files that may hold some: which case they show nobody says."""
    yield from sorted((training / "pictures").glob("*.png"))
    yield from sorted(training.rglob("events.out.tfevents.*"))


def _made_from_it(workspace: Path, person: Person) -> Iterator[Path]:
    """Yield converted series and descriptor files of the subject, by the catalog: their names are digests.

    With a series goes the index of its dataset, a copy of DICOM headers that the next catalog reads again.
    """
    catalog = workspace / CATALOG_FILE
    if not catalog.is_file():
        return
    table = pq.read_table(catalog, columns=["dataset", "subject", "path"]).to_pylist()
    for text in {
        line["path"] for line in table if (line["dataset"], line["subject"]) == (person.dataset, person.subject)
    }:
        path = Path(text)
        if path.is_relative_to((workspace / CONVERTED).resolve()):
            yield from (one for one in (path.parent, path.parent.parent / INDEX) if one.exists())
        elif path.is_relative_to((workspace / DESCRIPTORS).resolve()) and path.exists():
            yield path


def _delete_predictions(table: Path, person: Person) -> None:
    """Delete the files that the subject's lines of a table of predictions name, before the lines go."""
    if table.parent.name != PREDICTIONS or "file" not in pq.read_schema(table).names:
        return
    mine = mine_in(table, person)
    names = pq.read_table(table, columns=["file"]).column("file").to_pylist()
    for name in (name for name, gone in zip(names, mine, strict=True) if gone):
        if Path(name).name == name:
            (table.parent / name).unlink(missing_ok=True)
