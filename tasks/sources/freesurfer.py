"""Regional descriptors of FreeSurfer subjects: `<subject>/stats/{lh,rh}.aparc.stats` (or `aparc.a2009s.stats`).

Columns are found by the names and units that the files give themselves. Joined by subject and session with the images
of another source of the same dataset (a CAT12 folder, a BIDS tree).
"""

from __future__ import annotations

import re
from typing import Literal

from models.anatomy import ATLASES, HEMISPHERES, Atlas, DescriptorError, canonical_region
from models.reasons import Reason
from models.records import DESCRIPTORS, DescriptorTable
from tasks.sources.base import Candidate, Found, Root, open_root
from tasks.sources.named import NamedSource
from tasks.sources.regional import Regional, RegionalSource, convert, located, read_small, table_of

FILES: dict[Atlas, str] = {"desikan_killiany": "aparc.stats", "destrieux": "aparc.a2009s.stats"}
COLUMNS: dict[str, str] = {
    "cortical_thickness_mm": "ThickAvg",
    "grey_matter_volume_mm3": "GrayVol",
    "surface_area_mm2": "SurfArea",
}
"""Measure -> column of the table."""
UNITS: dict[str, tuple[str, ...]] = {
    "cortical_thickness_mm": ("mm",),
    # Early versions of FreeSurfer called cubic millimetres `mm` here; plausible values tell.
    "grey_matter_volume_mm3": ("mm^3", "mm"),
    "surface_area_mm2": ("mm^2",),
}
TEMPLATES = re.compile(r"fsaverage\w*|[lr]h\.EC_average")
"""Folders of a subjects' directory that are no subjects."""


class FreeSurferSource(RegionalSource, NamedSource):
    """A folder of FreeSurfer subjects; gives descriptors alone, no images."""

    kind: Literal["freesurfer"] = "freesurfer"


def find_scans(source: FreeSurferSource, workspace: str) -> Found:
    """Return a row of descriptors for every subject folder; those that cannot be used carry their reason.

    Raises FileNotFoundError when the root is not a folder.
    """
    root = open_root(source, listed=True)
    listing = root.listing or {}
    pattern = re.compile(rf"(?:.*/)?(?P<folder>[^/]+)/stats/(?P<side>lh|rh)\.{re.escape(FILES[source.atlas])}")
    folders: dict[str, str] = {}
    for name in sorted(listing):
        match = pattern.fullmatch(name)
        if match and not TEMPLATES.fullmatch(match["folder"]):
            folders.setdefault(name[: match.start("side")], match["folder"])
    cases = [_case(root, source, place, folder) for place, folder in folders.items()]
    return Found(convert(root, cases, workspace), listed=len(listing))


def _case(root: Root, source: FreeSurferSource, place: str, folder: str) -> Regional:
    paths = [f"{place}{side}.{FILES[source.atlas]}" for side in HEMISPHERES]
    owner = source.owner_of(folder)
    problem = None if owner else (Reason.UNMATCHED, f"folder {folder!r} does not match `owner` {source.owner!r}")
    subject, session = owner or ("", "")
    absent = [path for path in paths if path not in (root.listing or {})]
    if absent:
        there = next(path for path in paths if path not in absent)
        detail = f"{there} is there and {absent[0].rsplit('/', 1)[-1]} is not; run recon-all for both hemispheres"
        problem, paths = problem or (Reason.ONE_HEMISPHERE, detail), [there]
    files = tuple(Candidate(path, subject, session, DESCRIPTORS, problem) for path in paths)
    return Regional(files, lambda: read_pair(root, source, paths))


def read_pair(root: Root, source: FreeSurferSource, paths: list[str]) -> DescriptorTable:
    """Return the descriptors of both hemispheres; raises DescriptorError, FileNotFoundError or OSError."""
    found: dict[str, dict[str, float]] = {measure: {} for measure in COLUMNS}
    for side, path in zip(HEMISPHERES, paths, strict=True):
        with located(path):
            part = parse_stats(read_small(root, path), source.atlas, side)
        for measure, values in part.items():
            found[measure] |= values
    rows = {m: [row.get(region) for region in ATLASES[source.atlas]] for m, row in found.items()}
    with located(f"{paths[0]} and its partner"):
        return table_of(source, "freesurfer", rows, paths)


def parse_stats(raw: bytes, atlas: Atlas, hemisphere: str) -> dict[str, dict[str, float]]:
    """Return measure -> region -> value of one `?h.aparc*.stats`, as mris_anatomical_stats writes it.

    Raises DescriptorError: another hemisphere, a missing column or unit, a foreign unit, an unknown or repeated region,
    a row of more or fewer cells than there are columns, a cell that is no number.
    """
    try:
        lines = raw.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DescriptorError(Reason.UNREADABLE, f"it is no text: byte {error.start} is not UTF-8") from None
    notes = [line[1:].split() for line in lines if line.startswith("#")]
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    said = next((words[1] for words in notes if words[:1] == ["hemi"] and len(words) > 1), hemisphere)
    if said != hemisphere:
        raise DescriptorError(Reason.ONE_HEMISPHERE, f"it says hemi {said}, its name says {hemisphere}")
    names = _names(notes)
    columns = _columns(notes, names)
    found: dict[str, dict[str, float]] = {measure: {} for measure in COLUMNS}
    for row in rows:
        region = canonical_region(row[0], atlas, hemisphere)
        if len(row) != len(names):
            raise DescriptorError(
                Reason.DESCRIPTOR_VALUES, f"the row of {row[0]} has {len(row)} cells, ColHeaders names {len(names)}"
            )
        for measure, place in columns.items() if region else ():
            if region in found[measure]:
                raise DescriptorError(Reason.DESCRIPTOR_REGIONS, f"region {row[0]} comes twice")
            found[measure][region] = _number(row, place, COLUMNS[measure])
    return found


def _names(notes: list[list[str]]) -> list[str]:
    """Return the names of the columns, from the `ColHeaders` line."""
    return next((words[1:] for words in notes if words[:1] == ["ColHeaders"]), [])


def _columns(notes: list[list[str]], names: list[str]) -> dict[str, int]:
    """Return measure -> index in a row, with the units of the `TableCol` lines."""
    said: dict[tuple[str, str], str] = {
        (words[1], words[2]): " ".join(words[3:]) for words in notes if words[:1] == ["TableCol"] and len(words) > 3
    }
    units = {said[number, "ColHeader"]: said.get((number, "Units"), "") for number, key in said if key == "ColHeader"}
    columns = {}
    for measure, name in COLUMNS.items():
        if name not in names:
            raise DescriptorError(
                Reason.DESCRIPTOR_MEASURES, f"no column {name}; its columns: {' '.join(names)[:200] or 'none'}"
            )
        if units.get(name, "") not in UNITS[measure]:
            raise DescriptorError(
                Reason.DESCRIPTOR_UNITS,
                f"column {name} is in {units.get(name) or 'no unit'}, {UNITS[measure][0]} is expected",
            )
        columns[measure] = names.index(name)
    return columns


def _number(row: list[str], place: int, column: str) -> float:
    try:
        return float(row[place])
    except ValueError:
        raise DescriptorError(
            Reason.DESCRIPTOR_VALUES, f"{column} of {row[0]} is {row[place][:40]!r}, a number is expected"
        ) from None
