"""Splits of papers: who trains, validates and tests, from the file that a paper or a dataset comes with.

A JSON datalist (lists `training`, `validation`, `test` of images, as BrainMVP and MONAI write them), or a table (CSV,
TSV, Parquet) with a column of subjects and one of roles: a plain list, a participants table as OpenBHB's, or the
workspace's own catalog.parquet, which keeps what its sources said in the column `split`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from tasks.crosswalk import person_links
from tasks.phenotypes import SPELLINGS, prefixed
from tasks.sources.datalist import parse_datalist, parse_name
from tasks.splits import (
    DEFAULTS,
    GIVEN,
    IMPORTED,
    NAME,
    ROLES,
    SplitError,
    Subject,
    check_links,
    given,
    read_record,
    read_split,
    roles,
    subjects_in,
    write_split,
)
from tasks.table_files import pick, read_table

WORDS: dict[str, str] = {
    "train": "train",
    "training": "train",
    "tr": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "ts": "test",
}
"""What files call the roles, in lower-case letters -> ours."""
ROLE_COLUMNS = ("role", "split", "set", "subset", "partition")
"""Names of a column of roles, the first that is there is taken."""


@dataclass(frozen=True)
class Reading:
    """How a file is read."""

    dataset: str = ""
    """Whose subjects they are; of a table with a column `dataset` only its lines count. Empty: that column says."""
    subject: str = ""
    """Column of the subjects; empty: a known spelling."""
    role: str = ""
    """Column of the roles; empty: one of ROLE_COLUMNS."""
    prefix: str = ""
    """Put before each subject that lacks it."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Further words of the file -> train, val or test."""


@dataclass(frozen=True)
class Imported:
    """What was written."""

    path: Path
    digest: str
    counts: Mapping[tuple[str, str], int]
    """Subjects taken from the file by dataset and role."""
    rest: int = 0
    """Subjects that the file does not name and that got the role asked for."""
    unknown: int = 0
    """Subjects of the file that the store does not have."""


def read_roles(path: Path, reading: Reading) -> dict[Subject, str]:
    """Return the role of each subject that a file names; lines without a role are passed over.

    Raises SplitError for a word that is no role, a subject in two roles, a missing dataset, and a file that says
    nothing; ValueError for what is neither a datalist nor a table.
    """
    if not path.is_file():
        raise SplitError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name a datalist or a table")
    words = {**WORDS, **{theirs.lower(): ours for theirs, ours in reading.words.items()}}
    if wrong := sorted(set(words.values()) - set(ROLES)):
        raise SplitError(f"{wrong[0]!r} is no role; use {', '.join(ROLES)}")
    lines = _of_datalist(path, reading, words) if path.suffix == ".json" else _of_table(path, reading)
    found: dict[Subject, str] = {}
    for subject, word in lines:
        if not word:
            continue
        if word.lower() not in words:
            raise SplitError(
                f"{path}: {'/'.join(subject)} has the role {word!r}; known words are {', '.join(words)}: say what it "
                f"means with --word {word}=train, val or test"
            )
        role = words[word.lower()]
        if found.setdefault(subject, role) != role:
            raise SplitError(
                f"{path}: subject {'/'.join(subject)} is {found[subject]} and {role}; a subject has one role"
            )
    if not found:
        raise SplitError(f"{path} gives nobody a role{f' in dataset {reading.dataset!r}' if reading.dataset else ''}")
    return found


def _of_datalist(path: Path, reading: Reading, words: Collection[str]) -> Iterable[tuple[Subject, str]]:
    if not reading.dataset:
        raise SplitError(f"{path} is a datalist, which does not say whose cases they are: name the dataset")
    for entry in parse_datalist(path.read_bytes(), str(path), tuple(words)):
        yield (reading.dataset, prefixed(parse_name(entry.images[0]).subject, reading.prefix)), entry.section


def _of_table(path: Path, reading: Reading) -> Iterable[tuple[Subject, str]]:
    table = read_table(str(path))
    subjects = pick(table, reading.subject or _first(table, SPELLINGS["subject"]), str(path))
    words = pick(table, reading.role or _first(table, ROLE_COLUMNS), str(path))
    if "dataset" not in table and not reading.dataset:
        raise SplitError(f"{path} has no column 'dataset': name the dataset whose subjects these are")
    datasets = list(table["dataset"]) if "dataset" in table else [reading.dataset] * len(table)
    for number, (dataset, subject, word) in enumerate(zip(datasets, subjects, words, strict=True), start=2):
        if reading.dataset and dataset != reading.dataset:
            continue
        if not subject or not dataset:
            raise SplitError(f"{path}, row {number}: the {'dataset' if subject else 'subject'} is empty")
        yield (dataset, prefixed(subject, reading.prefix)), word


