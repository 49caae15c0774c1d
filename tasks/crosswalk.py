"""Crosswalks: tables that say which ids in two datasets are one person, put by people into `<workspace>/crosswalks`.

The long form has the columns `person`, `dataset` and `subject`, one line an id; `person` is any name, of this file
alone. A wide table (one line a person, one column of ids a dataset, as BraTS' name mapping has it) is read with a file
of the same name and the suffix .yaml beside it:

    columns: {brats2021: BraTS21ID, brats2018: BraTS_2018_subject_ID}    # dataset: column

What a crosswalk says counts like a look-alike found by fingerprint (`tasks.duplicates`), in splits, folds and leaks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import yaml
from pydantic import Field, ValidationError

from models.records import Record, digest_of
from tasks.duplicates import Subject
from tasks.duplicates import links as near_duplicates
from tasks.table_files import pick, read_table

FOLDER = "crosswalks"
"""In a workspace."""
SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".parquet"})
LONG = ("person", "dataset", "subject")
"""Columns of the long form; others are passed over."""
REMEDY = f"say who is who in a crosswalk (a table in <workspace>/{FOLDER}, see docs/splits.md)"

Link = tuple[Subject, Subject]
"""Two subjects that are one person."""
_log = logging.getLogger(__name__)


class CrosswalkError(ValueError):
    """A crosswalk that cannot be used: a column is missing, it is empty, or gives one subject to two persons."""


class WideColumns(Record):
    """The YAML file beside a wide table."""

    columns: dict[str, str] = Field(min_length=2)
    """Dataset -> column with its subjects; two datasets or more."""


@dataclass(frozen=True)
class Crosswalk:
    """One file of a workspace."""

    path: Path
    people: Mapping[str, tuple[Subject, ...]]
    """Person -> its subjects, in the order of the file."""
    repeated: int = 0
    """Lines that say what an earlier one said."""

    @property
    def links(self) -> list[Link]:
        """The first subject of each person with each of its others."""
        return [(first, other) for first, *others in self.people.values() for other in others]

    @cached_property
    def subjects(self) -> dict[str, set[str]]:
        """The subjects that it names by dataset."""
        found: dict[str, set[str]] = {}
        for ids in self.people.values():
            for dataset, subject in ids:
                found.setdefault(dataset, set()).add(subject)
        return found


def read_crosswalks(workspace: Path) -> list[Crosswalk]:
    """Return the crosswalks of a workspace by file name; none without the folder.

    Raises CrosswalkError for a file that cannot be used, naming file, row and value.
    """
    folder = workspace / FOLDER
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
    return [read_crosswalk(path) for path in paths]


def read_crosswalk(path: Path) -> Crosswalk:
    """Return one crosswalk, in its long form, or in a wide form that `<name>.yaml` beside it explains.

    Lines that repeat an earlier one are counted. Raises CrosswalkError for anything that is no table, an empty one, a
    missing column or cell, and a subject under two persons.
    """
    try:
        table = read_table(str(path))
        wide = path.with_suffix(".yaml")
        lines = list(_wide_lines(table, path, wide) if wide.exists() else _long_lines(table, path))
    except CrosswalkError:
        raise
    except ValueError as error:
        raise CrosswalkError(f"crosswalk {error}") from None
    if not lines:
        raise CrosswalkError(f"crosswalk {path} has no line that names a subject; fill it, or remove the file")
    return _collected(lines, path)


_Line = tuple[int, str, Subject]
"""Row in the file (the line of column names is row 1), person, subject."""


def _long_lines(table: pd.DataFrame, path: Path) -> Iterator[_Line]:
    if absent := [name for name in LONG if name not in table]:
        there = ", ".join(map(str, table.columns))[:500] or "none"
        raise CrosswalkError(
            f"crosswalk {path} lacks the columns {', '.join(absent)}; its columns: {there}. Write one line an id with "
            f"{', '.join(LONG)}, or {path.with_suffix('.yaml').name} beside it for a table with one column a dataset"
        )
    for row, (person, dataset, subject) in enumerate(zip(*(table[name] for name in LONG), strict=True), start=2):
        cells = dict(zip(LONG, (person, dataset, subject), strict=True))
        if empty := [name for name, cell in cells.items() if not cell]:
            raise CrosswalkError(f"crosswalk {path}, row {row}: {empty[0]} is empty; fill it, or remove the line")
        yield row, person, (dataset, subject)


def _wide_lines(table: pd.DataFrame, path: Path, columns: Path) -> Iterator[_Line]:
    try:
        rules = WideColumns.model_validate(yaml.safe_load(columns.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise CrosswalkError(
            f"{columns} does not explain {path.name}: write `columns: {{dataset: column, ...}}` with two datasets or "
            f"more ({error})"
        ) from None
    cells = {dataset: pick(table, column, str(path)) for dataset, column in rules.columns.items()}
    for number in range(len(table)):
        for dataset, names in cells.items():
            if names[number]:
                yield number + 2, f"row {number + 2}", (dataset, names[number])


def _collected(lines: Sequence[_Line], path: Path) -> Crosswalk:
    people: dict[str, list[Subject]] = {}
    owners: dict[Subject, tuple[int, str]] = {}
    repeated = 0
    for row, person, subject in lines:
        if subject not in owners:
            owners[subject] = row, person
            people.setdefault(person, []).append(subject)
        elif owners[subject][1] == person:
            repeated += 1
        else:
            before, other = owners[subject]
            raise CrosswalkError(
                f"crosswalk {path}, row {row}: subject {'/'.join(subject)} belongs to person {person!r}, but to "
                f"{other!r} in row {before}; give all ids of one person the same name in `person` (in a wide table: "
                "one line), or remove the wrong line"
            )
    return Crosswalk(path, {person: tuple(ids) for person, ids in people.items()}, repeated)


def crosswalk_links(workspace: Path) -> list[Link]:
    """Return the pairs of subjects that the crosswalks of a workspace call one person; see `read_crosswalks`."""
    return [link for crosswalk in read_crosswalks(workspace) for link in crosswalk.links]


def person_links(workspace: Path, store_url: str) -> list[Link]:
    """Return the pairs of subjects that are one person: by looks (tasks.duplicates) and by crosswalks."""
    return [*near_duplicates(store_url), *crosswalk_links(workspace)]


def crosswalk_digest(workspace: Path) -> str:
    """Return the SHA-256 of who is who in the crosswalks of a workspace, whatever persons are called; empty: none."""
    crosswalks = read_crosswalks(workspace)
    people = [sorted(map(list, ids)) for crosswalk in crosswalks for ids in crosswalk.people.values()]
    return digest_of(sorted(people)) if crosswalks else ""


def remarks(crosswalk: Crosswalk, stored: Iterable[Subject]) -> list[str]:
    """Return sentences about what a crosswalk names that is not among the subjects of a store, and what it repeats."""
    here: dict[str, set[str]] = {}
    for dataset, subject in stored:
        here.setdefault(dataset, set()).add(subject)
    found = []
    for dataset, named in sorted(crosswalk.subjects.items()):
        if dataset not in here:
            known = ", ".join(sorted(here)) or "none"
            found.append(f"{crosswalk.path.name}: dataset {dataset!r} is not in the store, which has: {known}")
        elif absent := sorted(named - here[dataset]):
            example = min(here[dataset])
            found.append(
                f"{crosswalk.path.name}: {len(absent)} of {len(named)} subjects of {dataset} are not in the store, "
                f"first {absent[0]!r}; the store's are like {example!r}"
            )
    if crosswalk.repeated:
        found.append(f"{crosswalk.path.name}: {crosswalk.repeated} lines repeat an earlier one")
    if single := sum(len(ids) == 1 for ids in crosswalk.people.values()):
        found.append(
            f"{crosswalk.path.name}: {single} of {len(crosswalk.people)} persons have one id, which links nobody"
        )
    return found


def warn_of_strangers(workspace: Path, cases: pd.DataFrame) -> None:
    """Log what the crosswalks of a workspace name that is not among the cases (columns dataset and subject)."""
    stored = list(zip(cases["dataset"].astype(str), cases["subject"].astype(str), strict=True))
    for crosswalk in read_crosswalks(workspace):
        for sentence in remarks(crosswalk, stored):
            _log.warning("crosswalk %s", sentence)
