"""One phenotype row for every subject and session: rows of several tables are merged, what disagrees is reported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from pandas.api.types import is_numeric_dtype

from models.records import Scan
from tasks.phenotypes import KEYS, combine

WORDS = ("sex", "site", "diagnosis")
"""Columns in which an absent value is empty text; in others it is NaN or None."""
Problem = Literal["conflict", "bad value", "unknown subject", "no phenotypes"]


@dataclass(frozen=True)
class PhenotypeIssue:
    """Something in the phenotype tables that people should look at; it leaves out no scan."""

    dataset: str
    subject: str
    problem: Problem
    detail: str


def join_phenotypes(tables: Sequence[pd.DataFrame], scans: Iterable[Scan]) -> tuple[pd.DataFrame, list[PhenotypeIssue]]:
    """Return the phenotype table, one row per dataset, subject and session, and what is wrong with it.

    Values that disagree (two ages of one subject without sessions) are left empty and reported, never chosen. A row
    of a session takes what it lacks from the row of its subject.
    """
    stacked = combine(tables)
    issues: list[PhenotypeIssue] = []
    merged = _filled(_merged(stacked, issues))
    issues += _strangers(merged, scans)
    return merged, sorted(issues, key=lambda issue: (issue.dataset, issue.problem, issue.subject, issue.detail))


def _merged(stacked: pd.DataFrame, issues: list[PhenotypeIssue]) -> pd.DataFrame:
    """Return one row per key with the values that its rows agree on."""
    values = [name for name in stacked.columns if name not in KEYS]
    groups = _gaps(stacked).groupby(KEYS, sort=True)[values]
    disagree = groups.nunique() > 1
    merged = groups.first().mask(disagree)
    for key in disagree.index[disagree.any(axis=1)]:
        dataset, subject, session = (str(part) for part in key)
        rows = groups.get_group(key)
        for name in disagree.columns[disagree.loc[key]]:
            said = ", ".join(sorted({str(value)[:60] for value in rows[name].dropna()})[:5])
            where = f"{subject} {session}".strip()
            issues.append(PhenotypeIssue(dataset, subject, "conflict", f"{name} of {where}: {said}; left empty"))
    return merged.reset_index()[list(stacked.columns)]


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """Give the rows of sessions what the row of their subject says and theirs do not."""
    table, people = _gaps(table), ["dataset", "subject"]
    general = table[table["session"] == ""].set_index(people)
    own = pd.MultiIndex.from_frame(table[people])
    for name in table.columns.difference(KEYS, sort=False):
        if len(general):
            table[name] = table[name].where(table[name].notna(), general[name].reindex(own).to_numpy())
        if not is_numeric_dtype(table[name]):
            blank = "" if name in WORDS else None
            table[name] = pd.Series([blank if pd.isna(value) else value for value in table[name]])
    return table


def _gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with NaN for every empty text beside the keys."""
    values = table.drop(columns=KEYS)
    return pd.concat([table[KEYS], values.mask(values == "")], axis=1)


def _strangers(table: pd.DataFrame, scans: Iterable[Scan]) -> list[PhenotypeIssue]:
    """Return subjects with phenotypes and no scan, and subjects with scans that their dataset's tables do not name."""
    scanned: dict[str, set[str]] = defaultdict(set)
    for scan in scans:
        scanned[scan.dataset].add(scan.subject)
    issues = []
    for dataset, rows in table.groupby("dataset", sort=True):
        name, described = str(dataset), set(rows["subject"])
        issues += [
            PhenotypeIssue(name, subject, "unknown subject", "in a phenotype table, but no scan was found")
            for subject in sorted(described - scanned[name])
        ]
        issues += [
            PhenotypeIssue(name, subject, "no phenotypes", "has scans, but no phenotype table names it")
            for subject in sorted(scanned[name] - described - {""})
        ]
    return issues
