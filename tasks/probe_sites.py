"""The report of the site effect: how well features tell where a case was scanned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from tasks.folds import FoldError
from tasks.probe_cohort import ProbeCohort, find_probe_cohort
from tasks.probe_tasks import site_probe
from tasks.probes import ProbeError
from tasks.splits import Subject, subjects_in

Sites = tuple[ProbeCohort | None, str]
"""The cohort of the report, or None; and what to say about it."""


def site_cohort(
    cohorts: Sequence[ProbeCohort], people: pd.DataFrame, workspace: Path, folds: int, seen: Mapping[Subject, str]
) -> Sites:
    """Return the sites of all probed datasets as one probe, and a sentence on sites that are left out.

    A site needs a subject in every fold: smaller ones (a single subject, say) are left out and named. Without two
    sites, or where they cannot be probed, there is no report and the sentence says why. Sites of several datasets are
    told apart by the dataset's name.
    """
    datasets = tuple(sorted({case.dataset for cohort in cohorts for case in cohort.cases}))
    if not datasets:
        return None, ""
    chosen = people[(people["status"] == "stored") & people["dataset"].isin(datasets)]
    table = chosen.assign(site=_names(chosen, several=len(datasets) > 1))
    unseen = table[[pair not in seen for pair in subjects_in(table)]].drop_duplicates(["dataset", "subject"])
    counts = unseen["site"].value_counts()
    sites = tuple(sorted(str(name) for name, count in counts.items() if count >= folds))
    small = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()) if count < folds)
    words = f"Sites with fewer than {folds} unseen subjects are left out of the site report: {small}." if small else ""
    if len(sites) < 2:
        return None, f"No site report: it needs two sites with {folds} unseen subjects each. {words}".strip()
    benchmark = site_probe(datasets, cohorts[0].benchmark.modalities, sites)
    try:
        return find_probe_cohort(benchmark, cohorts[0].store, table, workspace, folds, seen), words
    except (ProbeError, FoldError) as error:  # kept folds, or images that a site lacks: no reason to give up the tables
        return None, f"No site report: {error}. {words}".strip()


def _names(people: pd.DataFrame, several: bool) -> pd.Series:
    site = people.get("site", pd.Series("", index=people.index)).fillna("").astype(str)
    named = people["dataset"].astype(str) + "/" + site if several else site
    return named.where(site != "", None)
