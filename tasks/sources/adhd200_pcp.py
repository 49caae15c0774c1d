"""ROI series of ADHD-200 by the Athena pipeline of the Preprocessed Connectomes Project, as downloaded.

    <site>/<subject>/sfnwmrda<subject>_session_<n>_rest_<n>_<atlas>_TCs.1D     band-pass filtered
    <site>/<subject>/snwmrda<subject>_session_<n>_rest_<n>_<atlas>_TCs.1D      not filtered
    adhd200_preprocessed_phenotypics.tsv, <site>/<site>_phenotypic.csv         ScanDir ID, DX, Age, Gender, Site, ...

wherever they lie below the root. Files write a subject with seven digits (`0010001`), tables without the leading zeros
(`10001`): seven digits are the subject. Layout and names as several public programs read them; the release needs a
login, so nobody has compared it here. Source: Bellec et al. 2017, NeuroImage 144:275-286.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from infra import storage
from models.records import SERIES, Reason
from tasks.phenotype_layouts import layouts
from tasks.phenotypes import combine
from tasks.sources.base import Candidate, Found, Root, naming, open_root
from tasks.sources.coded import CodedTable, read_coded
from tasks.sources.named import NumberedSource

TABLE = "adhd200_preprocessed_phenotypics.tsv"
SITE_TABLES = "_phenotypic.csv"
LAYOUT = "adhd-200"
DIGITS = 7
SERIES_FILE = re.compile(
    r"(?:.*/)?s(?P<filtered>f?)nwmrda(?P<subject>[0-9]+)_session_(?P<session>[0-9]+)_rest_(?P<rest>[0-9]+)_"
    r"(?P<atlas>[a-z0-9]+)_TCs\.1D"
)


class Adhd200PcpSource(NumberedSource):
    """ROI series and phenotypes of ADHD-200 by the Athena pipeline."""

    kind: Literal["adhd200_pcp"] = "adhd200_pcp"
    filtered: bool = Field(
        True, title="Filtered", description="Read the band-pass filtered series (sfnwmrda*), or else snwmrda*."
    )
    atlas: str = Field(
        "cc200",
        title="Atlas",
        description="Of the series, as their names have it: aal, cc200, cc400, ez, ho or tt.",
        pattern=r"^[a-z0-9]+$",
    )
    phenotypic: str = Field(
        "",
        title="Phenotypic table",
        description="TSV or CSV with ScanDir ID, relative to the root (or an absolute path or URL). Empty: "
        f"{TABLE} at the root, or else every *{SITE_TABLES} below it.",
    )


def find_scans(source: Adhd200PcpSource) -> Found:
    """Return the first session and run of every subject, a row for the others with that reason, and the phenotypes.

    Raises FileNotFoundError without root or a table that the config names, and ValueError when a table has no column
    of subjects, or when there is no such file at all.
    """
    root = open_root(source, listed=True)
    links = root.links_out()
    matches = [match for name in root.listing or {} if (match := SERIES_FILE.fullmatch(name))]
    wanted = [one for one in matches if (bool(one["filtered"]), one["atlas"]) == (source.filtered, source.atlas)]
    if not wanted and not links:
        raise ValueError(_nothing(root, source, matches))
    first: dict[str, re.Match[str]] = {}
    scans = []
    for match in sorted(wanted, key=lambda one: (int(one["session"]), int(one["rest"]), one[0])):
        subject = source.subject_of(match["subject"], DIGITS)
        scans.append(root.scan(_candidate(match, subject, first.setdefault(subject, match))))
    tables = _tables(root, source)
    people = combine([table.people for table in tables])
    issues = [issue for table in tables for issue in table.issues]
    return Found([*scans, *links], people, len(root.listing or {}), issues)


def _nothing(root: Root, source: Adhd200PcpSource, others: list[re.Match[str]]) -> str:
    there = sorted({f"s{one['filtered']}nwmrda*_{one['atlas']}_TCs.1D" for one in others})
    kind = "sfnwmrda" if source.filtered else "snwmrda"
    return (
        f"dataset {source.dataset}: {root.url} holds no {kind}*_session_*_rest_*_{source.atlas}_TCs.1D; correct "
        f"`atlas` or `filtered`; there are: {', '.join(there[:8]) or 'none'}"
    )


def _candidate(match: re.Match[str], subject: str, first: re.Match[str]) -> Candidate:
    if match is first:
        return Candidate(match[0], subject, modality=SERIES)
    problem = (Reason.OTHER_RUN, f"{match[0]}: the first run of {subject} is {first[0].rsplit('/', 1)[-1]}")
    return Candidate(match[0], subject, modality=SERIES, problem=problem)


def _tables(root: Root, source: Adhd200PcpSource) -> list[CodedTable]:
    listing = root.listing or {}
    if source.phenotypic:
        urls = [source.locate(source.phenotypic)]
    elif TABLE in listing:
        urls = [storage.join(root.url, TABLE)]
    else:
        urls = [storage.join(root.url, name) for name in sorted(listing) if name.endswith(SITE_TABLES)]
    return [_read(source, url) for url in urls]


def _read(source: Adhd200PcpSource, url: str) -> CodedTable:
    layout, columns = layouts()[LAYOUT], ("ScanDir ID",)
    with naming(source, "phenotypic", url):
        return read_coded(url, source.dataset, layout, columns, lambda cell: source.subject_of(cell, DIGITS))
