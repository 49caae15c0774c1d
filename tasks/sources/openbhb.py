"""The release of OpenBHB: CAT12 grey-matter maps and FreeSurfer regions as `.npy`, participants.tsv, resources.json.

    participants.tsv, resource/resources.json
    .../sub-<id>_preproc-cat12vbm_desc-gm_T1w.npy           (1, 121, 145, 121) -> modality gm
    .../sub-<id>_preproc-freesurfer_desc-desikan_ROI.npy    (1, 7, 68) or destrieux (1, 7, 148) -> descriptors

wherever they lie below the root (`train/derivatives/sub-*/ses-1/`, `data/`). Which channel of an array is which measure
and which column which region is read from resources.json, by name. Source: Dufumier et al. 2022, NeuroImage 263.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from infra import storage
from models.anatomy import ATLASES, Atlas, Basis, DescriptorError, canonical_region
from models.reasons import Reason
from models.records import DESCRIPTORS, DescriptorTable, Scan
from tasks.affines import BadScanError
from tasks.array_headers import array_header
from tasks.overlap import ALSO_IN, STUDIES, UNKNOWN
from tasks.phenotypes import read_participants
from tasks.sources.base import Candidate, Found, Root, naming, open_root
from tasks.sources.regional import Regional, RegionalSource, convert, located, read_small, table_of

NAME = re.compile(
    r"(?:.*/)?(?P<subject>sub-[a-zA-Z0-9]+)(?:_ses-[a-zA-Z0-9]+)?_preproc-"
    r"(?:cat12vbm_desc-gm_T1w|freesurfer_desc-(?P<atlas>desikan|destrieux)_ROI)\.npy"
)
ATLAS_KEYS: dict[Atlas, str] = {"desikan_killiany": "desikan", "destrieux": "destrieux"}
CHANNELS: dict[str, str] = {
    "cortical_thickness_mm": "average_thickness_mm",
    "grey_matter_volume_mm3": "gray_matter_volume_mm^3",
    "surface_area_mm2": "surface_area_mm^2",
}
"""Measure -> channel in resources.json."""
SPLITS = {"train": "training", "internal_test": "validation", "external_test": "validation", "val": "validation"}


class OpenBhbSource(RegionalSource):
    """The OpenBHB release as it is published."""

    kind: Literal["openbhb"] = "openbhb"
    descriptors: bool = Field(
        True, title="Descriptors", description="Read the regions of FreeSurfer too; they need resources.json."
    )
    resources: str = Field(
        "resource/resources.json", title="Resources", description="Names of channels and regions.", min_length=1
    )
    participants: str = Field(
        "participants.tsv", title="Participants", description="Table of the subjects with age, study and split.",
        min_length=1,
    )  # fmt: skip
    studies: dict[str, str] = Field(
        default_factory=dict,
        title="Studies",
        description="Value of the column `study` -> dataset whose subjects these are. The published table has numbers "
        "there; without their meaning every subject may be one of any of OpenBHB's ten studies. Names are known.",
        examples=[{"1": "abide-i", "2": "abide-ii"}],
    )
    exclude: tuple[str, ...] = Field(
        (),
        title="Exclude",
        description="Datasets (see studies) whose subjects are not listed, so that benchmarks on them stay clean.",
        examples=[["abide-i"]],
    )

    @property
    def layout(self) -> tuple[Atlas, Basis] | None:
        """Atlas and basis of the descriptors, or None without."""
        return (self.atlas, "freesurfer") if self.descriptors else None


def find_scans(source: OpenBhbSource, workspace: str) -> Found:
    """Return maps, descriptors and phenotypes of the release; files that cannot be used carry their reason.

    Raises FileNotFoundError without root, participants or resources, and ValueError when resources.json lacks a measure
    or region, or when subjects are to be excluded and the study of any is not known.
    """
    root = open_root(source, listed=True)
    listing = root.listing or {}
    table = source.locate(source.participants)
    with naming(source, "participants", table):
        people = with_origin(read_participants(table, source.dataset, subject_prefix="sub-"), source, table)
    release = _Release(root, source, people)
    matches = [(name, match) for name in sorted(listing) if (match := NAME.fullmatch(name))]
    if source.exclude:
        _check_known({match["subject"] for _, match in matches}, source, set(people["subject"]), table)
    matches = [(name, match) for name, match in matches if match["subject"] not in release.excluded]
    images = [release.image(name, match["subject"]) for name, match in matches if match["atlas"] is None]
    key = ATLAS_KEYS[source.atlas] if source.descriptors else ""
    arrays = [(name, match["subject"]) for name, match in matches if match["atlas"] == key]
    rows: list[Scan] = []
    if arrays:
        order = read_resources(source)
        rows = convert(root, [release.regions(name, subject, order) for name, subject in arrays], workspace)
    kept = people[~people["subject"].isin(release.excluded)].reset_index(drop=True)
    return Found([*images, *rows], kept, len(listing))


def _check_known(subjects: set[str], source: OpenBhbSource, known: set[str], origin: str) -> None:
    if strangers := sorted(subjects - known):
        raise ValueError(
            f"dataset {source.dataset}: subjects of {', '.join(source.exclude)} are to be excluded, but {origin} does "
            f"not name {strangers[0]} ({len(strangers)} such), so its study is unknown; add it there or take its files "
            "away"
        )


def with_origin(people: pd.DataFrame, source: OpenBhbSource, origin: str) -> pd.DataFrame:
    """Return the phenotypes with the column `also_in`: the dataset that holds the same people under their own ids.

    Raises ValueError without a column `study`, and when some are to be excluded: for an unknown study, and for a
    dataset that nobody comes from.
    """
    if "study" not in people:
        raise ValueError(f"{origin} has no column 'study', which says what the subjects are part of")
    said = [_text(value) for value in people["study"]]
    known = {**STUDIES, **{_plain(name): dataset for name, dataset in source.studies.items()}}
    homes = [known.get(_plain(study), UNKNOWN) for study in said]
    if source.exclude and UNKNOWN in homes:
        unknown = sorted({study for study, home in zip(said, homes, strict=True) if home == UNKNOWN})
        raise ValueError(
            f"dataset {source.dataset}: subjects of {', '.join(source.exclude)} are to be excluded, but {origin} has "
            f"the studies {', '.join(unknown[:12])}, which `studies` does not explain; name their datasets there"
        )
    if absent := [name for name in source.exclude if name not in homes]:
        raise ValueError(
            f"dataset {source.dataset}: `exclude` names {absent[0]!r}, which no subject of {origin} comes from; there "
            f"are {', '.join(sorted(set(homes)))}; correct `exclude` or `studies`"
        )
    return people.assign(study=said, **{ALSO_IN: homes})


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class _Release:
    root: Root
    source: OpenBhbSource
    people: pd.DataFrame

    @cached_property
    def excluded(self) -> set[str]:
        """Subjects that are not wanted."""
        return set(self.people.loc[self.people[ALSO_IN].isin(self.source.exclude), "subject"])

    @cached_property
    def splits(self) -> dict[str, str]:
        """By subject, as the table says."""
        if "split" not in self.people:
            return {}
        said = zip(self.people["subject"], self.people["split"], strict=True)
        return {subject: SPLITS[split] for subject, split in said if split in SPLITS}

    def image(self, name: str, subject: str) -> Scan:
        return self.root.scan(self._named(name, subject, "gm"))

    def regions(self, name: str, subject: str, order: ArrayOrder) -> Regional:
        owner = self._named(name, subject, DESCRIPTORS)
        return Regional((owner,), lambda: read_regions(self.root, name, self.source, order))

    def _named(self, name: str, subject: str, modality: str) -> Candidate:
        split = self.splits.get(subject) or SPLITS.get(name.split("/", 1)[0], "")
        return Candidate(name, subject, modality=modality, split=split)


@dataclass(frozen=True)
class ArrayOrder:
    """Where the measures and regions of an atlas lie in OpenBHB's arrays."""

    shape: tuple[int, int]
    """Channels and regions."""
    channels: dict[str, int]
    """Measure -> channel."""
    regions: tuple[int, ...]
    """For each region of the atlas, in its order: column."""


