"""What else holds a forgotten subject: staged copies are erased, files of workspaces are named for people to decide.

Files are told by their names, by the columns dataset, subject and case of Parquet tables, and by the words of texts. An
id of fewer than SHORTEST characters would be found in every text: it is looked for in tables only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import storage
from models.selection import read_selection
from models.stage_room import RECEIPTS, list_copies, locked, remove_copy
from models.staging import Mirror
from models.store import open_store
from models.store_layout import CASES

TEXTS = frozenset({".json", ".jsonl", ".csv", ".tsv", ".html", ".md", ".tex", ".txt", ".log", ".yaml"})
SHORTEST = 4
"""Characters of an id that is looked for in texts and file names."""


@dataclass(frozen=True)
class Person:
    """Who is looked for."""

    dataset: str
    subject: str
    cases: tuple[str, ...] = ()
    """Names of its cases, as far as they are known."""

    @property
    def names(self) -> tuple[str, ...]:
        """Ids that are long enough to be told in a text."""
        return tuple(name for name in dict.fromkeys((self.subject, *self.cases)) if len(name) >= SHORTEST)


@dataclass(frozen=True)
class Reached:
    """What was found in a workspace."""

    files: tuple[Path, ...] = ()
    """That name the subject or one of its cases."""
    trained: tuple[str, ...] = ()
    """Trainings whose weights saw it, by name."""
    unread: tuple[Path, ...] = ()
    """Files that could not be read."""


def erase_staged(stage_dir: Path, url: str, dataset: str, rows: Collection[int]) -> tuple[list[Path], list[Path]]:
    """Erase staged copies of some rows of a store; return the folders that held one, and all that were looked into.

    The copied tables and names are replaced by those of the store, which must be finalised. A running training that
    reads these rows fails, as its resume would. Raises StagingError and OSError as the file system does.
    """
    held, mirrors = [], _mirrors_of(stage_dir, url)
    for mirror in mirrors:
        mirror.copy_metadata()
        with locked(stage_dir):
            copies, _ = list_copies(stage_dir)
            wanted = {mirror.key(dataset, row) for row in rows} & copies.keys()
            for key in wanted:
                remove_copy(stage_dir, key)
        held += [mirror.folder] if wanted else []
    return held, [mirror.folder for mirror in mirrors]


def other_copies(stage_dir: Path, known: Collection[Path], person: Person) -> list[Path]:
    """Return copies of other stores, or of the store under another URL, whose tables name the subject."""
    copies = [receipts.parent for receipts in sorted(stage_dir.glob(f"*/{RECEIPTS}"))]
    return [copy for copy in copies if copy not in known and _in_table(copy / CASES, person)]


def _mirrors_of(stage_dir: Path, url: str) -> list[Mirror]:
    """Return the copies of a store that are there; trainings name a local store by its absolute path."""
    urls = {url}
    if storage.is_local(url):
        path = storage.local_path(url)
        urls |= {str(path), str(path.resolve())}
    mirrors = []
    for spelling in sorted(urls):
        store = open_store(spelling)
        empty = Mirror.of(store, stage_dir, [])
        datasets = [name for name in store.datasets if (empty.folder / name).is_dir()]
        mirrors += [Mirror.of(store, stage_dir, datasets)] if empty.folder.is_dir() else []
    return mirrors


def is_workspace(folder: Path) -> bool:
    """Say whether a folder looks like a workspace of ours."""
    return any((folder / name).exists() for name in ("catalog.parquet", "trainings", "splits"))


def reach(workspace: Path, person: Person, skip: Sequence[Path] = ()) -> Reached:
    """Return what in a workspace names a subject; nothing is changed.

    skip: folders that are not looked into (the store itself). Of other stores only the table of cases is read.
    """
    files, unread = [], []
    for path in _files(workspace, {folder.resolve() for folder in skip}):
        try:
            found = _names(path.relative_to(workspace), person) or _holds(path, person)
        except (OSError, ValueError, pa.ArrowException):
            unread.append(path)
            continue
        files += [path] if found else []
    return Reached(tuple(files), tuple(_trained(workspace, person)), tuple(unread))


def _files(folder: Path, skip: Collection[Path]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if "zarr.json" in names:
            folders.clear()
            names = [name for name in names if name == CASES]
        folders[:] = sorted(name for name in folders if (here / name).resolve() not in skip)
        yield from (here / name for name in sorted(names))


def _holds(path: Path, person: Person) -> bool:
    if path.suffix == ".parquet":
        return _in_table(path, person)
    if path.suffix in TEXTS and person.names:
        return _pattern(person.names).search(path.read_text(encoding="utf-8", errors="replace")) is not None
    return False


def _in_table(path: Path, person: Person) -> bool:
    """Say whether a Parquet table has a line of the subject: by its columns subject and case, and dataset if it is."""
    columns = [name for name in ("dataset", "subject", "case") if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=columns)
    mine = pa.array([False] * table.num_rows)
    if "subject" in columns:
        mine = pc.or_(mine, pc.equal(_texts(table, "subject"), person.subject))
    if "case" in columns and person.cases:
        mine = pc.or_(mine, pc.is_in(_texts(table, "case"), value_set=pa.array(person.cases)))
    if "dataset" in columns:
        mine = pc.and_(mine, pc.equal(_texts(table, "dataset"), person.dataset))
    return bool(pc.any(mine).as_py())


def _texts(table: pa.Table, name: str) -> pa.Array:
    return pc.fill_null(pc.cast(table.column(name), pa.string()), "")


def _names(path: Path, person: Person) -> bool:
    return bool(person.names) and _pattern(person.names).search(str(path)) is not None


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Return what finds one of the names as a whole word: `sub-1` is not in `sub-12`, but in `sub-1_t1.nii.gz`."""
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, names))})(?![A-Za-z0-9])")


def _trained(workspace: Path, person: Person) -> Iterator[str]:
    """Yield the trainings that had the subject in another role than `test`, set-aside ones too."""
    for path in sorted((workspace / "trainings").rglob("selection.parquet")):
        lines = read_selection(path)
        if any((c.dataset, c.subject) == (person.dataset, person.subject) and c.role != "test" for c in lines):
            yield str(path.parent.relative_to(workspace / "trainings"))
