"""DICOM files grouped into series by their headers, without a patient's name in anything that is returned to stay.

Of every file 128 kB are read at most. The index remembers which file belongs to which series under a hash of path, size
and ETag, so a second look at an unchanged folder reads one header per series.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage

READ_BYTES = 128 * 1024
READ_THREADS = 16
TAGS = ["SeriesInstanceUID", "StudyInstanceUID", "SeriesDescription", "PatientID", "PatientName", "Modality"]
MAGIC = b"DICM"
DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Transfer syntax whose header is compressed: a bomb unpacks to a thousand times its size."""
SUFFIXES = (".dcm", ".ima")
"""A file that is called so and is no DICOM file is reported; any other is no scan."""
NO_DICOM, BROKEN = "", "broken"
"""In the index, instead of the UID of a series."""
UID = re.compile(r"^[0-9.]{1,64}$")


@dataclass(frozen=True)
class DicomHeader:
    """The fields that decide what a series is."""

    series_uid: str
    study_uid: str
    description: str
    """SeriesDescription, with the parts of the patient's name masked."""
    patient_id: str
    names: frozenset[str]
    """Words of the patient's name in lower case: to compare with, never to be written anywhere."""


@dataclass(frozen=True)
class DicomFile:
    """One file of a listing."""

    path: str
    """Relative to the root."""
    size_bytes: int
    etag: str

    @property
    def key(self) -> str:
        """Hash of path, size and ETag."""
        return digest(self.path, str(self.size_bytes), self.etag)


@dataclass(frozen=True)
class Series:
    """The files of one series in order of their paths, and what their first header says."""

    header: DicomHeader
    files: tuple[DicomFile, ...]

    @property
    def key(self) -> str:
        """Identity of the series as it lies there: another file, size or ETag gives another key."""
        return digest(self.header.series_uid, *(file.key for file in self.files))[:32]


class MissingExtraError(ImportError):
    """A package of the extra `dicom` is not installed; the text says how to install it."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"sources of kind 'dicom' need {package}; install brainloom with its extra: pip install 'brainloom[dicom]'"
        )


class DicomError(ValueError):
    """A file that is no readable DICOM file of a series; the text names a rule and never a value."""


def digest(*parts: str) -> str:
    """Return the SHA-256 (hex) of some texts."""
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def find_series(
    root: str, listing: Mapping[str, Mapping[str, Any]], index_url: str, write: bool = True
) -> tuple[list[Series], list[DicomFile]]:
    """Return the series of a folder in order of their first files, and the files that should be DICOM and are not.

    index_url: Parquet file that is read and, with `write`, written again when it has changed.
    """
    files = [_file(path, info) for path, info in sorted(listing.items()) if "/." not in f"/{path}"]
    known = read_index(index_url)
    found = {file.key: known[file.key] for file in files if file.key in known}
    new = [file for file in files if file.key not in found]
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="dicom") as pool:
        found.update(zip((file.key for file in new), pool.map(lambda file: _series_of(root, file), new), strict=True))
        groups: dict[str, list[DicomFile]] = defaultdict(list)
        for file in files:
            groups[found[file.key]].append(file)
        broken = groups.pop(BROKEN, [])
        groups.pop(NO_DICOM, None)
        headers = list(pool.map(lambda group: read_dicom_header(f"{root}/{group[0].path}"), groups.values()))
    if write and found != known:
        write_index(index_url, found)
    return [Series(header, tuple(group)) for header, group in zip(headers, groups.values(), strict=True)], broken


def _file(path: str, info: Mapping[str, Any]) -> DicomFile:
    return DicomFile(path, int(info.get("size") or 0), str(info.get("ETag") or info.get("mtime") or "").strip('"'))


def _series_of(root: str, file: DicomFile) -> str:
    try:
        return read_dicom_header(f"{root}/{file.path}").series_uid
    except DicomError:
        return BROKEN if file.path.lower().endswith(SUFFIXES) else NO_DICOM


def read_dicom_header(url: str) -> DicomHeader:
    """Return what the header of one file says; raises DicomError, or OSError when the remote storage fails."""
    try:
        raw = _first_bytes(url)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DicomError(f"cannot be read: {type(error).__name__}") from None
    return parse_dicom_header(raw)


def _first_bytes(url: str) -> bytes:
    if storage.is_local(url):
        # Not through fsspec, whose debug log names every path, and paths may hold names.
        with storage.local_path(url).open("rb") as file:
            return file.read(READ_BYTES)
    fs, path = storage.filesystem(url)
    return bytes(fs.cat_file(path, start=0, end=READ_BYTES))


def parse_dicom_header(raw: bytes) -> DicomHeader:
    """Return what the first bytes of a DICOM file say; raises DicomError."""
    if raw[128:132] != MAGIC:
        raise DicomError("no DICOM file: the letters DICM are not at byte 128")
    if DEFLATED in raw:
        raise DicomError("a deflated DICOM file; neither dcm2niix nor the catalog unpacks it")
    parse = _parser()
    try:
        fields = parse(raw)
    except Exception as error:  # noqa: BLE001 - pydicom raises nearly anything for damaged bytes
        raise DicomError(f"the DICOM header cannot be decoded: {type(error).__name__}") from None
    if not UID.match(fields["SeriesInstanceUID"]):
        raise DicomError(f"no SeriesInstanceUID within the first {READ_BYTES:,} bytes")
    names = name_words(fields["PatientName"])
    return DicomHeader(
        series_uid=fields["SeriesInstanceUID"],
        study_uid=fields["StudyInstanceUID"],
        description=mask_names(fields["SeriesDescription"], names),
        patient_id=fields["PatientID"],
        names=names,
    )


@cache
def _parser() -> Callable[[bytes], dict[str, str]]:
    """Return a function that gives the wanted fields as text. pydicom is imported here: it is an optional extra."""
    try:
        import pydicom
    except ImportError:
        raise MissingExtraError("pydicom") from None
    # Its complaints quote values, and a value may be a name.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")

    def parse(raw: bytes) -> dict[str, str]:
        data = pydicom.dcmread(BytesIO(raw), stop_before_pixels=True, specific_tags=TAGS)
        return {tag: str(data.get(tag) or "").strip() for tag in TAGS}

    return parse


def name_words(name: str) -> frozenset[str]:
    """Return the words of a patient's name, three letters or more; what holds a digit is a pseudonym."""
    return frozenset(word.lower() for word in re.split(r"[\^=,;\s]+", name) if len(word) > 2 and word.isalpha())


def mask_names(text: str, names: frozenset[str]) -> str:
    """Return a text with `***` in place of every word of a name."""
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(re.escape(name), "***", text, flags=re.IGNORECASE)
    return text


def read_index(url: str) -> dict[str, str]:
    """Return key of file -> series UID as written last; an absent or damaged index is an empty one."""
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(url)))
        return dict(zip(table["file"].to_pylist(), table["series"].to_pylist(), strict=True))
    except (FileNotFoundError, KeyError, pa.ArrowException):
        return {}


def write_index(url: str, series: Mapping[str, str]) -> None:
    """Write key of file -> series UID."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"file": list(series), "series": list(series.values())}), sink, compression="zstd")
    storage.write_bytes(url, sink.getvalue().to_pybytes())
