"""Scans of a folder of DICOM files: series are found by their headers, converted by dcm2niix and then catalogued.

Which series is which modality says an explicit table of SeriesDescription patterns. No patient's name and no path of a
DICOM file reaches a log or the catalog: rows name the SeriesInstanceUID, and paths lie in the conversion folder.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from infra import storage
from models.records import BRAIN_MASK, LABEL, MODALITIES, OTHER_MODALITIES, Reason, Record, Scan
from tasks.dicom_convert import IMAGE, ConversionError, convert, find_converter, is_converted
from tasks.dicom_series import DicomFile, Series, find_series
from tasks.sources.base import IGNORE, Candidate, Found, Root, SourceBase, left_out, naming, open_root
from tasks.sources.names import OutsideRootError, check_link
from tasks.sources.tree import compile_template
from tasks.table_files import pick, read_table

_log = logging.getLogger(__name__)
FOLDER = "converted"
INDEX = "index.parquet"


class Crosswalk(Record):
    """A table from the hospital's identifiers to those of the study."""

    path: str = Field(title="Table", description="CSV, TSV or Parquet, relative to the root, absolute, or a URL.")
    patient_id: str = Field("patient_id", title="PatientID column", description="Column of PatientIDs as in the files.")
    study_uid: str = Field(
        "", title="Study column", description="Column of StudyInstanceUIDs; empty: all studies of a patient alike."
    )
    subject: str = Field("subject", title="Subject column", description="Column of the subjects to use instead.")
    session: str = Field("", title="Session column", description="Column of sessions; empty: one session.")


class DicomSource(SourceBase):
    """A dataset as it comes from the scanner or an archive."""

    kind: Literal["dicom"] = "dicom"
    series: dict[str, str] = Field(
        title="Series",
        description="Pattern of SeriesDescription (* and ? as in a shell, case ignored) -> modality, label, brain_mask "
        "or ignore; the first that matches counts. A series that none matches is reported.",
        examples=[{"*MPRAGE*": "t1", "*FLAIR*": "flair", "*localizer*": "ignore"}],
        min_length=1,
    )
    pattern: str = Field(
        "",
        title="Pattern",
        description="Where subject and session stand in the paths below the root; empty: PatientID is the subject.",
        examples=["{subject}/{session}/**"],
    )
    crosswalk: Crosswalk | None = Field(
        None, title="Crosswalk", description="Table from PatientID (and study) to subject and session."
    )

    @field_validator("series")
    @classmethod
    def _targets(cls, series: dict[str, str]) -> dict[str, str]:
        known = (*MODALITIES, *OTHER_MODALITIES, LABEL, BRAIN_MASK, IGNORE)
        for pattern, target in series.items():
            if target not in known:
                raise ValueError(f"series pattern {pattern!r} means {target!r}; use one of {', '.join(known)}")
        return series

    @field_validator("pattern")
    @classmethod
    def _template(cls, pattern: str) -> str:
        if pattern and "subject" not in compile_template(pattern).groupindex:
            raise ValueError(f"{pattern!r} has no field {{subject}}")
        return pattern


def find_scans(source: DicomSource, workspace: str) -> Found:
    """Return the scans of all series, converted into `<workspace>/converted/<dataset>`; the rest carry their reason.

    Series that are there already are not converted again. Raises FileNotFoundError when the root is not a folder,
    ValueError without a workspace, MissingExtraError without the extra `dicom`.
    """
    if not workspace:
        raise ValueError(f"dataset {source.dataset}: DICOM series need a workspace to be converted into")
    find_converter()
    root = open_root(source, listed=True)
    adapter = _Adapter(source, root, conversion_folder(workspace, source.dataset))
    inside, outside = _without_links(root)
    series, broken = find_series(root.url, inside, storage.join(adapter.folder, INDEX))
    return Found([*adapter.rows(series), *map(adapter.unreadable, broken), *outside])


def conversion_folder(workspace: str, dataset: str) -> str:
    """Return the URL or resolved path of the converted series of a dataset."""
    return storage.join(storage.resolved(workspace), FOLDER, dataset)


@dataclass(frozen=True)
class Survey:
    """What a dry run learns of a source."""

    rows: int
    """Series and files that the catalog would name."""
    pending: tuple[Series, ...]
    """Wanted series that are not converted yet."""


def survey(source: DicomSource, workspace: str) -> Survey:
    """Return what a catalog would name and convert; reads headers and the crosswalk, writes nothing.

    Raises what `find_scans` raises for a wrong config.
    """
    find_converter()
    root = open_root(source, listed=True)
    read_crosswalk(source)
    folder = conversion_folder(workspace, source.dataset)
    inside, outside = _without_links(root)
    series, broken = find_series(root.url, inside, storage.join(folder, INDEX), write=False)
    named = [(one, modality_of(source, one.header.description)) for one in series]
    listing = storage.find_or_empty(folder)
    pending = [one for one, token in named if token not in ("", IGNORE) and not is_converted(one, listing)]
    return Survey(sum(token != IGNORE for _, token in named) + len(broken) + len(outside), tuple(pending))


CrosswalkOwners = dict[tuple[str, str], tuple[str, str]]
"""(PatientID, StudyInstanceUID or empty) -> (subject, session)."""