def read_resources(source: OpenBhbSource) -> ArrayOrder:
    """Return what resources.json says of the arrays of the source's atlas, by name.

    Raises FileNotFoundError without the file, ValueError when it lacks a measure or a region.
    """
    url = source.locate(source.resources)
    with naming(source, "resources", url):
        try:
            content = json.loads(storage.read_bytes(url))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{url} is no JSON: {error}") from None
    key = f"{ATLAS_KEYS[source.atlas]}_roi"
    entry = content.get(key) if isinstance(content, dict) else None
    channels, features = (_names(entry, name) for name in ("channels", "features"))
    if not channels or not features:
        raise ValueError(f"{url} has no entry {key!r} with lists of `channels` and `features`")
    if missing := [name for name in CHANNELS.values() if channels.count(name) != 1]:
        raise ValueError(
            f"{url}: {key} has no channel {missing[0]!r} of its own; its channels: {', '.join(channels)[:300]}"
        )
    return ArrayOrder(
        (len(channels), len(features)),
        {measure: channels.index(name) for measure, name in CHANNELS.items()},
        _region_order(features, source.atlas, f"{url}: {key}"),
    )


def _names(entry: Any, key: str) -> list[str]:
    names = entry.get(key) if isinstance(entry, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _region_order(features: list[str], atlas: Atlas, where: str) -> tuple[int, ...]:
    try:
        found = [canonical_region(name, atlas) for name in features]
    except DescriptorError as error:
        raise ValueError(f"{where}: {error}") from None
    if bad := [name for name in ATLASES[atlas] if found.count(name) != 1]:
        raise ValueError(f"{where}: region {bad[0]} comes {found.count(bad[0])} times, once is expected")
    return tuple(found.index(name) for name in ATLASES[atlas])


def read_regions(root: Root, relative: str, source: OpenBhbSource, order: ArrayOrder) -> DescriptorTable:
    """Return the descriptors of one array; raises DescriptorError, FileNotFoundError or OSError."""
    name = relative.rsplit("/", 1)[-1]
    raw = read_small(root, relative)
    try:
        header = array_header(raw, name)
    except BadScanError as error:
        raise DescriptorError(error.reason, error.detail) from None
    if header.shape not in (order.shape, (1, *order.shape)):
        channels, regions = order.shape
        raise DescriptorError(
            Reason.ARRAY_SHAPE,
            f"{name}: shape {header.shape}; resources.json says {channels} channels x {regions} regions",
        )
    if len(raw) != header.expected:
        raise DescriptorError(Reason.UNREADABLE, f"{name}: {len(raw)} bytes, its header announces another size")
    values = header.values(raw).reshape(order.shape)
    rows = {m: [float(values[channel, place]) for place in order.regions] for m, channel in order.channels.items()}
    with located(name):
        return table_of(source, "freesurfer", rows, [name])
