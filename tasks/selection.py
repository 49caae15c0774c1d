"""Freezing what a training sees: which cases of a store, in which role."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa

from models.records import SelectedCase, digest_of
from models.selection import SelectionError, write_selection
from tasks.splits import Subject, link_groups

ROLES: tuple[str, ...] = ("train", "val", "test")


def select_cases(
    cases: pa.Table,
    split: pd.DataFrame | None = None,
    datasets: Collection[str] | None = None,
    targets: Mapping[tuple[str, str], str] | None = None,
    drop_test: bool = False,
    links: Iterable[tuple[Subject, Subject]] = (),
) -> list[SelectedCase]:
    """Return the stored cases with their roles.

    cases: cases.parquet of a store. split: columns dataset, subject, split; a stored case whose subject is not in it
    is left out. Without a split all cases train. datasets: keep these only. targets: class by (dataset, case); cases
    without one are left out. drop_test: leave out test subjects instead of giving them the role `test`. links: pairs of
    subjects that are one person (tasks.crosswalk); their cases get the same `person`.
    Raises SelectionError for unknown datasets or roles, a subject with two roles, or when no training case is left.
    """
    table = cases.to_pandas()
    if datasets is not None and (unknown := set(datasets) - set(table["dataset"])):
        known = ", ".join(sorted(set(table["dataset"])))
        raise SelectionError(f"datasets {sorted(unknown)} are not in the store, which has: {known}")
    roles, people = _roles(split), link_groups(links)
    selected = [
        SelectedCase(
            dataset=line["dataset"],
            row=int(line["row"]),
            case=line["case"],
            subject=line["subject"],
            digest=line["digest"],
            role=role,
            target=targets[(line["dataset"], line["case"])] if targets is not None else "",
            person=_person(people.get((line["dataset"], line["subject"]))),
        )
        for line in table[table["status"] == "stored"].to_dict("records")
        if (datasets is None or line["dataset"] in datasets)
        and (targets is None or (line["dataset"], line["case"]) in targets)
        and (role := "train" if roles is None else roles.get((line["dataset"], line["subject"]), ""))
        and not (drop_test and role == "test")
    ]
    if not any(case.role == "train" for case in selected):
        raise SelectionError(
            f"no training case is left of {len(table)} rows of the store (datasets: {sorted(datasets or [])}, split: "
            f"{'none' if split is None else f'{len(split)} subjects'}); widen the datasets or make another split"
        )
    return selected


def freeze_selection(
    out: str | Path,
    cases: pa.Table,
    split: pd.DataFrame | None = None,
    datasets: Collection[str] | None = None,
    targets: Mapping[tuple[str, str], str] | None = None,
    drop_test: bool = False,
) -> str:
    """Write selection.parquet (see `select_cases`) and return its digest."""
    return write_selection(out, select_cases(cases, split, datasets, targets, drop_test))


def _person(group: Subject | None) -> str:
    """Return a name for a group of linked subjects that does not repeat the id of any: one may be forgotten later."""
    return "" if group is None else digest_of(list(group))[:16]


def _roles(split: pd.DataFrame | None) -> dict[tuple[str, str], str] | None:
    if split is None:
        return None
    roles: dict[tuple[str, str], str] = {}
    for line in split.to_dict("records"):
        key, role = (str(line["dataset"]), str(line["subject"])), str(line["split"])
        if role not in ROLES:
            raise SelectionError(f"subject {key[1]} of {key[0]} has split {role!r}; known: {', '.join(ROLES)}")
        if roles.setdefault(key, role) != role:
            raise SelectionError(
                f"subject {key[1]} of {key[0]} is both {roles[key]} and {role}; a subject has one role"
            )
    return roles
