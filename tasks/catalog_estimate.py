"""What building a catalog will cost, said before headers are read: files, time, disk, memory and S3 requests."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from infra import storage
from models.records import Scan
from tasks.catalog import HEADER_THREADS, TEXTS, read_headers, refuse_nothing
from tasks.estimate import NOTHING_STARTED, human_bytes, human_seconds
from tasks.headers import CHECKSUM_BLOCK, READ_BYTES, file_identity
from tasks.sources import SourceConfig, find_scans, phenotype_tables
from tasks.sources.dicom import DicomSource, survey

SAMPLE = 64
"""Headers (or checksums) that are read to learn the speed of the storage."""
SECONDS_PER_SLICE = 0.01
"""Of dcm2niix, per DICOM file of 256 x 256 voxels on one core."""
BYTES_PER_SCAN = 7_000
"""Memory of the flow's process, rows and tables together; measured with 16,021 scans."""
LISTED_PER_REQUEST = 1000


@dataclass(frozen=True)
class SourceEstimate:
    """One source before its headers are read."""

    dataset: str
    kind: str
    files: int
    """Files that become rows, or DICOM series to convert."""
    read_bytes: int
    """Of headers, of whole files with checksums, of DICOM files to convert."""
    seconds: float
    disk_bytes: int
    requests: int
    basis: str


def estimate_catalog(sources: Sequence[SourceConfig], workspace: str, checksums: bool = False) -> str:
    """Return the cost of a catalog in lines; lists the sources and reads a sample of headers, writes nothing.

    Raises what the catalog raises for a wrong config: absent roots and tables, a source without any scan.
    """
    estimates = [
        _dicom(source, workspace) if isinstance(source, DicomSource) else _files(source, checksums)
        for source in sources
    ]
    files = sum(one.files for one in estimates)
    lines = [
        f"{one.dataset} ({one.kind}): {one.files:,} {'series to convert' if one.kind == 'dicom' else 'files'}, "
        f"{human_bytes(one.read_bytes)} to read, about {human_seconds(one.seconds)} ({one.basis})"
        for one in estimates
    ]
    requests = sum(one.requests for one in estimates)
    return "\n".join(
        [
            *lines,
            f"time         about {human_seconds(sum(one.seconds for one in estimates))}",
            f"disk         {human_bytes(sum(one.disk_bytes for one in estimates) + 300 * files)} in the workspace",
            f"memory       about {human_bytes(BYTES_PER_SCAN * files)} for the rows",
            f"S3 requests  {requests:,}" + (" (nothing lies on S3)" if not requests else ""),
            NOTHING_STARTED,
        ]
    )


def _files(source: SourceConfig, checksums: bool) -> SourceEstimate:
    found = find_scans(source)
    refuse_nothing(source, len(found.scans))
    scans = [scan for scan in found.scans if scan.status == "ok"]
    opened = scans if checksums else [scan for scan in scans if scan.modality not in TEXTS]
    sample = opened[:: max(1, len(opened) // SAMPLE)][:SAMPLE]
    began = time.perf_counter()
    sampled = read_headers(sample, checksums=checksums)
    seconds = time.perf_counter() - began
    total = sum(map(_size, scans)) if checksums else READ_BYTES * len(opened)
    if checksums:
        share = sum(scan.size_bytes for scan in sampled) / max(1, total)
        seconds /= share or 1
    else:
        seconds *= len(opened) / max(1, len(sample))
    what = "checksums" if checksums else "headers"
    return SourceEstimate(
        dataset=source.dataset,
        kind=source.kind,
        files=len(found.scans),
        read_bytes=total,
        seconds=seconds,
        disk_bytes=0,
        requests=0 if storage.is_local(source.root) else _requests(opened, found.listed, checksums),
        basis=f"from reading {len(sample)} {what} with {HEADER_THREADS} threads",
    )


def _size(scan: Scan) -> int:
    try:
        return scan.size_bytes or file_identity(scan.path)[0]
    except OSError:
        return 0


def _requests(scans: Sequence[Scan], listed: int, checksums: bool) -> int:
    blocks = sum(1 + math.ceil(scan.size_bytes / CHECKSUM_BLOCK) for scan in scans) if checksums else 0
    return math.ceil(listed / LISTED_PER_REQUEST) + len(scans) + blocks


def _dicom(source: DicomSource, workspace: str) -> SourceEstimate:
    found = survey(source, workspace)
    refuse_nothing(source, found.rows)
    phenotype_tables(source)
    series = found.pending
    files = [file for one in series for file in one.files]
    size = sum(file.size_bytes for file in files)
    remote = 0 if storage.is_local(source.root) else len(files)
    written = 0 if storage.is_local(workspace) else 2 * len(series)
    return SourceEstimate(
        dataset=source.dataset,
        kind=source.kind,
        files=len(series),
        read_bytes=size,
        seconds=SECONDS_PER_SLICE * len(files),
        disk_bytes=size,
        requests=remote + written,
        basis=f"{SECONDS_PER_SLICE:g} s per DICOM file; disk without compression; their headers were read now",
    )
