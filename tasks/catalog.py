"""The catalog: every scan found at the sources, with its header, and why any was left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra import storage
from models.records import (
    BOLD,
    BRAIN_MASK,
    CONFOUNDS,
    DESCRIPTORS,
    FUNCTIONAL,
    LABEL,
    MODALITIES,
    OTHER_MODALITIES,
    SERIES,
    Reason,
    Scan,
    digest_of,
)
from tasks.descriptors import descriptor_folder
from tasks.headers import CHECKSUM_PREFIX, HeaderError, file_checksum, read_header, text_identity
from tasks.phenotype_join import PhenotypeIssue, join_phenotypes
from tasks.phenotypes import PHENOTYPES_FILE, phenotypes_digest
from tasks.sources import SourceConfig, find_scans
from tasks.sources.base import left_out
from tasks.sources.dicom import conversion_folder
from tasks.sources.regional import refuse_mixed
from tasks.versions import keep_version

CATALOG_FILE = "catalog.parquet"
SUMMARY_FILE = "catalog.json"
HEADER_THREADS = 32
"""Header reads wait for S3 or a network disk, hardly for the CPU."""
LOCAL_BLOCK = 64
"""Files that a thread reads in one go: of local files a hand-over between threads costs as much as the reading."""
TELL_EVERY = 100
TEXTS = (SERIES, CONFOUNDS)
"""Text files: known by size and ETag, without a header."""
MASKS = (LABEL, BRAIN_MASK, DESCRIPTORS, CONFOUNDS)
"""What a case may have beside its images and series."""
CHANNEL_ORDER = (*MODALITIES, *OTHER_MODALITIES, SERIES, *MASKS)

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("dataset", "subject", "session", "case", "modality", "path")),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("spacing_mm", pa.list_(pa.float64())),
        *((name, pa.string()) for name in ("dtype", "label_scheme", "split", "status", "reason", "detail")),
    ]
)


@dataclass(frozen=True)
class CatalogResult:
    """What was found at the sources."""

    scans: list[Scan]
    """Sorted by dataset, case, modality (template order, label last) and path."""
    phenotypes: pd.DataFrame
    """See tasks.phenotypes.COLUMNS."""
    report: dict[str, Any]
    """What catalog.json holds: digests and counts."""
    issues: tuple[PhenotypeIssue, ...] = ()
    """What is wrong with the phenotype tables."""


def build_catalog(
    sources: Sequence[SourceConfig],
    on_progress: Callable[[int, int], None] | None = None,
    workspace: str = "",
    checksums: bool = False,
) -> CatalogResult:
    """Find the scans of all sources, read their headers and mark what cannot be used.

    Args:
        sources: one config per dataset; several may name the same dataset (BrainMVP lists one in two files).
        on_progress: called with (headers read, headers in all) from the calling thread.
        workspace: folder or URL that receives converted DICOM series and files of descriptors; needed for these alone.
        checksums: read every file whole and take its SHA-256 as identity instead of modification time or ETag.

    Raises:
        FileNotFoundError: a root or datalist does not exist.
        ValueError: a list or table does not follow its schema, or a source names no scan at all.
        MissingExtraError: a source of DICOM series without the extra `dicom`.
    """
    refuse_mixed(sources)
    founds = [find_scans(source, workspace) for source in sources]
    for source, found in zip(sources, founds, strict=True):
        refuse_nothing(source, len(found.scans))
        _refuse_homeless(source, found.scans, workspace)
    scans = read_headers([scan for found in founds for scan in found.scans], on_progress, checksums)
    scans = sort_scans(mark_label_shapes(mark_orphans(mark_duplicates(mark_clashes(scans)))))
    phenotypes, joined = join_phenotypes([found.phenotypes for found in founds], scans)
    issues = [*(issue for found in founds for issue in found.issues), *joined]
    roots = [source.url for source in sources]
    if workspace:
        folders = (conversion_folder, descriptor_folder)
        roots += [folder(workspace, source.dataset) for source in sources for folder in folders]
    return CatalogResult(scans, phenotypes, summarise(scans, phenotypes, roots, issues), tuple(issues))


def refuse_nothing(source: SourceConfig, rows: int) -> None:
    """Raise ValueError when a source gives no row at all to the catalog: its config is wrong."""
    if not rows:
        raise ValueError(
            f"dataset {source.dataset}: no scan was found below {source.root} as {source.kind}; check `root` and `kind`"
        )


def _refuse_homeless(source: SourceConfig, scans: Sequence[Scan], workspace: str) -> None:
    if not workspace and any(scan.modality == DESCRIPTORS for scan in scans):
        raise ValueError(f"dataset {source.dataset}: regional descriptors need a workspace to be written into")


def read_headers(
    scans: Sequence[Scan], on_progress: Callable[[int, int], None] | None = None, checksums: bool = False
) -> list[Scan]:
    """Return the scans with size, identity, shape, spacing and type; bad headers become `left out`. Order is kept."""
    tell = on_progress or _silent
    result: list[Scan] = []
    tell(0, len(scans))
    size = LOCAL_BLOCK if all(storage.is_local(scan.path) for scan in scans[:1]) else 1
    blocks = [scans[start : start + size] for start in range(0, len(scans), size)]
    with ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="headers") as pool:
        for block in pool.map(lambda some: [with_header(scan, checksums) for scan in some], blocks):
            told = len(result) // TELL_EVERY
            result += block
            if len(result) // TELL_EVERY > told or len(result) == len(scans):
                tell(len(result), len(scans))
    return result


def _silent(done: int, total: int) -> None:
    """Say nothing."""


def with_header(scan: Scan, checksum: bool = False) -> Scan:
    """Return one scan with what its header says; what is left out already, and text, is not opened."""
    if scan.status != "ok" or scan.modality == DESCRIPTORS:
        return scan
    known = (scan.size_bytes, scan.etag) if scan.etag else None
    try:
        if scan.modality in TEXTS:
            size, etag = text_identity(scan.path, known)
            return scan.replace(size_bytes=size, etag=file_checksum(scan.path) if checksum else etag)
        header = read_header(scan.path, known, frames=scan.modality == BOLD)
    except HeaderError as error:
        return left_out(scan, error.reason, str(error))
    return scan.replace(
        size_bytes=header.size_bytes,
        etag=file_checksum(scan.path) if checksum else header.etag,
        shape=header.shape,
        spacing_mm=tuple(round(value, 6) for value in header.spacing_mm),
        dtype=header.dtype,
    )


def mark_clashes(scans: Iterable[Scan]) -> list[Scan]:
    """Leave out scans whose case name belongs to another subject or session: `a_1` is also subject a, session 1."""
    owners: dict[tuple[str, str], tuple[str, str]] = {}
    result = []
    for scan in scans:
        mine = (scan.subject, scan.session)
        owner = owners.setdefault((scan.dataset, scan.case), mine) if scan.status == "ok" else mine
        if owner != mine:
            detail = f"case {scan.case} is already subject {owner[0]!r}, session {owner[1]!r}; rename one of them"
            scan = left_out(scan, Reason.BAD_ID, detail)
        result.append(scan)
    return result


def mark_duplicates(scans: Iterable[Scan]) -> list[Scan]:
    """Leave out all but the first usable scan of each dataset, case and modality, naming the one that is kept.

    A connectome is made of one thing: a BOLD image and ROI series of a case are duplicates of each other.
    """
    kept: dict[tuple[str, str, str], Scan] = {}
    result = []
    for scan in scans:
        place = (scan.dataset, scan.case, BOLD if scan.modality == SERIES else scan.modality)
        first = kept.setdefault(place, scan) if scan.status == "ok" else scan
        if first is not scan:
            scan = left_out(scan, Reason.DUPLICATE_SCAN, f"{first.modality} of {scan.case} is already {first.path}")
        result.append(scan)
    return result


def mark_orphans(scans: Sequence[Scan]) -> list[Scan]:
    """Leave out labels, brain masks and descriptors of cases without a usable image, and confounds without BOLD."""
    usable = [scan for scan in scans if scan.status == "ok"]
    functional = {(scan.dataset, scan.case, scan.modality) for scan in usable if scan.modality in FUNCTIONAL}
    imaged = {(scan.dataset, scan.case) for scan in usable if scan.modality not in (*MASKS, *FUNCTIONAL)}

    def lacks(scan: Scan) -> str:
        """Return what a usable scan needs and its case lacks, or nothing."""
        if scan.modality == CONFOUNDS:
            return "" if (scan.dataset, scan.case, BOLD) in functional else "BOLD image"
        return "image" if scan.modality in MASKS and (scan.dataset, scan.case) not in imaged else ""

    return [
        left_out(scan, Reason.NO_SCAN, f"{scan.case} has {_article(scan.modality)} but no usable {lacks(scan)}")
        if scan.status == "ok" and lacks(scan)
        else scan
        for scan in scans
    ]


def _article(modality: str) -> str:
    return modality if modality in (DESCRIPTORS, CONFOUNDS) else f"a {modality}"


def mark_label_shapes(scans: Sequence[Scan]) -> list[Scan]:
    """Leave out labels that have the shape of no image of their case: preprocessing would quarantine the whole case.

    Shapes are all that the catalog keeps of a header; that a label of the right shape lies where its images do is
    checked when the voxels are read. A brain mask may lie on a grid of its own and is resampled.
    """
    images: dict[tuple[str, str], list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.status == "ok" and scan.modality not in (*MASKS, *FUNCTIONAL) and scan.shape:
            images[scan.dataset, scan.case].append(scan)
    return [_with_label_shape(scan, images[scan.dataset, scan.case]) for scan in scans]


def _with_label_shape(scan: Scan, images: Sequence[Scan]) -> Scan:
    known = scan.status == "ok" and scan.modality == LABEL and scan.shape and images
    if not known or any(image.shape[:3] == scan.shape[:3] for image in images):
        return scan
    shapes = ", ".join(f"{image.modality} {image.shape[:3]}" for image in images)
    return left_out(scan, Reason.LABEL_SHAPE, f"{scan.shape[:3]} voxels, the scans have {shapes}")


def cases_left_out(scans: Iterable[Scan]) -> dict[tuple[str, str], str]:
    """Return dataset and case of every case of whose images none can be used, with the reason of the first.

    Files that match no pattern belong to no case.
    """
    used: set[tuple[str, str]] = set()
    lost: dict[tuple[str, str], str] = {}
    for scan in scans:
        if scan.modality in MASKS or scan.reason == Reason.UNMATCHED:
            continue
        if scan.status == "ok":
            used.add((scan.dataset, scan.case))
        else:
            lost.setdefault((scan.dataset, scan.case), scan.reason)
    return {case: reason for case, reason in sorted(lost.items()) if case not in used}


def sort_scans(scans: Iterable[Scan]) -> list[Scan]:
    """Return the scans in the catalog's order, which does not depend on the order of sources or threads."""
    ranks = {name: rank for rank, name in enumerate(CHANNEL_ORDER)}

    def key(scan: Scan) -> tuple[Any, ...]:
        return (
            scan.dataset,
            scan.case,
            ranks.get(scan.modality, len(ranks)),
            scan.modality,
            scan.path,
            scan.status != "ok",
        )

    return sorted(scans, key=key)


