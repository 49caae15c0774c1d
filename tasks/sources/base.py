"""What all sources share: their config, safe paths inside a root, and rows of scans that were left out.

A source only names files; `tasks.catalog` reads their headers and finds duplicates over all sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field, field_validator

from infra import storage
from models.records import (
    BRAIN_MASK,
    CONFOUNDS,
    LABEL,
    MODALITIES,
    OTHER_MODALITIES,
    SERIES,
    Reason,
    Record,
    Scan,
    UnknownModalityError,
    canonical_modality,
)
from tasks.headers import listed_identity
from tasks.phenotype_join import PhenotypeIssue
from tasks.sources.names import (
    MAX_ID,
    MAX_PATH,
    OutsideRootError,
    bad_id,
    case_id,
    check_link,
    check_relative,
    shorten,
)

IGNORE = "ignore"
"""Alias of a token whose files the config does not want: they are not listed at all."""
FILE_KINDS = (*MODALITIES, *OTHER_MODALITIES, SERIES, CONFOUNDS, BRAIN_MASK)
"""What a table may name in columns of their own, beside a label."""
ALIAS_TARGETS = (*FILE_KINDS, LABEL, IGNORE)
MAX_DETAIL = 600
"""Characters of a reason's detail in the catalog."""


class PhenotypeTable(Record):
    """A table about the subjects, and how it calls its columns."""

    path: str = Field(
        title="Table",
        description="CSV, TSV or Parquet, relative to the root (or an absolute path or URL).",
        examples=["participants.tsv", "s3://mri/tables/ixi.parquet"],
        min_length=1,
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        title="Columns",
        description="Our name -> column of the table; only these are read. Our names: subject, session, age, sex, "
        "site, diagnosis, and any other for scores. Empty: known spellings, and all other columns as they are called.",
        examples=[{"subject": "ID", "age": "Age at scan", "mmse": "MMSE total"}],
    )
    subject_prefix: str = Field(
        "",
        title="Prefix of subjects",
        description="Put before every subject id of the table, where the table leaves it out.",
        examples=["sub-"],
    )


class SourceBase(Record):
    """Where one dataset lies and what its labels mean."""

    dataset: str = Field(
        title="Dataset",
        description="Name of the dataset in the catalog and the store: lower case, digits and dashes.",
        examples=["brats2021"],
        pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$",
    )
    root: str = Field(
        title="Root folder",
        description="Folder or URL (s3://bucket/prefix) that holds the dataset; no file outside it is ever read.",
        examples=["./sources/brats2021", "s3://mri/brats2021"],
        min_length=1,
    )
    label_scheme: str = Field(
        "",
        title="Label scheme",
        description="What label values mean, e.g. brats2021 (ET is 4) or brats2023 (ET is 3); empty without labels.",
        examples=["brats2021"],
    )
    aliases: dict[str, str] = Field(
        default_factory=dict,
        title="Modality aliases",
        description="Token of this dataset -> modality, beside the built-in table; upper and lower case are equal. "
        f"One of: {', '.join(ALIAS_TARGETS)}. Files of an ignored token are not listed.",
        examples=[{"mprage": "t1", "seg": "label", "swi": "ignore"}],
    )
    phenotypes: tuple[PhenotypeTable, ...] = Field(
        (),
        title="Phenotype tables",
        description="Tables of age, sex, site, diagnosis and scores, joined by subject and session.",
    )

    @field_validator("aliases")
    @classmethod
    def _known_targets(cls, aliases: dict[str, str]) -> dict[str, str]:
        lowered = [token.lower() for token in aliases]
        if doubled := sorted({token for token in lowered if lowered.count(token) > 1}):
            raise ValueError(f"aliases name {', '.join(doubled)} twice; upper and lower case are equal")
        for token, target in aliases.items():
            if target not in ALIAS_TARGETS:
                raise ValueError(f"alias {token!r} means {target!r}; use one of {', '.join(ALIAS_TARGETS)}")
        return {token.lower(): target for token, target in aliases.items()}

    @property
    def url(self) -> str:
        """The root as the paths of its scans begin: resolved when local, else the URL."""
        return str(storage.local_path(self.root).resolve()) if storage.is_local(self.root) else self.root.rstrip("/")

    def locate(self, name: str) -> str:
        """Return the URL of a table or list of the config: relative to the root, or absolute."""
        return name if "://" in name or name.startswith("/") else storage.join(self.url, name)

    def resolve(self, token: str) -> str:
        """Return the canonical modality (or label, brain_mask, ignore) of a token; raises UnknownModalityError."""
        if alias := self.aliases.get(token.lower()):
            return alias
        try:
            return canonical_modality(token)
        except UnknownModalityError as error:
            raise UnknownModalityError(f"{error}; name it in `aliases` of the source, or as {IGNORE!r}") from None


