"""Which subjects train, validate and test: by subject, stratified, seeded, kept in files with digests.

One split covers all datasets of a workspace, so that a test subject never enters pre-training either.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import write_bytes
from models.config import MadeFrom
from models.records import digest_of
from tasks.crosswalk import crosswalk_digest, person_links, warn_of_strangers
from tasks.phenotype_layouts import with_layouts
from tasks.phenotypes import PHENOTYPES_FILE, phenotypes_digest
from tasks.split_protocol import Shares, shares_by_dataset, target_strata, with_strata
from tasks.versions import keep_version

ROLES: tuple[str, str, str] = ("train", "val", "test")
STRATIFY: tuple[str, ...] = ("dataset", "has_label", "lesion", "diagnosis", "control_group", "site")
"""Default strata, most important first: absent columns are left out."""
SHARES: tuple[float, float, float] = (0.7, 0.1, 0.2)
"""Of train, val and test."""
Subject = tuple[str, str]
"""Dataset and subject."""
DEFAULTS: dict[str, Any] = {"seed": 0, "shares": list(SHARES), "stratify": list(STRATIFY)}
"""How a split is made and extended, unless its record says otherwise."""
IMPORTED = "imported"
"""Of a record: the files that roles were taken from (tasks.split_import)."""
GIVEN = "given"
"""Of an imported file: subjects that had no role before."""
OWN_SHARES = "shares_of"
"""Of a record: shares of single datasets, as their benchmarks want them."""
NAME = r"^[A-Za-z0-9_-]+$"
"""What a split may be called."""
METADATA_KEY = b"split"
"""Of the record (JSON: digest, counts, provenance) in the Parquet schema's metadata."""


class SplitError(ValueError):
    """A split that breaks a rule: a subject in two roles, an empty role, a file that was changed."""


def make_split(
    cases: pd.DataFrame,
    seed: int,
    shares: tuple[float, float, float] = SHARES,
    stratify: Sequence[str] = STRATIFY,
    existing: pd.DataFrame | None = None,
    links: Sequence[tuple[Subject, Subject]] = (),
    shares_of: Mapping[str, Shares] | None = None,
) -> pd.DataFrame:
    """Return one row a subject: dataset, subject, split (train, val or test).

    `cases` has the columns dataset and subject and any of `stratify`; several cases of a subject count once (first
    value). Subjects are sorted by stratum, shuffled inside it, and each is given to the role that is furthest behind
    its share, so that shares hold in every prefix and hence nearly in every stratum. Subjects of `existing` keep their
    role: growing a cohort moves nobody from test to train. Linked subjects (near-duplicates, crosswalks) share a role.
    Datasets of `shares_of` have shares of their own. Raises SplitError for bad shares, an empty role, or linked
    subjects that already have different roles.
    """
    own = dict(shares_of or {})
    for each in (shares, *own.values()):
        _check_shares(each)
    columns = [name for name in stratify if name in cases.columns]
    subjects = cases.drop_duplicates(["dataset", "subject"]).copy()
    subjects = subjects.sort_values(["dataset", "subject"], kind="stable").reset_index(drop=True)
    kept = {} if existing is None else _as_dict(existing)
    strata = subjects[columns].astype(str) if columns else pd.DataFrame({"all": ["all"] * len(subjects)})
    order = strata.assign(_draw=np.random.default_rng(seed).permutation(len(subjects)))
    queue = order.sort_values([*strata.columns, "_draw"], kind="stable").index
    pairs = subjects_in(subjects)
    counts: dict[str, np.ndarray] = {pool: np.zeros(3) for pool in ("", *own)}
    for (dataset, _), name in kept.items():
        counts[dataset if dataset in own else ""][ROLES.index(name)] += 1
    assigned = dict(kept)
    group_of = link_groups(links)
    check_links(assigned, links)
    of_group = {group_of[pair]: role for pair, role in assigned.items() if pair in group_of}
    for pair in (pairs[int(index)] for index in queue):
        if pair not in assigned:
            count = counts[pair[0] if pair[0] in own else ""]
            behind = np.asarray(own.get(pair[0], shares)) * (count.sum() + 1) - count
            role = of_group.setdefault(group_of.get(pair, pair), ROLES[int(np.argmax(behind))])
            count[ROLES.index(role)] += 1
            assigned[pair] = role
    rows = [(dataset, subject, role_name) for (dataset, subject), role_name in sorted(assigned.items())]
    split = pd.DataFrame(rows, columns=["dataset", "subject", "split"])
    check_split(split, shares)
    return split