def summarise(
    scans: Sequence[Scan],
    phenotypes: pd.DataFrame,
    roots: Sequence[str] = (),
    issues: Sequence[PhenotypeIssue] = (),
) -> dict[str, Any]:
    """Return the content of catalog.json.

    `digest` hashes the rows without times and with paths below the roots, so two machines with the same files agree;
    `rows_digest` and `phenotypes_digest` hash both tables as they are, modification times included: plans and trainings
    name them, and together they are the `identity` that decides whether the files are rewritten.
    """
    rows = [scan.model_dump(mode="json") for scan in scans]
    datasets: dict[str, Any] = {}
    for name in sorted({scan.dataset for scan in scans}):
        datasets[name] = _counts([scan for scan in scans if scan.dataset == name])
    made = {"rows": digest_of(rows), "phenotypes": phenotypes_digest(phenotypes)}
    return {
        "schema": 1,
        "digest": digest_of([_portable(row, roots) for row in rows]),
        "rows_digest": made["rows"],
        "phenotypes_digest": made["phenotypes"],
        "identity": digest_of(made),
        "subjects": len(phenotypes[["dataset", "subject"]].drop_duplicates()) if len(phenotypes) else 0,
        "phenotype_issues": dict(sorted(Counter(issue.problem for issue in issues).items())),
        **_counts(scans),
        "datasets": datasets,
    }


