"""Where scans come from: one adapter per layout, each yielding the same catalog rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from tasks.phenotypes import combine, read_participants
from tasks.sources import (
    abide_pcp,
    adhd200_pcp,
    bids,
    cat12,
    datalist,
    descriptor_table,
    dicom,
    fmriprep,
    freesurfer,
    openbhb,
    roi_series,
    table,
    tree,
)
from tasks.sources.abide_pcp import AbidePcpSource
from tasks.sources.adhd200_pcp import Adhd200PcpSource
from tasks.sources.base import Found, PhenotypeTable, naming
from tasks.sources.bids import BidsSource
from tasks.sources.cat12 import Cat12Source
from tasks.sources.datalist import DatalistSource
from tasks.sources.descriptor_table import DescriptorTableSource
from tasks.sources.dicom import DicomSource
from tasks.sources.fmriprep import FmriprepSource
from tasks.sources.freesurfer import FreeSurferSource
from tasks.sources.openbhb import OpenBhbSource
from tasks.sources.roi_series import RoiSeriesSource
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
    | DescriptorTableSource
    | FmriprepSource
    | AbidePcpSource
    | Adhd200PcpSource
    | RoiSeriesSource,
    Field(discriminator="kind"),
]
"""One dataset at its place; `kind` says the layout."""

READERS: dict[str, Callable[[Any], Found]] = {
    "abide_pcp": abide_pcp.find_scans,
    "adhd200_pcp": adhd200_pcp.find_scans,
    "bids": bids.find_scans,
    "cat12": cat12.find_scans,
    "datalist": datalist.find_scans,
    "fmriprep": fmriprep.find_scans,
    "roi_series": roi_series.find_scans,
    "table": table.find_scans,
    "tree": tree.find_scans,
}
"""By kind: those that only name files."""
CONVERTERS: dict[str, Callable[[Any, str], Found]] = {
    "descriptors": descriptor_table.find_scans,
    "dicom": dicom.find_scans,
    "freesurfer": freesurfer.find_scans,
    "openbhb": openbhb.find_scans,
}
"""By kind: those that write files into the workspace."""

__all__ = [
    "AbidePcpSource",
    "Adhd200PcpSource",
    "BidsSource",
    "Cat12Source",
    "DatalistSource",
    "DescriptorTableSource",
    "DicomSource",
    "FmriprepSource",
    "Found",
    "FreeSurferSource",
    "OpenBhbSource",
    "PhenotypeTable",
    "RoiSeriesSource",
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
    found = READERS[source.kind](source) if source.kind in READERS else CONVERTERS[source.kind](source, workspace)
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
