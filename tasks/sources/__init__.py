"""Where scans come from: one adapter per layout, each yielding the same catalog rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tasks.phenotypes import combine, read_participants
from tasks.sources import bids, datalist, dicom, table, tree
from tasks.sources.base import Found, PhenotypeTable
from tasks.sources.bids import BidsSource
from tasks.sources.datalist import DatalistSource
from tasks.sources.dicom import DicomSource
from tasks.sources.table import TableSource
from tasks.sources.tree import TreeSource

SourceConfig = Annotated[
    BidsSource | DatalistSource | TableSource | TreeSource | DicomSource, Field(discriminator="kind")
]
"""One dataset at its place; `kind` says the layout."""

__all__ = [
    "BidsSource",
    "DatalistSource",
    "DicomSource",
    "Found",
    "PhenotypeTable",
    "SourceConfig",
    "TableSource",
    "TreeSource",
    "find_scans",
]


def find_scans(source: SourceConfig, workspace: str = "") -> Found:
    """Return what a source yields, by its kind, with the phenotype tables that its config names.

    workspace: folder or URL that receives converted DICOM series. Raises FileNotFoundError or ValueError for a wrong
    config.
    """
    found = _adapt(source, workspace)
    tables = [
        read_participants(source.locate(named.path), source.dataset, named.columns, named.subject_prefix)
        for named in source.phenotypes
    ]
    found.phenotypes = combine([found.phenotypes, *tables])
    return found


def _adapt(source: SourceConfig, workspace: str) -> Found:
    match source:
        case BidsSource():
            return bids.find_scans(source)
        case DatalistSource():
            return datalist.find_scans(source)
        case TableSource():
            return table.find_scans(source)
        case TreeSource():
            return tree.find_scans(source)
        case DicomSource():
            return dicom.find_scans(source, workspace)