def rows_digest(scans: Iterable[Scan]) -> str:
    """Return the SHA-256 (hex) over the rows of a catalog, as catalog.json has it."""
    return digest_of([scan.model_dump(mode="json") for scan in scans])


def _portable(row: dict[str, Any], roots: Sequence[str]) -> dict[str, Any]:
    """Return a row without modification time, absolute path and texts that contain paths."""
    path = row["path"]
    root = max((root for root in roots if path.startswith(root + "/")), key=len, default="")
    times = {} if "://" in path or row["etag"].startswith(CHECKSUM_PREFIX) else {"etag": ""}
    return {**row, **times, "path": path[len(root) :], "detail": ""}


def _counts(scans: Sequence[Scan]) -> dict[str, Any]:
    used = [scan for scan in scans if scan.status == "ok"]
    return {
        "scans": sum(scan.modality not in MASKS for scan in used),
        "labels": sum(scan.modality == LABEL for scan in used),
        "cases": len({(scan.dataset, scan.case) for scan in used}),
        "left_out": len(scans) - len(used),
        "modalities": _ordered(Counter(scan.modality for scan in used)),
        "reasons": dict(sorted(Counter(scan.reason for scan in scans if scan.status != "ok").items())),
    }


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in CHANNEL_ORDER if counts[name]}


