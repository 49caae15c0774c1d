"""Regional descriptors in one wide table (CSV, TSV or Parquet): a line per subject, a column per measure and region.

Columns are called `<measure>:<region>` (`cortical_thickness_mm:lh_bankssts`), or by patterns of one's own:
`{region}_thickness` are those of FreeSurfer's aparcstats2table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
from pydantic import Field, field_validator

from models.anatomy import ATLASES, MEASURES, Atlas, Basis, DescriptorError
from models.reasons import Reason
from models.records import DESCRIPTORS, DescriptorTable
from tasks.sources.base import Candidate, Found, naming, open_root
from tasks.sources.regional import Regional, RegionalSource, convert, located, table_of
from tasks.table_files import pick, read_table


class DescriptorTableSource(RegionalSource):
    """A table of descriptors; gives descriptors alone, no images."""

    kind: Literal["descriptors"] = "descriptors"
    table: str = Field(
        title="Table",
        description="CSV, TSV or Parquet, relative to the root (or an absolute path or URL).",
        examples=["aparc.csv"],
        min_length=1,
    )
    subject: str = Field("subject", title="Subject column", description="Column of subject ids.", min_length=1)
    session: str = Field("", title="Session column", description="Column of sessions; empty: one session a subject.")
    columns: dict[str, str] = Field(
        default_factory=lambda: {measure: f"{measure}:{{region}}" for measure in MEASURES},
        title="Columns",
        description=f"Measure -> pattern of its columns with the field {{region}} (lh_bankssts, ...). Measures: "
        f"{', '.join(MEASURES)}; those that are not named are not read.",
        examples=[{"cortical_thickness_mm": "{region}_thickness", "surface_area_mm2": "{region}_area"}],
        min_length=1,
    )
    basis: Basis = Field(
        "freesurfer", title="Basis", description="What measured: freesurfer, cat12, or approximate for an estimate."
    )

    @field_validator("columns")
    @classmethod
    def _patterns(cls, columns: dict[str, str]) -> dict[str, str]:
        for measure, pattern in columns.items():
            if measure not in MEASURES:
                raise ValueError(f"unknown measure {measure!r}; use some of {', '.join(MEASURES)}")
            if pattern.count("{region}") != 1:
                raise ValueError(f"columns of {measure}: {pattern!r} must hold the field {{region}} once")
        return columns

    @property
    def layout(self) -> tuple[Atlas, Basis] | None:
        """Atlas and basis of the descriptors."""
        return self.atlas, self.basis


def find_scans(source: DescriptorTableSource, workspace: str) -> Found:
    """Return a row of descriptors for every line of the table; those that cannot be used carry their reason.

    Raises FileNotFoundError without root or table, ValueError when a column is missing.
    """
    root = open_root(source, listed=False)
    url = source.locate(source.table)
    with naming(source, "table", url):
        table = read_table(url)
    subjects = pick(table, source.subject, url)
    sessions = pick(table, source.session, url) if source.session else [""] * len(table)
    cells = _cells(source, table, url)
    name = source.table.rsplit("/", 1)[-1]
    cases = [
        _case(source, Candidate(name, subject, session, DESCRIPTORS), {m: rows[n] for m, rows in cells.items()}, n + 2)
        for n, (subject, session) in enumerate(zip(subjects, sessions, strict=True))
    ]
    return Found(convert(root, cases, workspace), listed=len(root.listing or {}))


def _cells(source: DescriptorTableSource, table: pd.DataFrame, url: str) -> dict[str, list[tuple[str, ...]]]:
    """Return measure -> for each line the cells of its regions, in the order of the atlas."""
    found = {}
    for measure, pattern in source.columns.items():
        columns = [pick(table, pattern.replace("{region}", region), url) for region in ATLASES[source.atlas]]
        found[measure] = list(zip(*columns, strict=True))
    return found


def _case(source: DescriptorTableSource, owner: Candidate, cells: dict[str, tuple[str, ...]], line: int) -> Regional:
    def make() -> DescriptorTable:
        with located(f"{owner.path}, row {line}"):
            values = {measure: _numbers(measure, row) for measure, row in cells.items()}
            return table_of(source, source.basis, values, [source.table])

    return Regional((owner,), make)


def _numbers(measure: str, cells: Sequence[str]) -> list[float | None]:
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError as error:
        raise DescriptorError(Reason.DESCRIPTOR_VALUES, f"{measure}: {error}; a number is expected") from None
