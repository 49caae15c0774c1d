"""ROI series of ABIDE I as the Preprocessed Connectomes Project releases them, as downloaded.

    Outputs/<pipeline>/<strategy>/rois_<atlas>/<FILE_ID>_rois_<atlas>.1D     the project's own layout
    ABIDE_pcp/<pipeline>/<strategy>/<FILE_ID>_rois_<atlas>.1D                nilearn's (fetch_abide_pcp)
    Phenotypic_V1_0b_preprocessed1.csv                                       SUB_ID, FILE_ID, DX_GROUP, ...

wherever they lie below the root, or with the folders above it: the root may be `rois_<atlas>` itself. Whose series a
file holds is said by the table, whose FILE_ID is its name. Source: Craddock et al. 2013, Frontiers in Neuroinformatics
(conference abstract); preprocessed-connectomes-project.org/abide; nilearn.datasets.fetch_abide_pcp.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from infra import storage
from models.records import SERIES, Reason
from tasks.phenotype_layouts import layouts
from tasks.sources.base import Candidate, Found, Root, naming, open_root
from tasks.sources.coded import CodedTable, find_column, read_coded
from tasks.sources.named import NumberedSource

TABLE = "Phenotypic_V1_0b_preprocessed1.csv"
LAYOUT = "abide-i"
SERIES_FILE = re.compile(
    r".*/(?P<pipeline>[a-z]+)/(?P<strategy>(?:no)?filt_(?:no)?global)/(?:rois_[a-z0-9]+/)?"
    r"[^/]+_rois_(?P<atlas>[a-z0-9]+)\.1D"
)
NO_FILE = "no_filename"
"""FILE_ID of subjects without a preprocessed scan."""


class AbidePcpSource(NumberedSource):
    """ROI series and phenotypes of ABIDE I, as the Preprocessed Connectomes Project releases them."""

    kind: Literal["abide_pcp"] = "abide_pcp"
    pipeline: Literal["cpac", "ccs", "dparsf", "niak"] = Field(
        "cpac", title="Pipeline", description="Whose preprocessing: cpac, ccs, dparsf or niak."
    )
    strategy: Literal["filt_global", "filt_noglobal", "nofilt_global", "nofilt_noglobal"] = Field(
        "filt_noglobal",
        title="Strategy",
        description="filt: band-pass 0.01 to 0.1 Hz, or nofilt; global: global signal regressed out, or noglobal.",
    )
    atlas: Literal["aal", "cc200", "cc400", "dosenbach160", "ez", "ho", "tt"] = Field(
        "cc200",
        title="Atlas",
        description="Of the series: aal (116 regions), cc200, cc400, dosenbach160, ez, ho or tt.",
    )
    phenotypic: str = Field(
        TABLE,
        title="Phenotypic table",
        description="CSV with SUB_ID and FILE_ID, relative to the root (or an absolute path or URL). The default is "
        "looked for anywhere below the root.",
        min_length=1,
    )


def find_scans(source: AbidePcpSource) -> Found:
    """Return a row for every file of the pipeline, strategy and atlas, and the phenotypes.

    A file whose FILE_ID the table does not have is left out. Raises FileNotFoundError without root or table, and
    ValueError when the table lacks a column, or when there is no such file at all.
    """
    root = open_root(source, listed=True)
    links = root.links_out()
    names = _files(root, source)
    if not names and not links:
        raise ValueError(_nothing(root, source))
    table = _table(root, source)
    owners = _owners(table)
    found = [root.scan(_candidate(name, owners, table.url, source.atlas)) for name in names]
    return Found([*found, *links], table.people, len(root.listing or {}), list(table.issues))


def _releases(root: Root) -> dict[tuple[str, ...], list[str]]:
    """Return pipeline, strategy and atlas -> files below the root; the folders may lie above it."""
    there: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(root.listing or {}):
        if match := SERIES_FILE.fullmatch(f"{root.url}/{name}"):
            there.setdefault(match.group("pipeline", "strategy", "atlas"), []).append(name)
    return there


def _files(root: Root, source: AbidePcpSource) -> list[str]:
    return _releases(root).get((source.pipeline, source.strategy, source.atlas), [])


def _nothing(root: Root, source: AbidePcpSource) -> str:
    shown = "; ".join(" ".join(one) for one in sorted(_releases(root))[:8]) or "none"
    return (
        f"dataset {source.dataset}: {root.url} holds no <FILE_ID>_rois_{source.atlas}.1D of pipeline "
        f"{source.pipeline}, strategy {source.strategy}; correct `pipeline`, `strategy` or `atlas`; there are: {shown}"
    )


def _table(root: Root, source: AbidePcpSource) -> CodedTable:
    places = [name for name in root.listing or {} if name == TABLE or name.endswith(f"/{TABLE}")]
    default = source.phenotypic == TABLE and places
    url = storage.join(root.url, min(places, key=len)) if default else source.locate(source.phenotypic)
    with naming(source, "phenotypic", url):
        return read_coded(url, source.dataset, layouts()[LAYOUT], ("SUB_ID",), source.subject_of)


def _owners(table: CodedTable) -> dict[str, str]:
    """Return FILE_ID -> subject; raises ValueError without that column."""
    column = find_column(table.cells, ("FILE_ID",))
    if column is None:
        raise ValueError(f"{table.url} has no column 'FILE_ID'; its columns: {', '.join(table.cells.columns)[:300]}")
    owners: dict[str, str] = {}
    for name, subject in zip(table.cells[column], table.subjects, strict=True):
        if subject and name not in ("", NO_FILE) and owners.setdefault(name, subject) != subject:
            raise ValueError(f"{table.url}: FILE_ID {name[:80]!r} is that of {owners[name]} and {subject}; correct one")
    return owners


def _candidate(name: str, owners: dict[str, str], url: str, atlas: str) -> Candidate:
    file_id = name.rsplit("/", 1)[-1].removesuffix(f"_rois_{atlas}.1D")
    if file_id in owners:
        return Candidate(name, owners[file_id], modality=SERIES)
    table = url.rsplit("/", 1)[-1]
    problem = (Reason.UNMATCHED, f"{table} has no FILE_ID {file_id!r}, so nobody knows whose series {name} holds")
    return Candidate(name, "", modality=SERIES, problem=problem)