def write_catalog(result: CatalogResult, ws: str) -> bool:
    """Write catalog.parquet, phenotypes.parquet and, last, catalog.json into a workspace (folder or URL).

    Every version of the phenotypes is kept (tasks.versions). Returns False, and writes nothing, when the workspace
    holds this catalog already.
    """
    if _is_written(result, ws):
        return False
    rows = [scan.model_dump() for scan in result.scans]
    storage.write_bytes(storage.join(ws, CATALOG_FILE), _parquet(pa.Table.from_pylist(rows, schema=SCHEMA)))
    phenotypes = pa.Table.from_pandas(result.phenotypes, preserve_index=False)
    current = storage.join(ws, PHENOTYPES_FILE)
    storage.write_bytes(current, _parquet(phenotypes))
    keep_version(current, result.report["phenotypes_digest"])
    storage.write_json(storage.join(ws, SUMMARY_FILE), result.report)
    return True


def _is_written(result: CatalogResult, ws: str) -> bool:
    if not all(storage.exists(storage.join(ws, name)) for name in (CATALOG_FILE, PHENOTYPES_FILE, SUMMARY_FILE)):
        return False
    try:
        known = storage.read_json(storage.join(ws, SUMMARY_FILE))
    except ValueError:
        return False
    return bool(known.get("identity") == result.report["identity"])


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_catalog(path: str) -> list[Scan]:
    """Return the scans of a catalog.parquet (or of the workspace that holds one), left-out ones included.

    Raises FileNotFoundError when it was never written, ValueError for a file that is no catalog.
    """
    url = catalog_url(str(path))
    rows = _read_table(url, CATALOG_FILE, SCHEMA.names).to_pylist()
    try:
        return [Scan.model_validate(row) for row in rows]
    except ValidationError as error:
        first = error.errors()[0]
        value = f"{'.'.join(map(str, first['loc']))} is {str(first['input'])[:80]!r}"
        raise ValueError(_not_a(CATALOG_FILE, url, f"{value}: {first['msg']}")) from None


def read_phenotypes(path: str) -> pd.DataFrame:
    """Return the phenotype table of a workspace (or a phenotypes.parquet).

    Raises FileNotFoundError without one, ValueError for a file that is none.
    """
    return _read_table(_table_url(str(path), PHENOTYPES_FILE), PHENOTYPES_FILE, ("dataset", "subject")).to_pandas()


def catalog_url(path: str) -> str:
    """Return where catalog.parquet lies that a parameter names by itself or by its workspace."""
    return _table_url(path, CATALOG_FILE)


def _table_url(path: str, name: str) -> str:
    return path if path.endswith(".parquet") else storage.join(path, name)


def _read_table(url: str, name: str, columns: Sequence[str]) -> pa.Table:
    """Return one of the workspace's tables; its columns must be there, more may."""
    try:
        raw = storage.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"there is no {name} at {url}; run the catalog flow first") from None
    try:
        table = pq.read_table(pa.BufferReader(raw))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_not_a(name, url, f"it is no readable Parquet file ({error})")) from None
    if missing := [column for column in columns if column not in table.column_names]:
        found = ", ".join(table.column_names)[:200] or "none"
        raise ValueError(_not_a(name, url, f"it has no column {missing[0]!r}; its columns: {found}"))
    return table


def _not_a(name: str, url: str, why: str) -> str:
    kind = "catalog" if name == CATALOG_FILE else "table of phenotypes"
    return f"{url} is not a {kind}: {why}; give {name} as the catalog flow writes it"