def _first(table: pd.DataFrame, names: Iterable[str]) -> str:
    """Return the first of some names that a table has as a column; the first name when it has none."""
    known = list(names)
    return next((name for name in known if name in table), known[0])


def import_split(
    workspace: Path,
    name: str,
    store_url: str,
    stored: Collection[Subject],
    path: Path,
    reading: Reading,
    rest: str = "",
    known_only: bool = False,
) -> Imported:
    """Write the roles of a file into the split `<workspace>/splits/<name>.parquet`, whatever else it has stays.

    stored: subjects of the store. rest: role of the subjects of the file's datasets that it does not name. known_only:
    pass over subjects that the store does not have. Raises SplitError when they are not passed over, when nobody is
    left, when the file does not name everybody of its datasets and `rest` does not say where they go, when the split
    has another role for somebody, when two subjects that are one person (tasks.crosswalk) would have two roles, and for
    a name that no split can have.
    """
    check_name(name)
    told, known = read_roles(path, reading), set(stored)
    here = {subject: role for subject, role in told.items() if subject in known}
    _check_known(path, told, here, stored, known_only)
    others = _others(path, here, stored, rest)
    target = workspace / "splits" / f"{name}.parquet"
    record = read_record(target) if target.exists() else {}
    before = roles(read_split(target)[0]) if target.exists() else {}
    asked = {**here, **dict.fromkeys(others, rest)}
    if moved := sorted(subject for subject, role in asked.items() if before.get(subject, role) != role):
        raise SplitError(
            f"{target}: {len(moved)} subjects have another role there, first {'/'.join(moved[0])} "
            f"({before[moved[0]]}, to be {asked[moved[0]]}); import into a split of another name"
        )
    assigned = {**before, **asked}
    check_links(assigned, person_links(workspace, store_url))
    source = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "subjects": len(here)}
    source |= {"datasets": sorted({dataset for dataset, _ in here}), "rest": rest if others else ""}
    provenance = {**DEFAULTS, **{key: record[key] for key in DEFAULTS if key in record}}
    new = len(asked.keys() - before.keys())
    same = [one for one in record.get(IMPORTED, []) if source.items() <= one.items()]
    earlier = [one for one in record.get(IMPORTED, []) if one not in same]
    source[GIVEN] = new + sum(map(given, same))
    table = pd.DataFrame([(*subject, role) for subject, role in sorted(assigned.items())])
    table.columns = pd.Index(["dataset", "subject", "split"])
    digest = write_split(table, target, {**provenance, IMPORTED: [*earlier, source]})
    counts = Counter((dataset, role) for (dataset, _), role in here.items())
    return Imported(target, digest, dict(sorted(counts.items())), len(others), len(told) - len(here))


def check_name(name: str) -> None:
    """Raise SplitError for a name that no split can have: it would lead to another folder, or no flow would take it."""
    if not re.fullmatch(NAME.strip("^$"), name):
        raise SplitError(f"{name!r} is no name of a split: use letters, digits, dashes and underscores")


def _check_known(
    path: Path, told: Mapping[Subject, str], here: Mapping[Subject, str], stored: Collection[Subject], known_only: bool
) -> None:
    unknown = sorted(told.keys() - here.keys())
    if not unknown or (known_only and here):
        return
    dataset = unknown[0][0]
    like = sorted(subject for name, subject in stored if name == dataset)
    known = f"the store's are like {like[0]!r}" if like else f"it has: {', '.join(sorted({d for d, _ in stored}))}"
    words = "none of its" if not here else f"{len(unknown)} of its"
    remedy = "" if not here else ", or pass over those that are absent (--known-only)"
    raise SplitError(
        f"{path}: {words} {len(told)} subjects {'is' if not here else 'are not'} in the store, first "
        f"{'/'.join(unknown[0])}; {known}: name the dataset and the prefix of its subjects{remedy}"
    )


def _others(path: Path, here: Mapping[Subject, str], stored: Collection[Subject], rest: str) -> list[Subject]:
    datasets = {dataset for dataset, _ in here}
    others = sorted(subject for subject in stored if subject[0] in datasets and subject not in here)
    if others and rest not in ROLES:
        raise SplitError(
            f"{path} does not name {len(others)} subjects of {', '.join(sorted(datasets))} that are in the store, "
            f"first {'/'.join(others[0])}; say where they go with --rest {', '.join(ROLES[:2])} or {ROLES[2]}"
        )
    return others


def split_counts(path: Path) -> pd.DataFrame:
    """Return the subjects of a split by dataset (index) and role (columns), as whole numbers."""
    split, _ = read_split(path)
    counts = split.value_counts(["dataset", "split"]).unstack(fill_value=0).sort_index()
    return counts.reindex(columns=list(ROLES), fill_value=0)


def stored_subjects(cases: pd.DataFrame) -> set[Subject]:
    """Return the subjects with a stored case."""
    return set(subjects_in(cases[cases["status"] == "stored"]))
