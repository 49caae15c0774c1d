"""Phenotype tables of a public release: its codes become words by a layout, and what nobody explains is told.

A cell that says nothing we know is left empty and reported with file, row and value; the other cells of its row stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import pandas as pd

from models.records import OLDEST
from tasks.phenotype_join import PhenotypeIssue
from tasks.phenotype_layouts import ColumnRule, Layout
from tasks.phenotypes import normalise, word
from tasks.sources.names import shorten
from tasks.table_files import read_table

NUMBERS = {"age": float(OLDEST), "fd_mean_mm": float("inf")}
"""Columns of numbers from 0 to a largest one."""


@dataclass(frozen=True)
class CodedTable:
    """One table of phenotypes."""

    url: str
    cells: pd.DataFrame
    """As written: columns of text, see tasks.table_files."""
    subjects: tuple[str, ...]
    """Of every row as the catalog calls them; empty where the table names nobody."""
    people: pd.DataFrame
    """In our columns and words, see tasks.phenotypes.COLUMNS."""
    issues: tuple[PhenotypeIssue, ...]


def read_coded(
    url: str, dataset: str, layout: Layout, columns: Sequence[str], subject_of: Callable[[str], str]
) -> CodedTable:
    """Read a table whose first of the `columns` has the subjects, and whose other columns `layout` explains.

    columns: names of the column of subjects, in the order in which they are looked for. subject_of: what the catalog
    calls the subject of a cell; raises ValueError for what is no id.

    Raises FileNotFoundError without the file, and ValueError for what is no table, and without a column of subjects.
    """
    cells = read_table(url)
    reader = _Reader(url, dataset, layout.missing, [])
    column = find_column(cells, columns)
    if column is None:
        there = ", ".join(map(str, cells.columns))[:500] or "none"
        raise ValueError(f"{url} has no column of subjects ({' or '.join(columns)}); its columns: {there}")
    subjects = reader.subjects(list(cells[column]), subject_of)
    ours: dict[str, list[str]] = {"subject": subjects}
    for name, rule in layout.columns.items():
        source = find_column(cells, rule.sources)
        if source is not None:
            ours[name] = reader.words(name, str(source), list(cells[source]), rule, subjects)
    people = normalise(pd.DataFrame(ours, dtype=object), dataset, url)
    return CodedTable(url, cells, tuple(subjects), people, tuple(reader.issues))


def find_column(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """Return the first of some columns that a table has: case, spaces and underscores do not count."""
    there = {_plain(str(column)): str(column) for column in reversed(table.columns)}
    return next((there[_plain(name)] for name in names if _plain(name) in there), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_]", "", name.lower())


@dataclass(frozen=True)
class _Reader:
    url: str
    dataset: str
    missing: frozenset[str]
    issues: list[PhenotypeIssue]

    def subjects(self, cells: list[str], subject_of: Callable[[str], str]) -> list[str]:
        """Return the subjects; a row that is not the first of its subject counts too, and is told."""
        rows: dict[str, int] = {}
        found = []
        for number, cell in enumerate(cells, start=2):
            try:
                subject = subject_of(word(cell))
            except ValueError as error:
                subject = ""
                self._tell("", f"row {number}: {error}; the row is not read")
            if subject and (first := rows.setdefault(subject, number)) != number:
                self._tell(subject, f"row {number}: subject {shorten(subject, 40)} is already in row {first}; keep one")
            found.append(subject)
        return found

    def words(self, name: str, column: str, cells: list[str], rule: ColumnRule, subjects: list[str]) -> list[str]:
        """Return the cells of one column in our words; empty where nothing is known."""
        found = []
        for number, (cell, subject) in enumerate(zip(cells, subjects, strict=True), start=2):
            text = _number_as_code(cell)
            known, wanted = (text, "") if not text or text in self.missing else _known(name, text, rule)
            if wanted and subject:
                self._tell(subject, f"row {number}: {column} is {shorten(cell, 40)!r}; {wanted}; left empty")
            found.append("" if wanted or text in self.missing else known)
        return found

    def _tell(self, subject: str, what: str) -> None:
        name = self.url.rsplit("/", 1)[-1]
        self.issues.append(PhenotypeIssue(self.dataset, shorten(subject, 40), "bad value", f"{name}, {what}"))


def _number_as_code(cell: str) -> str:
    """Return a cell with a whole number as pandas writes it beside gaps (`1.0`) as its code (`1`)."""
    return cell[:-2] if re.fullmatch(r"-?\d+\.0", cell) else cell


def _known(name: str, text: str, rule: ColumnRule) -> tuple[str, str]:
    """Return (our word, nothing), or (nothing, what is expected)."""
    if rule.values:
        ours = rule.word_of(text)
        return (ours, "") if ours is not None else ("", f"known are {', '.join(rule.values)}")
    if name in NUMBERS:
        try:
            number = float(text)
        except ValueError:
            return "", "a number is expected"
        most = NUMBERS[name]
        if not isfinite(number) or not 0 <= number <= most:
            return "", f"{'a number from 0 on' if most == float('inf') else f'0 to {most:g}'} is expected"
    return text, ""
