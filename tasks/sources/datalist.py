"""Scans of a MONAI-style datalist: `{"training": [{"image": [...], "label": ...}], "validation": [...]}`.

The schema is that of BrainMVP's lists: every entry is one case, its paths are relative to the root. A file is named
`<case><sep><token>.nii.gz` with `-`, `_` or `|` as separator; the last piece is the modality token, the rest the case.
Without a rest (`case7/T1.nii.gz`) the folder names the case. A time point at the end of the case is the session:

    BraTS2021_00000_flair         -> subject BraTS2021_00000
    BraTS-GLI-00001-000-t1ce      -> subject BraTS-GLI-00001, session 000
    UCSF-PDGM-0429_FU003d_FLAIR   -> subject UCSF-PDGM-0429, session FU003d
    sub-strokecase0001_ses-0001_adc -> subject sub-strokecase0001, session ses-0001
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from infra import storage
from models.records import Reason, Scan, UnknownModalityError, canonical_modality
from tasks.headers import stem
from tasks.phenotypes import read_participants
from tasks.sources.base import (
    LABEL,
    Found,
    OutsideRootError,
    SourceBase,
    case_id,
    check_link,
    check_relative,
    left_out,
    open_root,
)

SECTIONS = ("training", "validation", "test")
NAME = re.compile(r"^(?:(?P<case>.*)[-_|])?(?P<token>[^-_|]*)$", re.DOTALL)
SESSIONS = (
    re.compile(r"^(?P<subject>BraTS-[A-Za-z]+-\d+)-(?P<session>\d{3})$"),
    re.compile(r"^(?P<subject>.+)[-_](?P<session>FU\d+d)$"),
    re.compile(r"^(?P<subject>sub-[A-Za-z0-9]+)_(?P<session>ses-[A-Za-z0-9]+)$"),
)
"""How known datasets write a time point; the rest of the case name is the subject."""


class DatalistSource(SourceBase):
    """A dataset described by a JSON list of cases."""

    kind: Literal["datalist"] = "datalist"
    datalist: str = Field(
        "dataset.json",
        title="Datalist",
        description="JSON list of cases, relative to the root (or an absolute path or URL).",
        examples=["BraTS2021.json"],
        min_length=1,
    )
    tokens: tuple[str, ...] = Field(
        (),
        title="Modality tokens",
        description="File-name tokens that this dataset uses; any other is reported. Empty: all known tokens.",
        examples=[["flair", "t1", "t1ce", "t2"]],
    )
    participants: str = Field(
        "participants.tsv",
        title="Participants",
        description="TSV or CSV of phenotypes, relative to the root; may be absent.",
    )


@dataclass(frozen=True)
class ImageName:
    """A file name taken apart into case and modality token."""

    subject: str
    session: str
    token: str


def parse_name(relative: str) -> ImageName:
    """Take a path apart, e.g. `a/BraTS-GLI-00001-000-t1ce.nii.gz` -> BraTS-GLI-00001, 000, t1ce."""
    base = stem(relative)
    match = NAME.match(base)
    prefix, token = (match["case"], match["token"]) if match else ("", base)
    folder = relative.rsplit("/", 2)[-2] if "/" in relative else ""
    subject, session = split_session(prefix or folder or base)
    return ImageName(subject, session, token)


def split_session(case: str) -> tuple[str, str]:
    """Return (subject, session) of a case name; the session is empty when no known pattern ends the name."""
    for pattern in SESSIONS:
        if match := pattern.match(case):
            return match["subject"], match["session"]
    return case, ""


def find_scans(source: DatalistSource) -> Found:
    """Return the scans, labels and phenotypes that a datalist names; files that cannot be used carry their reason.

    Raises FileNotFoundError without root or list, ValueError when the list does not follow the schema.
    """
    fs, root, url = open_root(source)
    location = source.datalist
    if not ("://" in location or location.startswith("/")):
        location = storage.join(url, location)
    entries = parse_datalist(storage.read_bytes(location), location)
    resolver = _Resolver(url, source)
    found = Found([scan for entry in entries for scan in resolver.scans(entry)])
    if source.participants and fs.exists(f"{root}/{source.participants}"):
        found.phenotypes = read_participants(storage.join(url, source.participants), source.dataset)
    return found


@dataclass(frozen=True)
class Entry:
    """One case of a datalist."""

    section: str
    images: tuple[str, ...]
    label: str


def parse_datalist(raw: bytes, origin: str) -> list[Entry]:
    """Return the entries of a datalist in order; raises ValueError naming file, section and position."""
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from None
    if not isinstance(content, dict) or not any(section in content for section in SECTIONS):
        raise ValueError(f"{origin} has none of the lists {', '.join(SECTIONS)}; it is not a datalist")
    entries = []
    for section in SECTIONS:
        items = content.get(section, [])
        if not isinstance(items, list):
            raise ValueError(f"{origin}: {section!r} must be a list, got {type(items).__name__}")
        entries += [_parse_entry(item, section, f"{origin}: {section}[{n}]") for n, item in enumerate(items)]
    return entries


def _parse_entry(item: Any, section: str, where: str) -> Entry:
    if isinstance(item, str):
        item = {"image": [item]}
    if not isinstance(item, dict) or "image" not in item:
        raise ValueError(f"{where} must be an object with a key 'image', got {str(item)[:80]!r}")
    images = [item["image"]] if isinstance(item["image"], str) else item["image"]
    label = item.get("label") or ""
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}.image must be a list of paths, got {str(images)[:80]!r}")
    if not isinstance(label, str):
        raise ValueError(f"{where}.label must be one path, got {str(label)[:80]!r}")
    return Entry(section, tuple(images), label)


@dataclass(frozen=True)
class _Resolver:
    url: str
    source: DatalistSource

    def scans(self, entry: Entry) -> list[Scan]:
        images = [self._image(path, entry.section) for path in entry.images]
        if not entry.label:
            return images
        # The list ties the label to the case, whatever the label file is called.
        owner = images[0]
        name = ImageName(owner.subject, owner.session, LABEL)
        return [*images, self._checked(entry.label, name, LABEL, entry.section)]

    def _image(self, path: str, section: str) -> Scan:
        name = parse_name(path)
        try:
            return self._checked(path, name, self._modality(name.token), section)
        except UnknownModalityError as error:
            row = self._row(path, name, name.token, section)
            return left_out(row, Reason.UNKNOWN_MODALITY, f"{path}: {error}")

    def _modality(self, token: str) -> str:
        if self.source.tokens and token not in self.source.tokens:
            raise UnknownModalityError(
                f"token {token!r} is not among the tokens of {self.source.dataset}: {', '.join(self.source.tokens)}"
            )
        return canonical_modality(token)

    def _checked(self, path: str, name: ImageName, modality: str, section: str) -> Scan:
        try:
            relative = check_relative(path)
            check_link(self.url, relative)
        except OutsideRootError as error:
            return left_out(self._row(path, name, modality, section), Reason.OUTSIDE_ROOT, str(error))
        return self._row(storage.join(self.url, relative), name, modality, section)

    def _row(self, path: str, name: ImageName, modality: str, section: str) -> Scan:
        return Scan(
            dataset=self.source.dataset,
            subject=name.subject,
            session=name.session,
            case=case_id(name.subject, name.session),
            modality=modality,
            path=path,
            label_scheme=self.source.label_scheme,
            split=section,
        )
