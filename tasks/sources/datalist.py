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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from infra import storage
from models.records import LABEL, Reason, Scan
from tasks.headers import file_identity, stem
from tasks.phenotypes import read_participants
from tasks.sources.base import IGNORE, Candidate, Found, Root, SourceBase, naming, open_root, resolve_token

MAX_LIST_BYTES = 256 << 20
PARTICIPANTS = "participants.tsv"
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
        PARTICIPANTS,
        title="Participants",
        description="CSV, TSV or Parquet of phenotypes, relative to the root; participants.tsv may be absent, any "
        "other name may not; empty: none is read.",
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
    root = open_root(source, listed=False)
    location = source.locate(source.datalist)
    with naming(source, "datalist", location):
        size, _ = file_identity(location)
        if size > MAX_LIST_BYTES:
            raise ValueError(f"{location} has {size:,} bytes, {MAX_LIST_BYTES:,} are allowed for a datalist")
        raw = storage.read_bytes(location)
    resolver = _Resolver(root, source)
    entries = parse_datalist(raw, location)
    found = Found([scan for entry in entries for scan in resolver.scans(entry)], listed=len(root.listing or {}))
    if (table := _participants(source)) is not None:
        with naming(source, "participants", table):
            found.phenotypes = read_participants(table, source.dataset)
    return found


def _participants(source: DatalistSource) -> str | None:
    """Return the URL of the participants table, or None without one: the default name alone may be absent."""
    if not source.participants:
        return None
    url = source.locate(source.participants)
    return url if source.participants != PARTICIPANTS or storage.exists(url) else None


@dataclass(frozen=True)
class Entry:
    """One case of a datalist."""

    section: str
    images: tuple[str, ...]
    label: str


def parse_datalist(raw: bytes, origin: str, sections: Sequence[str] = SECTIONS) -> list[Entry]:
    """Return the entries of a datalist in order; raises ValueError naming file, section and position."""
    try:
        content = json.loads(raw, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError(f"{origin} is not a datalist: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from None
    if not isinstance(content, dict) or not any(section in content for section in sections):
        raise ValueError(f"{origin} has none of the lists {', '.join(sections)}; it is not a datalist")
    entries = []
    for section in sections:
        items = content.get(section, [])
        if not isinstance(items, list):
            raise ValueError(f"{origin}: {section!r} must be a list, got {type(items).__name__}")
        entries += [_parse_entry(item, section, f"{origin}: {section}[{n}]") for n, item in enumerate(items)]
    return entries


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {doubled[:80]!r} is there twice in one object")
    return found


def _parse_entry(item: Any, section: str, where: str) -> Entry:
    if isinstance(item, str):
        item = {"image": [item]}
    if not isinstance(item, dict) or "image" not in item:
        raise ValueError(f"{where} must be an object with a key 'image', got {_shown(item)}")
    images = [item["image"]] if isinstance(item["image"], str) else item["image"]
    label = item.get("label") or ""
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}.image must be a list of paths, got {_shown_list(images)}")
    if not isinstance(label, str):
        raise ValueError(f"{where}.label must be one path, got {_shown(label)}")
    return Entry(section, tuple(images), label)


def _shown(value: Any) -> str:
    """Return the start of a value; a deeply nested one is not walked through."""
    return repr(value)[:80] if isinstance(value, str | int | float | None) else type(value).__name__


def _shown_list(images: Any) -> str:
    if not isinstance(images, list):
        return _shown(images)
    return (
        f"a list with {next(_shown(one) for one in images if not isinstance(one, str))}" if images else "an empty list"
    )


@dataclass(frozen=True)
class _Resolver:
    root: Root
    source: DatalistSource

    def scans(self, entry: Entry) -> list[Scan]:
        images = [scan for path in entry.images if (scan := self._image(path, entry.section)) is not None]
        if not entry.label:
            return images
        # The list ties the label to the case, whatever the label file is called.
        owner = parse_name(entry.images[0])
        label = Candidate(entry.label, owner.subject, owner.session, LABEL, split=entry.section)
        return [*images, self.root.scan(label)]

    def _image(self, path: str, section: str) -> Scan | None:
        name = parse_name(path)
        modality, problem = self._modality(name.token, path)
        if modality == IGNORE and problem is None:
            return None
        return self.root.scan(Candidate(path, name.subject, name.session, modality, problem, section))

    def _modality(self, token: str, path: str) -> tuple[str, tuple[Reason, str] | None]:
        if self.source.tokens and token not in self.source.tokens:
            known = ", ".join(self.source.tokens)
            text = f"{path}: token {token!r} is not among the tokens of {self.source.dataset}: {known}"
            return token, (Reason.UNKNOWN_MODALITY, text)
        return resolve_token(self.source, token, path)
