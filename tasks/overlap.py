"""People who are in two datasets under two ids, as the tables of a dataset say (not as its voxels do: duplicates).

OpenBHB is made of other datasets, and its ids lead nowhere: the column `also_in` of the phenotypes says which dataset
its subjects come from, so that a benchmark on that dataset can tell that a pre-training may have seen its people.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

ALSO_IN = "also_in"
"""Phenotype column: another dataset that holds the same person, or UNKNOWN."""
UNKNOWN = "unknown"
STUDIES: dict[str, str] = {
    "abide1": "abide-i",
    "abidei": "abide-i",
    "abide2": "abide-ii",
    "abideii": "abide-ii",
    "corr": "corr",
    "gsp": "gsp",
    "ixi": "ixi",
    "localizer": "localizer",
    "mpileipzig": "mpi-leipzig",
    "nar": "nar",
    "npc": "npc",
    "rbp": "rbp",
}
"""What OpenBHB is made of: name of the study in lower-case letters and digits -> dataset with its people's own ids."""
PARTS = frozenset(STUDIES.values())
Subject = tuple[str, str]
"""Dataset and subject."""


def overlapping(
    people: pd.DataFrame, seen: Iterable[Subject], datasets: Iterable[str]
) -> tuple[list[Subject], list[Subject]]:
    """Return the subjects that a pre-training has seen and that belong to some datasets: certainly, and possibly.

    people: one line a case with the phenotype columns; seen: (dataset, subject) of the pre-training; datasets: of a
    benchmark. Possibly: the tables say that the subject comes from one of STUDIES, and not from which.
    """
    if ALSO_IN not in people.columns:
        return [], []
    wanted, trained = set(datasets), set(seen)
    # Datasets that say where their people come from do not say it of everyone: no line in the table, or two studies.
    told = people[people["dataset"].isin(people.loc[people[ALSO_IN].notna(), "dataset"])]
    lines = told[["dataset", "subject", ALSO_IN]].fillna({ALSO_IN: UNKNOWN}).drop_duplicates().itertuples(index=False)
    homes = {
        (str(d), str(s)): str(home) for d, s, home in lines if (str(d), str(s)) in trained and str(d) not in wanted
    }
    certain = sorted(subject for subject, home in homes.items() if home in wanted)
    possible = sorted(subject for subject, home in homes.items() if home == UNKNOWN) if wanted & PARTS else []
    return certain, possible


def overlap_sentence(
    people: pd.DataFrame, seen: Iterable[Subject], datasets: Iterable[str], certainly: bool = False
) -> str:
    """Return one sentence about the overlap of a pre-training with the datasets of a benchmark; empty without any.

    certainly: nothing of what is merely possible.
    """
    names = sorted(datasets)
    certain, possible = overlapping(people, seen, names)
    if certain:
        return (
            f"{len(certain)} subjects of the pre-training, first {'/'.join(certain[0])}, are people of "
            f"{', '.join(names)} under other ids; leave them out at their source (`exclude`) and pre-train again"
        )
    if possible and not certainly:
        return (
            f"{len(possible)} subjects of the pre-training, first {'/'.join(possible[0])}, may be people of "
            f"{', '.join(names)} under other ids: say at their source which study is which (`studies`)"
        )
    return ""