def subjects_in(table: pd.DataFrame) -> list[Subject]:
    """Return (dataset, subject) of every row, in order, as text."""
    return [(str(d), str(s)) for d, s in zip(table["dataset"], table["subject"], strict=True)]


def link_groups(links: Iterable[tuple[Subject, Subject]]) -> dict[Subject, Subject]:
    """Return the group of every linked subject, named by its first member: whoever is linked to a link is in it."""
    groups: dict[Subject, set[Subject]] = {}
    for one, other in links:
        merged = groups.get(one, {one}) | groups.get(other, {other})
        groups.update(dict.fromkeys(merged, merged))
    return {subject: min(group) for subject, group in groups.items()}


def lookalikes(seen: Iterable[Subject], links: Iterable[tuple[Subject, Subject]]) -> dict[Subject, Subject]:
    """Return everybody that is linked to one of some subjects, also through others, with the first such one."""
    groups = link_groups(links)
    known = {groups[subject]: subject for subject in sorted(seen, reverse=True) if subject in groups}
    return {subject: known[group] for subject, group in groups.items() if group in known}


def check_links(assigned: Mapping[Subject, str], links: Iterable[tuple[Subject, Subject]]) -> None:
    """Refuse roles that put two linked subjects apart; raises SplitError naming them."""
    if apart := parted(assigned, links):
        one, other = apart
        raise SplitError(
            f"{'/'.join(one)} ({assigned[one]}) and {'/'.join(other)} ({assigned[other]}) look like one person (see "
            "`brainloom store duplicates`), or a crosswalk says so, and must share a role; write a split of another "
            "name, or forget one"
        )


def parted(
    assigned: Mapping[Subject, object], links: Iterable[tuple[Subject, Subject]]
) -> tuple[Subject, Subject] | None:
    """Return the first two subjects of one group of links (through others, too) that were put apart, or None."""
    firsts: dict[Subject, Subject] = {}
    for subject, group in sorted(link_groups(links).items()):
        if subject in assigned:
            first = firsts.setdefault(group, subject)
            if assigned[first] != assigned[subject]:
                return first, subject
    return None


def _check_shares(shares: tuple[float, float, float]) -> None:
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise SplitError(f"shares of train, val and test must be at least 0 and sum to 1, got {shares}")


def _as_dict(split: pd.DataFrame) -> dict[tuple[str, str], str]:
    return {(str(d), str(s)): str(r) for d, s, r in split[["dataset", "subject", "split"]].itertuples(index=False)}


def check_split(split: pd.DataFrame, shares: tuple[float, float, float] = (1, 1, 1)) -> None:
    """Refuse a split with a subject in two roles, an unknown role, or an empty role whose share is above 0."""
    if unknown := set(split["split"]) - set(ROLES):
        raise SplitError(f"unknown roles in the split: {sorted(unknown)}; use {', '.join(ROLES)}")
    roles = split.groupby(["dataset", "subject"])["split"].nunique()
    if (roles > 1).any():
        dataset, subject = roles[roles > 1].index[0]
        raise SplitError(f"subject {subject!r} of {dataset!r} is in {roles.max()} roles; a subject has one role")
    for role, share in zip(ROLES, shares, strict=True):
        if share > 0 and not (split["split"] == role).any():
            raise SplitError(f"no subject in role {role!r}: {len(split)} subjects are too few for shares {shares}")


