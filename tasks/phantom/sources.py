"""A phantom cohort as the catalog and the tables see it: its two sources, and the truth behind its subjects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from tasks.phantom.config import PhantomConfig
from tasks.phantom.layout import cohort_paths
from tasks.sources import BidsSource, DatalistSource, SourceConfig

LATENTS_FILE = "latents.parquet"


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


def read_latents(root: Path, datasets: Iterable[str]) -> pd.DataFrame | None:
    """Return the true latents of datasets below a folder, with a column `dataset`; None when none is a phantom."""
    found = []
    for name in datasets:
        path = root / name / LATENTS_FILE
        if path.exists():
            table = pd.read_parquet(path)
            found.append(table if "dataset" in table else table.assign(dataset=name))
    return pd.concat(found, ignore_index=True) if found else None