def read_crosswalk(source: DicomSource) -> CrosswalkOwners | None:
    """Return the crosswalk, or None without one.

    Raises FileNotFoundError or ValueError for a table that is absent, lacks a column or contradicts itself.
    """
    if (cross := source.crosswalk) is None:
        return None
    url = source.locate(cross.path)
    with naming(source, "crosswalk.path", url):
        table = read_table(url)
    columns = (cross.patient_id, cross.study_uid, cross.subject, cross.session)
    cells = [pick(table, column, url) if column else [""] * len(table) for column in columns]
    owners: CrosswalkOwners = {}
    for number, (patient, study, subject, session) in enumerate(zip(*cells, strict=True), start=2):
        if owners.setdefault((patient, study), (subject, session)) != (subject, session):
            raise ValueError(f"{url}, row {number}: this patient and study have another subject or session above")
    return owners


def modality_of(source: DicomSource, description: str) -> str:
    """Return the modality of the first pattern that matches a SeriesDescription, or empty."""
    text = description.lower()
    for pattern, target in source.series.items():
        if fnmatch.fnmatchcase(text, pattern.lower()):
            return target
    return ""


def _without_links(root: Root) -> tuple[dict[str, Mapping[str, Any]], list[Scan]]:
    """Return the listing without links that lead out of the root, and a row for each of those."""
    inside, outside = {}, []
    for path, info in (root.listing or {}).items():
        try:
            if info.get("islink"):
                check_link(root.url, path)
            inside[path] = info
        except OutsideRootError:
            scan = Scan(dataset=root.source.dataset, subject="", case="", modality="", path=root.url)
            outside.append(left_out(scan, Reason.OUTSIDE_ROOT, "a link among the DICOM files leads out of the root"))
    return inside, outside


@dataclass(frozen=True)
class _Adapter:
    source: DicomSource
    root: Root
    folder: str
    """Of the converted series."""

    def rows(self, series: Sequence[Series]) -> list[Scan]:
        owners = read_crosswalk(self.source)
        named = [(one, self._named(one, owners)) for one in series]
        wanted = [(one, candidate) for one, candidate in named if candidate.modality != IGNORE]
        problems = self._convert_all([one for one, candidate in wanted if candidate.problem is None])
        converted = Root(self.source, self.folder, storage.find_or_empty(self.folder))
        return [self._row(one, candidate, problems.get(one.key), converted) for one, candidate in wanted]

    def unreadable(self, file: DicomFile) -> Scan:
        """Return the row of a file that is no DICOM; its path may hold a name, so a hash stands for it."""
        detail = f"a file of {file.size_bytes:,} bytes is called DICOM and cannot be read as such"
        return self._without_image(Candidate("", ""), file.key[:32], (Reason.UNREADABLE, detail))

    def _row(self, series: Series, candidate: Candidate, problem: tuple[Reason, str] | None, converted: Root) -> Scan:
        if problem := candidate.problem or problem:
            reason, detail = problem
            return self._without_image(candidate, series.key, (reason, f"{_described(series)}: {detail}"))
        return converted.scan(candidate)

    def _without_image(self, candidate: Candidate, key: str, problem: tuple[Reason, str]) -> Scan:
        scan = Scan(
            dataset=self.source.dataset,
            subject="",
            case="",
            modality=candidate.modality,
            path=storage.join(self.folder, key),
        )
        return left_out(scan, *problem)

    def _convert_all(self, series: Sequence[Series]) -> dict[str, tuple[Reason, str] | None]:
        """Convert what is not there yet; returns the problem of every series that was tried."""
        there = storage.find_or_empty(self.folder)
        todo = [one for one in series if not is_converted(one, there)]
        _log.info("dataset %s: %d of %d wanted series to convert", self.source.dataset, len(todo), len(series))
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="dcm2niix") as pool:
            return dict(zip((one.key for one in todo), pool.map(self._convert, todo), strict=True))

    def _convert(self, series: Series) -> tuple[Reason, str] | None:
        try:
            convert(series, self.root.url, self.folder)
        except ConversionError as error:
            return Reason.UNREADABLE, str(error)
        return None

    def _named(self, series: Series, owners: CrosswalkOwners | None) -> Candidate:
        modality = modality_of(self.source, series.header.description)
        if not modality:
            text = "no pattern of `series` matches its description; add one, or name it 'ignore'"
            return Candidate("", "", problem=(Reason.UNKNOWN_MODALITY, text))
        subject, session, problem = self._owner(series, owners)
        path = f"{series.key}/{IMAGE}"
        return Candidate(path, subject, session, modality, problem or _names_patient(subject, session, series))

    def _owner(self, series: Series, owners: CrosswalkOwners | None) -> tuple[str, str, tuple[Reason, str] | None]:
        header = series.header
        if owners is not None:
            study = header.study_uid if self.source.crosswalk and self.source.crosswalk.study_uid else ""
            if found := owners.get((header.patient_id, study)):
                return *found, None
            return "", "", (Reason.BAD_ID, "its PatientID (and study) are not in the crosswalk table")
        if not self.source.pattern:
            return header.patient_id, "", None if header.patient_id else (Reason.BAD_ID, "it has no PatientID")
        match = compile_template(self.source.pattern).fullmatch(series.files[0].path)
        if match is None:
            return "", "", (Reason.UNMATCHED, f"its path does not match {self.source.pattern!r}")
        return match["subject"], match.groupdict().get("session") or "", None


def _described(series: Series) -> str:
    shown = series.header.description[:80]
    return f"series {series.header.series_uid} {shown!r} ({len(series.files)} files)"


def _names_patient(subject: str, session: str, series: Series) -> tuple[Reason, str] | None:
    """Refuse ids that repeat the patient's name."""
    if any(name in f"{subject} {session}".lower() for name in series.header.names):
        return Reason.BAD_ID, "its subject repeats the patient's name; give a `crosswalk` from PatientID to subject"
    return None
