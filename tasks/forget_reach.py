"""Who is forgotten, and the staged copies of trainings that hold it: they are erased.

Files are told by their names, by the columns of ids of tables, and by the words of texts. An id of fewer than SHORTEST
characters would be found in every text: it is looked for in columns only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq

from infra import storage
from models.records import SelectedCase
from models.stage_room import RECEIPTS, list_copies, locked, remove_copy
from models.staging import Mirror
from models.store import open_store
from models.store_layout import CASES

SHORTEST = 4
"""Characters of an id that is looked for in texts and file names."""


def subject_sha256(dataset: str, subject: str) -> str:
    """Return the hash that stands for a subject in its tombstone."""
    return hashlib.sha256(f"{dataset}/{subject}".encode()).hexdigest()


@dataclass(frozen=True)
class Person:
    """Who is looked for."""

    dataset: str
    subject: str
    cases: tuple[str, ...] = ()
    """Names of its cases, as far as they are known."""
    digests: tuple[str, ...] = ()
    """Of its cases, as far as they are known; embeddings are kept by them."""

    @property
    def mark(self) -> str:
        """What stands in the place of its names; of the same kind as the name of its tombstone."""
        return f"forgotten-{subject_sha256(self.dataset, self.subject)[:12]}"

    def owns(self, case: SelectedCase) -> bool:
        """Say whether a line of a selection is its own, by its id or by the mark in the place of it."""
        return case.dataset == self.dataset and case.subject in (self.subject, self.mark)

    def is_in(self, text: str) -> bool:
        """Say whether a text names it or one of its cases as a word: `sub-1` is in `sub-1_t1`, not in `sub-12`."""
        return self._pattern is not None and self._pattern.search(text) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        words = "|".join(map(re.escape, self.names))
        return re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])") if words else None

    @property
    def is_told_by_words(self) -> bool:
        """Say whether all its ids are long enough to be looked for in texts."""
        return len(self.names) == len({self.subject, *self.cases})

    @property
    def names(self) -> tuple[str, ...]:
        """Ids that are long enough to be told in a text."""
        return tuple(name for name in dict.fromkeys((self.subject, *self.cases)) if len(name) >= SHORTEST)


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
    return [copy for copy in copies if copy not in known and _holds(copy / CASES, person)]


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


def _holds(table: Path, person: Person) -> bool:
    found = pq.read_table(table, columns=["dataset", "subject", "case"]).to_pylist()
    mine = (person.subject, person.cases)
    return any(x["dataset"] == person.dataset and (x["subject"] == mine[0] or x["case"] in mine[1]) for x in found)
