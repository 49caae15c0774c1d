"""Scans of a BIDS tree: `sub-*/[ses-*/]anat|dwi/*.nii[.gz]`, masks in `derivatives/`, `participants.tsv`.

Subject and session keep their prefix (`sub-001`, `ses-01`), as in participants.tsv. Sidecar JSON is not needed. Folders
of other data types (func, perf, fmap, ...) are not looked at unless `datatypes` names them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from infra import storage
from models.records import Reason, Scan, UnknownModalityError, canonical_modality
from tasks.headers import is_nifti, listed_identity, stem
from tasks.phenotypes import read_participants
from tasks.sources.base import LABEL, Found, OutsideRootError, SourceBase, case_id, check_link, left_out, open_root

ENTITY = re.compile(r"^([a-zA-Z]+)-([a-zA-Z0-9]+)$")
LABEL_SUFFIXES = ("dseg", "mask")
ANATOMICAL_MASKS = frozenset({"brain", "head", "skull", "aseg", "tissue"})
"""Values of `desc` or `label` that mark a segmentation of anatomy, not of a lesion."""


class BidsSource(SourceBase):
    """A dataset in the Brain Imaging Data Structure."""

    kind: Literal["bids"] = "bids"
    datatypes: tuple[str, ...] = Field(
        ("anat", "dwi"), title="Data types", description="Folders below a subject or session that are looked into."
    )
    derivatives: str = Field(
        "derivatives",
        title="Derivatives",
        description="Folder below the root that holds segmentations (*_dseg, *_mask); empty: no labels are read.",
    )


@dataclass(frozen=True)
class BidsName:
    """A BIDS file name, taken apart."""

    entities: dict[str, str]
    suffix: str

    @property
    def subject(self) -> str:
        """`sub-<label>`, or empty."""
        return f"sub-{self.entities['sub']}" if "sub" in self.entities else ""

    @property
    def session(self) -> str:
        """`ses-<label>`, or empty."""
        return f"ses-{self.entities['ses']}" if "ses" in self.entities else ""


def parse_name(name: str) -> BidsName:
    """Take a file name apart: `sub-1_ce-gd_T1w.nii.gz` -> entities sub, ce and suffix T1w."""
    *pieces, suffix = stem(name).split("_")
    entities = {match[1]: match[2] for match in map(ENTITY.match, pieces) if match}
    return BidsName(entities, suffix)


def modality_of(name: BidsName) -> str:
    """Return the canonical modality of an image; raises UnknownModalityError saying which rule failed.

    `ce-*_T1w` is t1c, `desc-adc_dwi` is adc. Another contrast-enhanced suffix or a phase image is refused: it is not
    the contrast that its suffix names.
    """
    if name.entities.get("part", "mag") != "mag":
        raise UnknownModalityError(f"part-{name.entities['part']} is not a magnitude image")
    if name.suffix == "dwi" and name.entities.get("desc", "").lower() == "adc":
        return canonical_modality("adc")
    modality = canonical_modality(name.suffix)
    if "ce" not in name.entities or modality == "t1c":
        return modality
    if modality == "t1":
        return "t1c"
    raise UnknownModalityError(f"contrast-enhanced {name.suffix} (ce-{name.entities['ce']}) has no modality of its own")


def is_lesion_mask(name: BidsName) -> bool:
    """Return whether a derivative is a segmentation that can serve as label (brain masks cannot)."""
    kinds = {name.entities.get("desc", "").lower(), name.entities.get("label", "").lower()}
    return name.suffix in LABEL_SUFFIXES and not kinds & ANATOMICAL_MASKS


def find_scans(source: BidsSource) -> Found:
    """Return the scans, labels and phenotypes of a BIDS tree; files that cannot be used carry their reason.

    Raises FileNotFoundError when the root is not a folder.
    """
    fs, root, url = open_root(source)
    listing = {path[len(root) :].lstrip("/"): info for path, info in fs.find(root, detail=True).items()}
    tree = _Tree(url, source, listing)
    candidates = [tree.scan(name) for name in sorted(listing, key=_natural)]
    found = Found([scan for scan in candidates if scan is not None])
    if fs.exists(f"{root}/participants.tsv"):
        found.phenotypes = read_participants(storage.join(url, "participants.tsv"), source.dataset)
    return found


@dataclass(frozen=True)
class _Tree:
    url: str
    source: BidsSource
    listing: dict[str, dict[str, Any]]

    def scan(self, relative: str) -> Scan | None:
        """Return the row of one file below the root, or None for a file that is no scan."""
        parts = relative.split("/")
        name = parse_name(parts[-1])
        if parts[0].startswith("sub-") and (not is_nifti(relative) or self._is_image(parts)):
            return self._image(relative, name)
        if self.source.derivatives and relative.startswith(self.source.derivatives.rstrip("/") + "/"):
            return self._label(relative, name)
        return None

    def _is_image(self, parts: list[str]) -> bool:
        return len(parts) > 2 and parts[-2] in self.source.datatypes

    def _row(self, relative: str, name: BidsName, modality: str) -> Scan:
        # The folder decides: a file name may lack `sub-`, or contradict it.
        parts = relative.split("/")
        subject = next((part for part in parts[:-1] if part.startswith("sub-")), name.subject or parts[0])
        session = next((part for part in parts[1:-1] if part.startswith("ses-")), name.session)
        # Local modification times of a listing are rounded, so they are read again with the header.
        size, etag = (0, "") if storage.is_local(self.url) else listed_identity(self.listing[relative])
        return Scan(
            dataset=self.source.dataset,
            subject=subject,
            session=session,
            case=case_id(subject, session),
            modality=modality,
            path=storage.join(self.url, relative),
            size_bytes=size,
            etag=etag,
            label_scheme=self.source.label_scheme,
        )

    def _image(self, relative: str, name: BidsName) -> Scan | None:
        if not is_nifti(relative):
            return self._linked_folder(relative)
        try:
            modality = modality_of(name)
        except UnknownModalityError as error:
            return left_out(self._row(relative, name, name.suffix), Reason.UNKNOWN_MODALITY, f"{relative}: {error}")
        return self._inside(self._row(relative, name, modality), relative)

    def _label(self, relative: str, name: BidsName) -> Scan | None:
        if not is_nifti(relative) or not is_lesion_mask(name) or not name.subject:
            return None
        return self._inside(self._row(relative, name, LABEL), relative)

    def _linked_folder(self, relative: str) -> Scan | None:
        """A subject's folder that is a link is not followed; one that leads out of the root is reported."""
        leaf = relative.rsplit("/", 1)[-1]
        if "." in leaf:
            return None
        row = self._row(relative, BidsName({}, ""), "")
        scan = self._inside(row, relative)
        return scan if scan.status == "left out" else None

    def _inside(self, scan: Scan, relative: str) -> Scan:
        try:
            check_link(self.url, relative)
        except OutsideRootError as error:
            return left_out(scan, Reason.OUTSIDE_ROOT, str(error))
        return scan


def _natural(name: str) -> list[tuple[int, str]]:
    """Order run-2 before run-10, and dseg before mask."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
