"""Text files with ROI series, one a subject or session, wherever they lie below a root.

    <name>.1D, .csv, .tsv or .txt          whose series it is, `owner` says of the name without its ending
    {subject}/{session}/rois_cc200.1D      or a pattern of paths as that of a tree

Which atlas they follow is said by the preprocessing spec, and checked when they are read.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from models.records import SERIES, Reason, Scan
from tasks.sources.base import Candidate, Found, Root, open_root
from tasks.sources.named import ParticipantsSource
from tasks.sources.tree import compile_template

ENDING = re.compile(r"\.(?:1[dD]|csv|tsv|txt)$")


class RoiSeriesSource(ParticipantsSource):
    """A folder of text files with ROI series; gives series alone, no images."""

    kind: Literal["roi_series"] = "roi_series"
    pattern: str = Field(
        "",
        title="Pattern",
        description="Paths below the root that are wanted, with the fields {subject} and {session} and * ? ** as in a "
        "shell; without the field subject, `owner` says whose they are. Empty: every .1D, .csv, .tsv and .txt.",
        examples=["{subject}/{session}/*_cc200.1D", "**/*_cc200.1D"],
    )

    @field_validator("pattern")
    @classmethod
    def _fields(cls, pattern: str) -> str:
        groups = set(compile_template(pattern).groupindex)
        if strange := sorted(groups - {"subject", "session"}):
            raise ValueError(f"pattern {pattern!r} has the field {strange[0]}; use subject and session")
        if groups == {"session"}:
            raise ValueError(f"pattern {pattern!r} has a field for the session and none for the subject")
        return pattern


def find_scans(source: RoiSeriesSource) -> Found:
    """Return a row for every wanted file, and the participants; files that cannot be used carry their reason.

    Raises FileNotFoundError when the root is not a folder or lacks the table that the config names.
    """
    root = open_root(source, listed=True)
    listing = root.listing or {}
    wanted = compile_template(source.pattern or "**")
    tables = {source.locate(name) for name in (source.participants, *(one.path for one in source.phenotypes)) if name}
    found = []
    for name in sorted(listing):
        match = wanted.fullmatch(name)
        hidden = "/." in f"/{name}"
        if match and ENDING.search(name) and not hidden and source.locate(name) not in tables:
            found.append(_scan(root, source, name, match))
    return Found([*found, *root.links_out()], source.read_people(root, found), len(listing))


def _scan(root: Root, source: RoiSeriesSource, relative: str, match: re.Match[str]) -> Scan:
    fields = match.groupdict()
    if fields.get("subject"):
        return root.scan(Candidate(relative, fields["subject"], fields.get("session") or "", SERIES))
    name = ENDING.sub("", relative.rsplit("/", 1)[-1])
    owner = source.owner_of(name)
    problem = None if owner else (Reason.UNMATCHED, f"{name!r} of {relative} does not match `owner` {source.owner!r}")
    subject, session = owner or ("", "")
    return root.scan(Candidate(relative, subject, session, SERIES, problem))
