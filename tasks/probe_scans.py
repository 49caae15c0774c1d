"""Sites, ages and sexes of a probed cohort: what features are harmonised by."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from tasks.combat import Acquisition
from tasks.probe_cohort import ProbeCohort
from tasks.probes import Floats


def age_and_sex(people: pd.DataFrame, but: Collection[str] = ()) -> dict[str, Floats]:
    """Return age in years and sex (1: F, 0: M) of N people, each (N,) with NaN where not known; a column that is known
    of nobody, or named in `but`, is left out."""
    columns: dict[str, Floats] = {}
    if "age" in people:
        columns["age"] = pd.to_numeric(people["age"], errors="coerce").to_numpy(dtype=np.float64)
    if "sex" in people:
        columns["sex"] = np.asarray(people["sex"].map({"F": 1.0, "M": 0.0}), dtype=np.float64)
    return {name: values for name, values in columns.items() if name not in but and np.isfinite(values).any()}


def kept_covariates(cohort: ProbeCohort) -> dict[str, Floats]:
    """Return the covariates whose effects ComBat keeps: age and sex where they are known, never the target."""
    return age_and_sex(cohort.people, but=(cohort.benchmark.target,))


def acquisition_of(cohort: ProbeCohort) -> Acquisition:
    """Return the sites of a cohort's cases, as `dataset/site`, and the covariates that are kept.

    A dataset that names no site at all counts as one; elsewhere a case without a site has none.
    """
    covariates = kept_covariates(cohort)
    table = np.column_stack(list(covariates.values())) if covariates else np.zeros((len(cohort.cases), 0))
    return Acquisition(tuple(_sites(cohort.people)), table)


def _sites(people: pd.DataFrame) -> list[str]:
    site = people.get("site", pd.Series("", index=people.index)).fillna("").astype(str)
    dataset = people["dataset"].astype(str)
    nameless = ~dataset.isin(set(dataset[site != ""]))
    return list((dataset + "/" + site).where((site != "") | nameless, ""))
