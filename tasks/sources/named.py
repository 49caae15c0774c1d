"""How sources call their subjects: by the names of files and folders, or by numbers; the participants beside them."""

from __future__ import annotations

import re

import pandas as pd
from pydantic import Field, field_validator

from models.records import Scan
from tasks.phenotypes import read_participants
from tasks.sources.base import Root, SourceBase, naming
from tasks.sources.names import shorten

BIDS_NAME = re.compile(r"(?P<subject>sub-[a-zA-Z0-9]+)(?:_(?P<session>ses-[a-zA-Z0-9]+))?(?:[_.].*)?")
PARTICIPANTS = "participants.tsv"


class NamedSource(SourceBase):
    """What sources share whose files or folders bear the subject in their names."""

    owner: str = Field(
        "",
        title="Owner",
        description="Regular expression with the named groups subject and, where there are sessions, session, matched "
        "against the whole name. Empty: sub-X or sub-X_ses-Y at its begin, else the whole name is the subject.",
        examples=[r"(?P<subject>IXI\d+)-.*"],
    )

    @field_validator("owner")
    @classmethod
    def _expression(cls, owner: str) -> str:
        try:
            groups = set(re.compile(owner).groupindex)
        except re.error as error:
            raise ValueError(f"{owner!r} is no regular expression: {error}") from None
        if owner and ("subject" not in groups or groups - {"subject", "session"}):
            raise ValueError(f"{owner!r} has the groups {', '.join(sorted(groups)) or 'none'}; use subject and session")
        return owner

    def owner_of(self, name: str) -> tuple[str, str] | None:
        """Return (subject, session) of a name, or None when it does not match `owner`."""
        match = re.fullmatch(self.owner, name) if self.owner else BIDS_NAME.fullmatch(name)
        if match is None:
            return None if self.owner else (name, "")
        if not match["subject"]:
            return None
        return match["subject"], match.groupdict().get("session") or ""


class ParticipantsSource(NamedSource):
    """Beside them may lie a participants table."""

    participants: str = Field(
        PARTICIPANTS,
        title="Participants",
        description="CSV, TSV or Parquet of phenotypes, relative to the root; participants.tsv may be absent, any "
        "other name may not; empty: none is read.",
    )

    def read_people(self, root: Root, scans: list[Scan]) -> pd.DataFrame:
        """Return the participants table; its subjects get the prefix `sub-` when those of the scans have it.

        Raises FileNotFoundError when the table is named and not there, ValueError for a malformed one.
        """
        known = self.participants in (root.listing or {})
        if not self.participants or (self.participants == PARTICIPANTS and not known):
            return pd.DataFrame()
        table = self.locate(self.participants)
        prefix = "sub-" if any(scan.subject.startswith("sub-") for scan in scans) else ""
        with naming(self, "participants", table):
            return read_participants(table, self.dataset, subject_prefix=prefix)


class NumberedSource(SourceBase):
    """What sources share whose subjects have numbers."""

    subject_name: str = Field(
        "{id}",
        title="Subject name",
        description="What subjects are called in the catalog, with the field {id}: sub-{id} joins the series with the "
        "T1s of a BIDS tree of the same dataset.",
        examples=["sub-00{id}"],
    )

    @field_validator("subject_name")
    @classmethod
    def _one_field(cls, name: str) -> str:
        if name.count("{id}") != 1:
            raise ValueError(f"subject_name {name!r} must hold the field {{id}} once")
        return name

    def subject_of(self, cell: str, digits: int = 1) -> str:
        """Return the subject with a number, as the catalog calls it, with at least so many digits; empty: nobody.

        Leading zeros do not count: files say `0050003` where tables say `50003`. Raises ValueError for another id.
        """
        if not cell:
            return ""
        if not cell.isascii() or not cell.isdecimal():
            raise ValueError(f"the subject is {shorten(cell, 40)!r}; a number is expected")
        return self.subject_name.replace("{id}", cell.lstrip("0").zfill(digits))
