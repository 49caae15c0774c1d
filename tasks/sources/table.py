"""Scans of a table (CSV, TSV or Parquet) with a column mapping: one row per scan, or one row per case.

    one row per scan:  subject, session, path, modality            `path: file`, `modality: sequence`
    one row per case:  subject, session, one column per modality   `images: {t1: T1_path, flair: FLAIR_path}`

Paths are relative to the root. A label column, a split, a label scheme and phenotype columns are optional in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import pandas as pd
from pydantic import Field, model_validator

from models.records import LABEL, Reason, Scan
from tasks.phenotypes import choose, normalise
from tasks.sources.base import (
    FILE_KINDS,
    IGNORE,
    Candidate,
    Found,
    Root,
    SourceBase,
    naming,
    open_root,
    resolve_token,
)
from tasks.table_files import pick, read_table


class TableSource(SourceBase):
    """A dataset described by a table of files."""

    kind: Literal["table"] = "table"
    table: str = Field(
        title="Table",
        description="CSV, TSV or Parquet, relative to the root (or an absolute path or URL).",
        examples=["scans.csv"],
        min_length=1,
    )
    subject: str = Field("subject", title="Subject column", description="Column of subject ids.", min_length=1)
    session: str = Field("", title="Session column", description="Column of sessions; empty: one session a subject.")
    path: str = Field("", title="Path column", description="One row per scan: column of file paths.", examples=["file"])
    modality: str = Field(
        "", title="Modality column", description="One row per scan: column of modality tokens.", examples=["sequence"]
    )
    images: dict[str, str] = Field(
        default_factory=dict,
        title="Image columns",
        description="One row per case: modality (or brain_mask, roi_series, bold_confounds) -> column of file paths. "
        "An empty cell is no scan.",
        examples=[{"t1": "T1_path", "flair": "FLAIR_path"}],
    )
    label: str = Field("", title="Label column", description="Column of segmentation paths, in both layouts.")
    label_scheme_column: str = Field(
        "", title="Label scheme column", description="Column that names the label scheme row by row."
    )
    split: str = Field("", title="Split column", description="Column that says training, validation or test.")
    phenotype_columns: dict[str, str] = Field(
        default_factory=dict,
        title="Phenotype columns",
        description="Our name -> column of this table: age, sex, site, diagnosis and any scores.",
        examples=[{"age": "Age", "diagnosis": "DX"}],
    )

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if bool(self.images) == bool(self.path) or bool(self.path) != bool(self.modality):
            raise ValueError("give `path` and `modality` (one row per scan) or `images` (one row per case), not both")
        if unknown := sorted(set(self.images) - set(FILE_KINDS)):
            raise ValueError(f"images of unknown modality {', '.join(unknown)}; use {', '.join(sorted(FILE_KINDS))}")
        return self


def find_scans(source: TableSource) -> Found:
    """Return the scans, labels and phenotypes that a table names; files that cannot be used carry their reason.

    Raises FileNotFoundError without root or table, ValueError when a column is missing or the file is no table.
    """
    root = open_root(source, listed=False)
    url = source.locate(source.table)
    with naming(source, "table", url):
        table = read_table(url)
    rows = _Rows(root, source, table, url)
    found = Found(rows.cases() if source.images else rows.scans(), listed=len(root.listing or {}))
    if source.phenotype_columns:
        columns = {"subject": source.subject, **source.phenotype_columns}
        if source.session:
            columns["session"] = source.session
        found.phenotypes = normalise(choose(rows.table, columns, url), source.dataset, url)
    return found


@dataclass(frozen=True)
class _Rows:
    root: Root
    source: TableSource
    table: pd.DataFrame
    url: str

    def scans(self) -> list[Scan]:
        """Read one row per scan. A label may be repeated in the rows of its case."""
        paths, tokens = self._cells(self.source.path), self._cells(self.source.modality)
        found: list[Scan] = []
        labels: dict[Candidate, None] = {}
        for number, (owner, path, token) in enumerate(zip(self._owners(), paths, tokens, strict=True), start=2):
            where = f"{self.url}, row {number}"
            modality, problem = resolve_token(self.source, token, where)
            if modality == IGNORE and problem is None:
                continue
            problem = problem if path else (Reason.MISSING_FILE, f"{where}: the column {self.source.path!r} is empty")
            found.append(self.root.scan(_named(owner, path or f"row-{number}", modality, problem)))
        for owner, path in zip(self._owners(), self._cells(self.source.label), strict=True):
            labels.setdefault(_named(owner, path, LABEL))
        return [*found, *(self.root.scan(label) for label in labels if label.path)]

    def cases(self) -> list[Scan]:
        """Read one row per case."""
        columns = {**self.source.images, **({LABEL: self.source.label} if self.source.label else {})}
        cells = {modality: self._cells(column) for modality, column in columns.items()}
        return [
            self.root.scan(_named(owner, paths[number], modality))
            for number, owner in enumerate(self._owners())
            for modality, paths in cells.items()
            if paths[number]
        ]

    def _owners(self) -> list[Candidate]:
        """Return what a row says of all its files."""
        names = (self.source.subject, self.source.session, self.source.split, self.source.label_scheme_column)
        return [
            Candidate("", subject, session, split=split, label_scheme=scheme)
            for subject, session, split, scheme in zip(*map(self._cells, names), strict=True)
        ]

    def _cells(self, column: str) -> list[str]:
        return pick(self.table, column, self.url) if column else [""] * len(self.table)


def _named(owner: Candidate, path: str, modality: str, problem: tuple[Reason, str] | None = None) -> Candidate:
    return Candidate(path, owner.subject, owner.session, modality, problem, owner.split, owner.label_scheme)
