"""Folds of a cross-validation: by subject, stratified, seeded, kept in files with digests beside the splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from models.records import digest_of
from tasks.crosswalk import person_links
from tasks.splits import STRATIFY, Subject, link_groups, parted, read_record, subjects_in, write_recorded

COUNT = 5
STRATA: tuple[str, ...] = (*STRATIFY, "age")
"""Default strata, most important first: absent columns are left out."""
BINS = 10
"""Numbers with more different values than this are stratified by as many quantile groups."""


class FoldError(ValueError):
    """Folds that break a rule: fewer subjects than folds, a subject in two folds, a file that was changed."""


def make_folds(
    cases: pd.DataFrame,
    count: int = COUNT,
    seed: int = 0,
    strata: Sequence[str] = STRATA,
    existing: pd.DataFrame | None = None,
    links: Sequence[tuple[Subject, Subject]] = (),
) -> pd.DataFrame:
    """Return one row a subject: dataset, subject, fold (0 to count - 1).

    `cases` has the columns dataset and subject and any of `strata`; several cases of a subject count once (first
    value). Subjects are sorted by stratum, shuffled inside it, and dealt to the smallest fold, so every stratum is
    spread evenly: a class with at least `count` subjects is in every fold when it is the first stratum and nothing is
    kept or linked. Subjects of `existing` keep their fold; linked subjects (near-duplicates, crosswalks) share one.
    Raises FoldError for fewer than two folds, and for fewer subjects than folds.
    """
    subjects = cases.drop_duplicates(["dataset", "subject"]).sort_values(["dataset", "subject"], kind="stable")
    if count < 2:
        raise FoldError(f"a cross-validation needs two or more folds, got {count}")
    if len(subjects) < count:
        raise FoldError(
            f"{len(subjects)} subjects are fewer than {count} folds; ask for fewer folds or add subjects to the store"
        )
    subjects = subjects.reset_index(drop=True)
    order = pd.DataFrame({name: _strata_of(subjects[name]) for name in strata if name in subjects})
    order["_draw"] = np.random.default_rng(seed).permutation(len(subjects))
    queue = order.sort_values(list(order.columns), kind="stable").index
    pairs = subjects_in(subjects)
    assigned = {} if existing is None else fold_of(existing)
    groups = link_groups(links)
    of_group = {groups[pair]: fold for pair, fold in assigned.items() if pair in groups}
    sizes = np.bincount(np.fromiter(assigned.values(), int, len(assigned)), minlength=count)
    for pair in (pairs[int(index)] for index in queue):
        if pair not in assigned:
            fold = of_group.setdefault(groups.get(pair, pair), int(np.argmin(sizes)))
            sizes[fold] += 1
            assigned[pair] = fold
    rows = [(dataset, subject, fold) for (dataset, subject), fold in sorted(assigned.items())]
    return pd.DataFrame(rows, columns=["dataset", "subject", "fold"])


def _strata_of(values: pd.Series) -> list[str]:
    """Return the stratum of each value: a quantile group of a number, the text of anything else."""
    if is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values) and values.nunique() > BINS:
        groups = np.floor(values.rank(method="first", pct=True) * BINS * (1 - 1e-9))
        return ["missing" if pd.isna(group) else f"{int(group):02d}" for group in groups]
    return ["missing" if pd.isna(value) else str(value) for value in values]


def fold_of(folds: pd.DataFrame) -> dict[Subject, int]:
    """Return (dataset, subject) -> fold; raises FoldError for a subject in two folds."""
    rows = [(str(d), str(s), int(f)) for d, s, f in folds[["dataset", "subject", "fold"]].itertuples(index=False)]
    found = {(dataset, subject): fold for dataset, subject, fold in rows}
    for dataset, subject, fold in rows:
        if found[dataset, subject] != fold:
            raise FoldError(f"subject {subject!r} of {dataset!r} is in two folds; a subject has one fold")
    return found


def folds_digest(folds: pd.DataFrame) -> str:
    """Return the SHA-256 of the sorted (dataset, subject, fold) triples; row order does not matter."""
    return digest_of(sorted([d, s, f] for (d, s), f in fold_of(folds).items()))


def read_folds(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return written folds and their record; raises FoldError when the table no longer matches its digest."""
    folds, record = pd.read_parquet(path), read_record(path)
    if (found := folds_digest(folds)) != record["digest"]:
        raise FoldError(
            f"{path}: the digest of the folds is {found[:12]} but their record says {record['digest'][:12]}: the table "
            "was changed after it was written; restore it or use folds of another name"
        )
    return folds, record


def ensure_folds(
    workspace: Path,
    name: str,
    store_url: str,
    people: pd.DataFrame,
    count: int = COUNT,
    seed: int = 0,
    strata: Sequence[str] = STRATA,
) -> pd.DataFrame:
    """Return the folds `<workspace>/splits/<name>.folds.parquet`: dataset, subject, fold.

    Written when absent and extended by the subjects that they do not know yet, with the seed and strata that they were
    made with. `people` are cases with phenotypes; of a table with a column `status` only stored ones count. Subjects
    that are one person (`tasks.crosswalk.person_links`) share a fold. Raises FoldError for folds of another count, for
    linked subjects that were put apart, and as `make_folds` does.
    """
    stored = people[people["status"] == "stored"] if "status" in people else people
    path = workspace / "splits" / f"{name}.folds.parquet"
    links = person_links(workspace, store_url)
    existing, record = read_folds(path) if path.exists() else (None, dict[str, Any]())
    if existing is not None:
        if record["count"] != count:
            raise FoldError(
                f"{path} holds {record['count']} folds, asked for are {count}; ask for {record['count']}, or use folds "
                "of another name"
            )
        kept = fold_of(existing)
        _check_links(kept, links)
        if set(subjects_in(stored)) <= set(kept):
            return existing
    made: dict[str, Any] = {"count": count, "seed": seed, "strata": list(strata)}
    made |= {key: record[key] for key in made if key in record}
    folds = make_folds(stored, count, made["seed"], made["strata"], existing, links)
    sizes = folds["fold"].value_counts().sort_index()
    subjects = {str(fold): int(size) for fold, size in sizes.items()}
    write_recorded(folds, path, {**made, "digest": folds_digest(folds), "subjects": subjects})
    return folds


def _check_links(assigned: dict[Subject, int], links: Sequence[tuple[Subject, Subject]]) -> None:
    if apart := parted(assigned, links):
        one, other = apart
        raise FoldError(
            f"{'/'.join(one)} (fold {assigned[one]}) and {'/'.join(other)} (fold {assigned[other]}) look like one "
            "person (see `brainloom store duplicates`), or a crosswalk says so, and must share a fold; use folds of "
            "another name, or forget one"
        )
