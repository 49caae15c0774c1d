"""What all sources share: their config, safe paths inside a root, and rows of scans that were left out.

A source only names files; `tasks.catalog` reads their headers and finds duplicates over all sources.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from infra import storage
from models.records import Reason, Record, Scan

LABEL = "label"
"""The `modality` of a segmentation."""


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


@dataclass
class Found:
    """What one source yields: scans in order of preference (the first of two duplicates is kept) and phenotypes."""

    scans: list[Scan] = field(default_factory=list)
    phenotypes: pd.DataFrame = field(default_factory=pd.DataFrame)


class OutsideRootError(ValueError):
    """A path of a manifest or a link in a tree leaves the root of its source."""


def open_root(source: SourceBase) -> tuple[Any, str, str]:
    """Return (filesystem, path inside it, URL or absolute path) of a source's root; its listing cache is emptied.

    Raises FileNotFoundError when the root does not exist: a wrong config, not a bad scan.
    """
    fs, path = storage.filesystem(source.root)
    url = source.root.rstrip("/")
    if storage.is_local(source.root):
        url = path = str(Path(path).resolve())
    fs.invalidate_cache()
    if not fs.isdir(path):
        raise FileNotFoundError(f"dataset {source.dataset}: the root {url} is not a folder; correct `root`")
    return fs, path, url


def check_link(root: str, relative: str) -> None:
    """Refuse a local file whose links lead out of the root; raises OutsideRootError. S3 has no links."""
    if not storage.is_local(root):
        return
    path = Path(root, relative)
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutsideRootError(f"{relative!r} cannot be resolved: {error}") from None
    if not target.is_relative_to(Path(root).resolve()):
        raise OutsideRootError(f"{path} links to {target}, outside the root {root}; copy the file into the root")


def check_relative(name: str) -> str:
    """Return a manifest's path without a leading `./`; raises OutsideRootError when it could leave the root."""
    if not name or "\x00" in name or "\\" in name or "://" in name or name.startswith(("/", "~")):
        raise OutsideRootError(f"path {name!r} is not relative to the root; write it with / and without a drive or URL")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise OutsideRootError(f"path {name!r} leaves the root through '..'; write it relative to the root")
    return "/".join(parts)


def left_out(scan: Scan, reason: Reason, detail: str) -> Scan:
    """Return the scan with the reason why it is not used."""
    return scan.replace(status="left out", reason=reason.value, detail=detail)


def case_id(subject: str, session: str) -> str:
    """Return `<subject>` or `<subject>_<session>`."""
    return f"{subject}_{session}" if session else subject
