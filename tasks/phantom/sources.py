"""Phantom cohorts as the catalog sees them."""

from __future__ import annotations

from pathlib import Path

from tasks.phantom.anatomical import AnatomicalConfig, anatomical_paths
from tasks.phantom.config import PhantomConfig
from tasks.phantom.connectivity import SERIES_FOLDER, ConnectivityConfig, connectivity_paths
from tasks.phantom.layout import cohort_paths
from tasks.sources import (
    BidsSource,
    Cat12Source,
    DatalistSource,
    FmriprepSource,
    FreeSurferSource,
    PhenotypeTable,
    RoiSeriesSource,
    SourceConfig,
)


def phantom_sources(cohort: PhantomConfig, root: Path) -> list[SourceConfig]:
    """Return the sources of a cohort that was written below a folder."""
    paths = cohort_paths(cohort, root)
    return [
        BidsSource(dataset=cohort.bids_name, root=str(paths.bids), label_scheme="brats2023"),
        DatalistSource(
            dataset=cohort.datalist_name,
            root=str(paths.datalist_root),
            datalist=str(paths.datalist),
            label_scheme="brats2021",
        ),
    ]


def anatomical_sources(cohort: AnatomicalConfig, folder: Path) -> list[SourceConfig]:
    """Return the sources of an anatomical cohort that was written below a folder.

    Its maps and tables are one dataset. The T1s, if there are any, are another, `<name>-t1`, for the approximate path:
    a dataset has one basis of its descriptors.
    """
    paths = anatomical_paths(cohort, folder)
    sources: list[SourceConfig] = [
        Cat12Source(dataset=cohort.name, root=str(paths.root)),
        FreeSurferSource(dataset=cohort.name, root=str(paths.freesurfer)),
    ]
    if cohort.t1_spacing_mm is not None:
        sources.append(BidsSource(dataset=f"{cohort.name}-t1", root=str(paths.root)))
    return sources


def connectivity_sources(cohort: ConnectivityConfig, folder: Path) -> list[SourceConfig]:
    """Return the sources of a connectivity cohort that was written below a folder.

    T1s and time series are one dataset. The BOLD images, if there are any, are another, `<name>-fmriprep`: a case has
    one connectome.
    """
    paths = connectivity_paths(cohort, folder)
    sources: list[SourceConfig] = [
        BidsSource(dataset=cohort.name, root=str(paths.root)),
        RoiSeriesSource(dataset=cohort.name, root=str(paths.root), pattern=f"{SERIES_FOLDER}/*.1D", participants=""),
    ]
    if cohort.bold_subjects:
        sources.append(
            FmriprepSource(
                dataset=paths.fmriprep.name,
                root=str(paths.fmriprep),
                phenotypes=(PhenotypeTable(path=paths.participants.name),),
            )
        )
    return sources
