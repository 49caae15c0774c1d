"""People who are in two datasets under two ids, as the tables of a dataset say (not as its voxels do: duplicates).

OpenBHB is made of other datasets, and its ids lead nowhere: the column `also_in` of the phenotypes says which dataset
its subjects come from, so that a benchmark on that dataset can tell that a pre-training may have seen its people. Who
they are there, a crosswalk says (tasks.crosswalk): whom it names is left out like anybody else that was seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from tasks.crosswalk import REMEDY, Link
from tasks.splits import Subject, link_groups

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
SHARED: tuple[frozenset[str], ...] = (
    frozenset({"brats2021", "ucsf-pdgm"}),
    frozenset({"brats2021", "upenn-gbm"}),
    frozenset({"brats2021", "brats2018"}),
)
"""Datasets that publish images of the same people under ids of their own."""


def overlapping(
    people: pd.DataFrame, seen: Iterable[Subject], datasets: Iterable[str], told: Iterable[Link] = ()
) -> tuple[list[Subject], list[Subject]]:
    """Return the subjects that a pre-training has seen and that belong to some datasets: certainly, and possibly.

    people: one line a case with the phenotype columns; seen: (dataset, subject) of the pre-training; datasets: of a
    benchmark. Possibly: the tables say that the subject comes from one of STUDIES, and not from which. told: pairs of
    one person each, by crosswalks: whom they link to a subject of the datasets is known, and in neither list.
    """
    if ALSO_IN not in people.columns:
        return [], []
    wanted, trained = set(datasets), set(seen)
    # Datasets that say where their people come from do not say it of everyone: no line in the table, or two studies.
    telling = people[people["dataset"].isin(people.loc[people[ALSO_IN].notna(), "dataset"])]
    lines = telling[["dataset", "subject", ALSO_IN]].fillna({ALSO_IN: UNKNOWN}).drop_duplicates()
    named = _named(told, wanted)
    homes = {
        (str(d), str(s)): str(home)
        for d, s, home in lines.itertuples(index=False)
        if (str(d), str(s)) in trained - named and str(d) not in wanted
    }
    certain = sorted(subject for subject, home in homes.items() if home in wanted)
    possible = sorted(subject for subject, home in homes.items() if home == UNKNOWN) if wanted & PARTS else []
    return certain, possible


def _named(told: Iterable[Link], datasets: set[str]) -> set[Subject]:
    """Return everybody that crosswalks link to a subject of some datasets, these included."""
    groups = link_groups(told)
    known = {group for subject, group in groups.items() if subject[0] in datasets}
    return {subject for subject, group in groups.items() if group in known}


def overlap_sentence(
    people: pd.DataFrame,
    seen: Iterable[Subject],
    datasets: Iterable[str],
    certainly: bool = False,
    told: Iterable[Link] = (),
) -> str:
    """Return one sentence about the overlap of a pre-training with the datasets of a benchmark; empty without any.

    certainly: nothing of what is merely possible. told: pairs of crosswalks, see `overlapping`.
    """
    names = sorted(datasets)
    certain, possible = overlapping(people, seen, names, told)
    if certain:
        return (
            f"{len(certain)} subjects of the pre-training, first {'/'.join(certain[0])}, are people of "
            f"{', '.join(names)} under other ids; {REMEDY}, or leave them out at their source (`exclude`) and "
            "pre-train again"
        )
    if possible and not certainly:
        return (
            f"{len(possible)} subjects of the pre-training, first {'/'.join(possible[0])}, may be people of "
            f"{', '.join(names)} under other ids: say at their source which study is which (`studies`), or {REMEDY}"
        )
    return ""


def shared_sentences(seen: Iterable[Subject], datasets: Iterable[str], told: Iterable[Link] = ()) -> tuple[str, ...]:
    """Return a sentence for each dataset of a pre-training that shares people with one of a benchmark (SHARED).

    None for two datasets of which the crosswalk pairs `told` link a subject each: then it is known who they are.
    """
    groups: dict[Subject, set[str]] = {}
    for subject, group in link_groups(told).items():
        groups.setdefault(group, set()).add(subject[0])
    trained = {dataset for dataset, _ in seen}
    pairs = [(mine, other) for mine in sorted(set(datasets)) for other in sorted(trained) if mine != other]
    return tuple(
        f"{mine} and {other}, which a pre-training has seen, share people under different ids (published); left out is "
        f"who looks alike; {REMEDY} to be sure."
        for mine, other in pairs
        if any({mine, other} <= shared for shared in SHARED)
        and not any({mine, other} <= named for named in groups.values())
    )
