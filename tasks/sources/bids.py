"""Scans of a BIDS tree: `sub-*/[ses-*/]anat|dwi/*.nii[.gz]`, raw or of a derivative, with masks and phenotypes.

Subject and session keep their prefix (`sub-001`, `ses-01`), as in participants.tsv. Sidecar JSON is not needed. Folders
of other data types (func, perf, fmap, ...) are not looked at unless `datatypes` names them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from pydantic import Field

from infra import storage
from models.records import BRAIN_MASK, LABEL, Reason, Scan, UnknownModalityError
from tasks.headers import is_nifti
from tasks.phenotypes import combine, normalise, prefixed, read_participants
from tasks.sources.base import IGNORE, Candidate, Found, Root, SourceBase, open_root
from tasks.sources.bids_names import (
    MASK_SUFFIXES,
    ROLE_ENTITIES,
    SEGMENTATION_SUFFIXES,
    BidsName,
    mask_kind,
    modality_of,
    natural,
    parse_name,
)
from tasks.table_files import read_table

SESSIONS = re.compile(r"^(?P<subject>sub-[a-zA-Z0-9]+)/(?P=subject)_sessions\.tsv$")
READ_THREADS = 16


class BidsSource(SourceBase):
    """A dataset in the Brain Imaging Data Structure."""

    kind: Literal["bids"] = "bids"
    datatypes: tuple[str, ...] = Field(
        ("anat", "dwi"), title="Data types", description="Folders below a subject or session that are looked into."
    )
    task: str = Field(
        "rest",
        title="Task",
        description="Whose BOLD images are listed where `datatypes` names func; empty: those of any task.",
        pattern=r"^[a-zA-Z0-9]*$",
    )
    derivatives: str = Field(
        "derivatives",
        title="Derivatives",
        description="Folder below the root that holds segmentations (*_dseg, *_mask, *_msk) of lesions, which become "
        "labels, and brain masks (desc-brain_mask); empty: none are read.",
    )
    pipeline: str = Field(
        "",
        title="Pipeline",
        description="Folder below the derivatives whose images are read instead of the raw ones; empty: the raw ones.",
        examples=["fmriprep"],
        pattern=r"^[^/\\]*$",
    )
    entities: dict[str, str] = Field(
        default_factory=dict,
        title="Entities",
        description="Only images with these entities in their names; an empty value asks for the entity to be absent. "
        "Masks must agree in all but desc and label.",
        examples=[{"space": "MNI152NLin2009cAsym", "desc": "preproc"}, {"acq": ""}],
    )


def find_scans(source: BidsSource) -> Found:
    """Return the scans, masks and phenotypes of a BIDS tree; files that cannot be used carry their reason.

    Raises FileNotFoundError when the root is not a folder or lacks the pipeline, ValueError for a malformed table.
    """
    root = open_root(source, listed=True)
    listing = root.listing or {}
    tree = _Tree(root, source)
    if source.pipeline and not any(name.startswith(tree.images_below) for name in listing):
        raise FileNotFoundError(
            f"dataset {source.dataset}: {source.root} holds no file below {tree.images_below}; correct `pipeline`"
        )
    scans = [scan for name in sorted(listing, key=natural) if (scan := tree.scan(name)) is not None]
    return Found(scans, _phenotypes(root, source.dataset, sorted(listing)), len(listing))


@dataclass(frozen=True)
class _Tree:
    root: Root
    source: BidsSource

    def scan(self, relative: str) -> Scan | None:
        """Return the row of one file below the root, or None for a file that is no scan."""
        inside = relative.removeprefix(self.images_below)
        is_image = relative.startswith(self.images_below) and inside.startswith("sub-")
        is_derivative = bool(self.source.derivatives) and relative.startswith(self._derivatives)
        if not is_image and not is_derivative:
            return None
        if not is_nifti(relative):
            return self.root.linked_folder(relative) if is_image else None
        parts, name = relative.split("/"), parse_name(relative)
        if is_image and len(parts) > 2 and parts[-2] in self.source.datatypes:
            return self._image(relative, name)
        if is_derivative:
            return self._mask(relative, name) or self._unread(relative, name)
        return self._homeless(relative, name) if relative.startswith("sub-") and _lacks_datatype(parts) else None

    @property
    def _derivatives(self) -> str:
        return self.source.derivatives.rstrip("/") + "/"

    @property
    def images_below(self) -> str:
        """Where images must lie, relative to the root; empty: anywhere."""
        return f"{self._derivatives}{self.source.pipeline}/" if self.source.pipeline else ""

    def _image(self, relative: str, name: BidsName) -> Scan | None:
        if name.suffix in SEGMENTATION_SUFFIXES:
            return self._mask(relative, name)
        other_task = name.suffix == "bold" and self.source.task not in ("", name.entities.get("task"))
        if other_task or not name.fits(self.source.entities):
            return None
        try:
            modality = modality_of(name, self.source)
        except UnknownModalityError as error:
            problem = (Reason.UNKNOWN_MODALITY, f"{relative}: {error}")
            return self.root.scan(_candidate(relative, name, name.suffix, problem))
        return None if modality == IGNORE else self.root.scan(_candidate(relative, name, modality))

    def _mask(self, relative: str, name: BidsName) -> Scan | None:
        kind = mask_kind(name)
        # A mask with a task is that of a BOLD image.
        if (
            not kind
            or "task" in name.entities
            or not name.subject
            or not name.fits(self.source.entities, without=ROLE_ENTITIES)
        ):
            return None
        return self.root.scan(_candidate(relative, name, kind))

    def _unread(self, relative: str, name: BidsName) -> Scan | None:
        """Return the row of a derivative whose suffix says nothing known, left out, or as the label that an alias says.

        Images of a pipeline, other anatomy, and everything with a task or without a subject are passed over.
        """
        if "task" in name.entities or not name.subject or name.suffix in SEGMENTATION_SUFFIXES:
            return None
        try:
            modality = self.source.resolve(name.suffix)
        except UnknownModalityError:
            detail = (
                f"{relative}: {name.suffix!r} is neither a segmentation ({', '.join(MASK_SUFFIXES)}) nor an image; "
                "name it in `aliases` of the source, as 'label' or as 'ignore'"
            )
            return self.root.scan(_candidate(relative, name, "", (Reason.UNMATCHED, detail)))
        wanted = modality in (LABEL, BRAIN_MASK) and name.fits(self.source.entities, without=ROLE_ENTITIES)
        return self.root.scan(_candidate(relative, name, modality)) if wanted else None

    def _homeless(self, relative: str, name: BidsName) -> Scan | None:
        detail = f"{relative} lies in no folder of a data type ({', '.join(self.source.datatypes)}); move it into one"
        return self.root.scan(_candidate(relative, name, "", (Reason.UNMATCHED, detail)))


def _lacks_datatype(parts: Sequence[str]) -> bool:
    return len(parts) == 1 or parts[-2].startswith(("sub-", "ses-"))


def _candidate(relative: str, name: BidsName, modality: str, problem: tuple[Reason, str] | None = None) -> Candidate:
    # The folder decides: a file name may lack `sub-`, or contradict it.
    parts = relative.split("/")
    subject = next((part for part in parts[:-1] if part.startswith("sub-")), name.subject or parts[0])
    session = next((part for part in parts[1:-1] if part.startswith("ses-")), name.session)
    return Candidate(relative, subject, session, modality, problem)


def _phenotypes(root: Root, dataset: str, names: Sequence[str]) -> pd.DataFrame:
    """Return participants.tsv and every `sub-*_sessions.tsv` in one table."""
    tables = [_sessions(root, dataset, [match for name in names if (match := SESSIONS.match(name))])]
    if "participants.tsv" in (root.listing or {}):
        tables.insert(0, read_participants(storage.join(root.url, "participants.tsv"), dataset, subject_prefix="sub-"))
    both = combine(tables)
    both["session"] = [prefixed(session, "ses-") for session in both["session"]]
    return both


def _sessions(root: Root, dataset: str, files: Sequence[re.Match[str]]) -> pd.DataFrame:
    urls = [storage.join(root.url, match[0]) for match in files]
    sizes = [int((root.listing or {})[match[0]].get("size") or 0) for match in files]
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sessions") as pool:
        tables = list(pool.map(read_table, urls, sizes))
    rows = [
        {**row, "subject": match["subject"]}
        for match, table in zip(files, tables, strict=True)
        for row in table.to_dict("records")
    ]
    return normalise(pd.DataFrame(rows, dtype=object), dataset) if rows else pd.DataFrame()