def split_digest(split: pd.DataFrame) -> str:
    """Return the SHA-256 of the sorted (dataset, subject, role) triples; row order does not matter."""
    return digest_of(sorted([d, s, r] for (d, s), r in _as_dict(split).items()))


def write_split(split: pd.DataFrame, path: Path, provenance: dict[str, Any] | None = None) -> str:
    """Write a split (see `write_recorded`) with its digest, counts and provenance; return the digest.

    What was there before stays as a version of it (tasks.versions).
    """
    check_split(split, (1, 0, 0))
    digest = split_digest(split)
    counts = {role: int((split["split"] == role).sum()) for role in ROLES}
    write_recorded(split, path, {**(provenance or {}), "digest": digest, "subjects": counts})
    keep_version(str(path), digest)
    return digest


def write_recorded(table: pd.DataFrame, path: Path, record: dict[str, Any]) -> None:
    """Write a Parquet table with a record (digest, counts, provenance) in its metadata, in one atomic write.

    `<path>.json` is a copy of the record for people, which nothing depends on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**(content.schema.metadata or {}), METADATA_KEY: json.dumps(record, sort_keys=True).encode()}
    buffer = io.BytesIO()
    pq.write_table(content.replace_schema_metadata(metadata), buffer)
    write_bytes(str(path), buffer.getvalue())
    _write_copy(path, record)


def _write_copy(path: Path, record: dict[str, Any]) -> None:
    """Write `<path>.json` unless it says the same already."""
    copy, text = path.with_suffix(".json"), json.dumps(record, indent=1, sort_keys=True).encode()
    if not copy.exists() or copy.read_bytes() != text:
        write_bytes(str(copy), text)


def read_record(path: Path) -> dict[str, Any]:
    """Return digest, counts and provenance of a written split.

    A table without them in its metadata is vouched for by its json; raises SplitError when that is absent too.
    """
    metadata = pq.read_schema(path).metadata or {}
    copy = path.with_suffix(".json")
    if METADATA_KEY not in metadata and not copy.exists():
        raise SplitError(
            f"{path}: the split has no digest, neither in its metadata nor in {copy.name}: it cannot be told whether "
            "it was changed; restore it or write a split of another name"
        )
    record: dict[str, Any] = json.loads(metadata.get(METADATA_KEY) or copy.read_bytes())
    return record


def given(source: Mapping[str, Any]) -> int:
    """Return how many subjects have their role from an imported file, or from what was said of its other subjects."""
    return int(source.get(GIVEN, source["subjects"]))


def read_split(path: Path) -> tuple[pd.DataFrame, str]:
    """Return a written split and its digest; raises SplitError without it, and when it no longer matches its digest."""
    if not path.exists():
        known = sorted(one.stem for one in path.parent.glob("*.parquet"))
        raise SplitError(f"there is no split {path.stem!r} in {path.parent}; it has: {', '.join(known) or 'none'}")
    split = pd.read_parquet(path)
    said = str(read_record(path)["digest"])
    if (found := split_digest(split)) != said:
        raise SplitError(
            f"{path}: the split's digest is {found[:12]} but its record says {said[:12]}: "
            "the table was changed after it was written; restore it or write a split of another name"
        )
    check_split(split, (1, 0, 0))
    return split, said


def with_phenotypes(cases: pd.DataFrame, phenotypes: pd.DataFrame) -> pd.DataFrame:
    """Return the cases with the phenotype columns of their subject and session.

    Where the phenotype table has no row for the session, the subject's first row is used. Case columns win.
    """
    extra = [c for c in phenotypes.columns if c not in cases.columns]
    by_session = phenotypes.drop_duplicates(["dataset", "subject", "session"])
    by_subject = phenotypes.drop_duplicates(["dataset", "subject"])
    merged = cases.merge(
        by_session[["dataset", "subject", "session", *extra]], "left", ["dataset", "subject", "session"]
    )
    fallback = cases[["dataset", "subject"]].merge(
        by_subject[["dataset", "subject", *extra]], "left", ["dataset", "subject"]
    )
    for column in extra:
        merged[column] = merged[column].where(merged[column].notna(), fallback[column].to_numpy())
    return merged


def people_of(cases: pd.DataFrame, workspace: Path) -> pd.DataFrame:
    """Return the cases with the phenotypes of a workspace, when it has any.

    Says in the log what crosswalks of the workspace name that is not among the cases.
    """
    warn_of_strangers(workspace, cases)
    phenotypes = workspace / PHENOTYPES_FILE
    return with_phenotypes(cases, pd.read_parquet(phenotypes)) if phenotypes.exists() else cases


def made_from(workspace: Path, split: str, digest: str) -> MadeFrom:
    """Name the split (of this digest) and the phenotypes of a workspace, and keep these versions of them."""
    keep_version(str(workspace / "splits" / f"{split}.parquet"), digest)
    phenotypes, of_phenotypes = workspace / PHENOTYPES_FILE, ""
    if phenotypes.exists():
        of_phenotypes = phenotypes_digest(pd.read_parquet(phenotypes))
        keep_version(str(phenotypes), of_phenotypes)
    return MadeFrom(
        split=split,
        split_digest=digest,
        phenotypes_digest=of_phenotypes,
        crosswalks_digest=crosswalk_digest(workspace),
    )


def workspace_split(
    workspace: Path, name: str, store_url: str, people: pd.DataFrame, shares: tuple[float, float, float] = SHARES
) -> tuple[pd.DataFrame, str]:
    """Return a split of a workspace and its digest, made for or extended by the stored cases among `people`.

    Subjects that are one person, by looks (`tasks.duplicates`) or by a crosswalk, share a role. It is stratified by
    what the benchmarks on the datasets of the store tell apart, too, and has the shares that they want
    (tasks.split_protocol).
    """
    stored = with_layouts(people[people["status"] == "stored"])
    path = workspace / "splits" / f"{name}.parquet"
    return ensure_split(
        path,
        stored,
        seed=0,
        shares=shares,
        links=person_links(workspace, store_url),
        targets=target_strata(set(stored["dataset"])),
        shares_of=shares_by_dataset(set(stored["dataset"])),
    )


def ensure_split(
    path: Path,
    cases: pd.DataFrame,
    seed: int,
    shares: tuple[float, float, float] = SHARES,
    stratify: Sequence[str] = STRATIFY,
    links: Sequence[tuple[Subject, Subject]] = (),
    targets: Sequence[str] = (),
    shares_of: Mapping[str, Shares] | None = None,
) -> tuple[pd.DataFrame, str]:
    """Return the split at `path`, written when absent and extended by the subjects that it does not know yet.

    links: pairs of subjects that are one person (tasks.crosswalk). An extension uses the seed, shares and strata that
    the split was made with, whatever is asked for now. Further strata, `targets`, are added to them; `shares_of`,
    shares of single datasets, hold in a split that has SHARES. The json beside it is written again when it is absent or
    says something else. Raises SplitError when a written split keeps linked subjects apart.
    """
    existing, record = None, dict[str, Any]()
    if path.exists():
        existing, digest = read_split(path)
        check_links(_as_dict(existing), links)
        record = read_record(path)
        if set(subjects_in(cases)) <= set(_as_dict(existing)):
            _write_copy(path, record)
            return existing, digest
    provenance: dict[str, Any] = {"seed": seed, "shares": list(shares), "stratify": list(stratify)}
    provenance |= {name: record[name] for name in (*provenance, IMPORTED) if name in record}
    provenance["stratify"] = with_strata(provenance["stratify"], targets)
    train, val, test = provenance["shares"]
    if own := dict(shares_of or {}) if (train, val, test) == SHARES else {}:
        provenance[OWN_SHARES] = own
    split = make_split(cases, provenance["seed"], (train, val, test), provenance["stratify"], existing, links, own)
    return split, write_split(split, path, provenance)


def roles(split: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Return (dataset, subject) -> train, val or test."""
    return _as_dict(split)
