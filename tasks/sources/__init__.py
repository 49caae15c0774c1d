"""Where scans come from: one adapter per layout, each yielding the same catalog rows."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from pydantic import Field

from tasks.phenotypes import combine, read_participants
from tasks.sources import bids, cat12, datalist, descriptor_table, dicom, freesurfer, openbhb, table, tree
from tasks.sources.base import Found, PhenotypeTable, naming
from tasks.sources.bids import BidsSource
from tasks.sources.cat12 import Cat12Source
from tasks.sources.datalist import DatalistSource
from tasks.sources.descriptor_table import DescriptorTableSource
from tasks.sources.dicom import DicomSource
from tasks.sources.freesurfer import FreeSurferSource
from tasks.sources.openbhb import OpenBhbSource
from tasks.sources.table import TableSource
from tasks.sources.tree import TreeSource

SourceConfig = Annotated[
    BidsSource
    | DatalistSource
    | TableSource
    | TreeSource
    | DicomSource
    | OpenBhbSource
    | Cat12Source
    | FreeSurferSource
    | DescriptorTableSource,
    Field(discriminator="kind"),
]
"""One dataset at its place; `kind` says the layout."""

__all__ = [
    "BidsSource",
    "Cat12Source",
    "DatalistSource",
    "DescriptorTableSource",
    "DicomSource",
    "Found",
    "FreeSurferSource",
    "OpenBhbSource",
    "PhenotypeTable",
    "SourceConfig",
    "TableSource",
    "TreeSource",
    "find_scans",
    "phenotype_tables",
]


def find_scans(source: SourceConfig, workspace: str = "") -> Found:
    """Return what a source yields, by its kind, with the phenotype tables that its config names.

    workspace: folder or URL that receives converted DICOM series and descriptors. Raises FileNotFoundError or
    ValueError for a wrong config.
    """
    found = _adapt(source, workspace)
    found.phenotypes = combine([found.phenotypes, *phenotype_tables(source)])
    return found


def phenotype_tables(source: SourceConfig) -> list[pd.DataFrame]:
    """Return the tables that a config names under `phenotypes`; raises FileNotFoundError or ValueError as they do."""
    tables = []
    for number, named in enumerate(source.phenotypes):
        url = source.locate(named.path)
        with naming(source, f"phenotypes.{number}.path", url):
            tables.append(read_participants(url, source.dataset, named.columns, named.subject_prefix))
    return tables


def _adapt(source: SourceConfig, workspace: str) -> Found:
    match source:
        case OpenBhbSource():
            return openbhb.find_scans(source, workspace)
        case Cat12Source():
            return cat12.find_scans(source)
        case FreeSurferSource():
            return freesurfer.find_scans(source, workspace)
        case DescriptorTableSource():
            return descriptor_table.find_scans(source, workspace)
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