@dataclass
class Found:
    """What one source yields: scans in order of preference (the first of two duplicates is kept) and phenotypes."""

    scans: list[Scan] = field(default_factory=list)
    phenotypes: pd.DataFrame = field(default_factory=pd.DataFrame)
    """As the tables say, see tasks.phenotypes.COLUMNS; a subject may have several rows."""
    listed: int = 0
    """Files in the listing of the root, if there was one: on S3 every 1,000 were a request."""
    issues: list[PhenotypeIssue] = field(default_factory=list)
    """Cells of the phenotype tables that say nothing we know."""


@dataclass(frozen=True)
class Candidate:
    """A file that a source names, before it was checked."""

    path: str
    """Relative to the root, as the source writes it."""
    subject: str
    session: str = ""
    modality: str = ""
    problem: tuple[Reason, str] | None = None
    """Why it cannot be used, when the source knows already."""
    split: str = ""
    label_scheme: str = ""


@dataclass(frozen=True)
class Root:
    """The opened root of a source and, where there is one, the listing of all files below it."""

    source: SourceBase
    url: str
    """URL, or resolved absolute path."""
    listing: Mapping[str, Mapping[str, Any]] | None
    """Relative path -> entry of a listing; None: a local root that was not listed."""

    def scan(self, candidate: Candidate) -> Scan:
        """Return the row of a file, left out when its path, its names or the listing forbid to use it."""
        subject, session = candidate.subject.strip(), candidate.session.strip()
        row = {
            "dataset": self.source.dataset,
            "subject": shorten(subject, MAX_ID),
            "session": shorten(session, MAX_ID),
            "case": shorten(case_id(subject, session), MAX_ID),
            "modality": shorten(candidate.modality, MAX_ID),
            "path": shorten(candidate.path, MAX_PATH),
            "label_scheme": candidate.label_scheme or self.source.label_scheme,
            "split": shorten(candidate.split, MAX_ID),
        }
        try:
            relative = check_relative(candidate.path)
            check_link(self.url, relative)
        except OutsideRootError as error:
            return left_out(Scan(**row), Reason.OUTSIDE_ROOT, str(error))
        row["path"] = storage.join(self.url, relative)
        if problem := candidate.problem or bad_id(subject, session) or self._absent(relative):
            return left_out(Scan(**row), *problem)
        size, etag = self._identity(relative)
        return Scan(**row, size_bytes=size, etag=etag)

    def linked_folder(self, relative: str) -> Scan | None:
        """Return the row of a link to a folder that leads out of the root, or None: such links are not followed."""
        if self.listing is None or not self.listing[relative].get("islink") or "." in relative.rsplit("/", 1)[-1]:
            return None
        scan = self.scan(Candidate(relative, relative.split("/", 1)[0]))
        return scan if scan.reason == Reason.OUTSIDE_ROOT else None

    def links_out(self) -> list[Scan]:
        """Return the rows of all links below the root to folders outside."""
        rows = (self.linked_folder(name) for name in sorted(self.listing or {}))
        return [row for row in rows if row is not None]

    def _absent(self, relative: str) -> tuple[Reason, str] | None:
        if self.listing is None or relative in self.listing:
            return None
        return Reason.MISSING_FILE, f"{storage.join(self.url, relative)} does not exist; restore it or take it off"

    def _identity(self, relative: str) -> tuple[int, str]:
        # Local modification times of a listing are rounded, so they are read again with the header.
        if self.listing is None or storage.is_local(self.url):
            return 0, ""
        return listed_identity(self.listing[relative])


def open_root(source: SourceBase, listed: bool) -> Root:
    """Open the root of a source; `listed` asks for a listing, which an S3 root always gets: it saves a request a file.

    Raises FileNotFoundError when the root does not exist: a wrong config, not a bad scan.
    """
    local = storage.is_local(source.root)
    url = source.url
    try:
        if local and not Path(url).is_dir():
            raise FileNotFoundError(url)
        listing = storage.find(url) if listed or not local else None
    except FileNotFoundError:
        raise FileNotFoundError(f"dataset {source.dataset}: the root {url} is not a folder; correct `root`") from None
    return Root(source, url, listing)


@contextmanager
def naming(source: SourceBase, key: str, url: str) -> Iterator[None]:
    """Say dataset, key and what to do when a file that the config names is absent or cannot be read."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        kinds = {IsADirectoryError: "is a folder", PermissionError: "may not be read by this user"}
        what = kinds.get(type(error), "does not exist")
        raise type(error)(
            f"dataset {source.dataset}: `{key}` names {url}, which {what}; correct `{key}`, or put the file there"
        ) from None


def resolve_token(source: SourceBase, token: str, where: str) -> tuple[str, tuple[Reason, str] | None]:
    """Return (modality, None), or (the token itself, why it is unknown); `where` names the file in that sentence."""
    try:
        return source.resolve(token), None
    except UnknownModalityError as error:
        return token, (Reason.UNKNOWN_MODALITY, f"{where}: {error}")


def left_out(scan: Scan, reason: Reason, detail: str) -> Scan:
    """Return the scan with the reason why it is not used."""
    return scan.model_copy(update={"status": "left out", "reason": reason.value, "detail": shorten(detail, MAX_DETAIL)})
