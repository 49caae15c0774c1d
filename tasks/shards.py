"""What happens to a store as a whole: folding receipts into published rows, and cleaning after a killed writer."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from infra import storage
from models.records import LABEL, PlannedCase, Reason, Receipt
from models.spec import PreprocessSpec
from models.store import digest_of_cases, read_cases
from models.store_descriptors import Layout, layout_of
from models.store_writer import StoreWriter, open_writer, read_attributes
from tasks import plan as plans
from tasks import receipts
from tasks.duplicates import refresh as search_duplicates
from tasks.fingerprint import fingerprints_of
from tasks.label_schemes import scheme_conflict

CASES_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("row", pa.int64()),
        ("case", pa.string()),
        ("subject", pa.string()),
        ("session", pa.string()),
        ("label_scheme", pa.string()),
        ("split", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("digest", pa.string()),
        ("modalities", pa.list_(pa.string())),
        ("has_label", pa.bool_()),
        ("extent", pa.list_(pa.int32())),
        ("qc", pa.string()),
        ("fingerprint", pa.list_(pa.float32())),
        ("files", pa.string()),
        ("seconds", pa.float64()),
    ]
)
FROM_CATALOG = ("subject", "session", "label_scheme", "split")
"""Columns that follow the catalog without a new row: no voxel depends on them."""

LINE_COLUMNS = tuple(name for name in CASES_SCHEMA.names if name != "fingerprint")
"""Fingerprints stay arrays: as Python numbers they would take 130 kB a case, half a GB for 4,000."""

GONE = ("forgotten", "dropped")
"""Statuses of rows whose voxels were erased; nothing brings such a row back."""

Row = tuple[str, int]
Prints = dict[Row, np.ndarray]
"""Fingerprints by row, float32."""


def published(url: str, columns: Sequence[str] = ("dataset", "row", "status")) -> dict[Row, dict[str, Any]]:
    """Return some columns of cases.parquet by dataset and row; empty before the first finalise."""
    try:
        table = read_cases(url, list(columns))
    except FileNotFoundError:
        return {}
    return {(line["dataset"], line["row"]): line for line in table.to_pylist()}


def line_of(receipt: Receipt) -> dict[str, Any]:
    """Return the line of cases.parquet that a receipt becomes, without its fingerprint."""
    body = receipt.model_dump(mode="json", exclude={"spec_digest", "geometry", "fingerprint", "descriptors"})
    return {
        **body,
        "qc": json.dumps(receipt.qc, sort_keys=True, allow_nan=False),
        "files": _files_text(receipt),
    }


def _files_text(case: PlannedCase | Receipt) -> str:
    return json.dumps([file.written().model_dump(mode="json") for file in case.files], sort_keys=True)


def bare_line(dataset: str, row: int, status: str, case: str = "") -> dict[str, Any]:
    """Return the line of an erased row: its number, its status and nothing that says what it held."""
    empty: dict[str, Any] = dict.fromkeys(LINE_COLUMNS)
    texts = {field.name: "" for field in CASES_SCHEMA if field.type == pa.string()}
    numbers = {"has_label": False, "extent": [0, 0, 0], "modalities": [], "seconds": 0.0}
    return {**empty, **texts, **numbers, "dataset": dataset, "row": row, "status": status, "case": case}


def _read_all(url: str) -> tuple[dict[Row, dict[str, Any]], Prints]:
    """Return the lines of cases.parquet and the fingerprints by dataset and row; empty before the first finalise."""
    try:
        table = read_cases(url)
    except FileNotFoundError:
        return {}, {}
    lines = {(line["dataset"], line["row"]): line for line in table.select(LINE_COLUMNS).to_pylist()}
    return lines, dict(zip(lines, fingerprints_of(table), strict=True))


def _table(lines: Sequence[dict[str, Any]], prints: Prints) -> pa.Table:
    """Return cases.parquet of some lines; what was erased has no fingerprint."""
    columns = pa.Table.from_pylist(lines, schema=pa.schema([CASES_SCHEMA.field(name) for name in LINE_COLUMNS]))
    nothing = np.zeros(0, dtype=np.float32)
    kept = [nothing if x["status"] in GONE else prints.get((x["dataset"], x["row"]), nothing) for x in lines]
    ends = np.cumsum([0, *map(len, kept)], dtype=np.int32)
    values = pa.array(np.concatenate(kept) if kept else nothing)
    column = pa.ListArray.from_arrays(pa.array(ends), values)
    return columns.append_column(CASES_SCHEMA.field("fingerprint"), column).select(CASES_SCHEMA.names)


def rewrite(url: str, changed: dict[Row, dict[str, Any]]) -> str:
    """Publish cases.parquet with some lines replaced or added, and return the store digest.

    Empty, and nothing is written, for a store that was never finalised. Only the holder of the lease may call this.
    """
    writer = open_writer(url)
    before, prints = _read_all(url)
    if not before:
        return ""
    lines = {**before, **changed}
    table = _table([lines[row] for row in sorted(lines)], prints)
    digest = digest_of_cases(table, writer.spec.content_digest())
    finalised = read_attributes(url)["finalised"]
    if lines != before or finalised is None or finalised["digest"] != digest:
        _mark_stored(writer, table)
        writer.publish(table, digest)
    return digest


def _mark_stored(writer: StoreWriter, table: pa.Table) -> None:
    """Tell readers without our code which rows count."""
    rows = zip(*(table.column(name).to_pylist() for name in ("dataset", "row", "status")), strict=True)
    stored: dict[str, list[int]] = {}
    for dataset, row, status in rows:
        stored.setdefault(dataset, []).extend([row] if status == "stored" else [])
    for dataset, numbers in stored.items():
        writer.mark_stored(dataset, numbers)


def fold(lines: Iterable[dict[str, Any]], current: Iterable[PlannedCase]) -> list[dict[str, Any]]:
    """Retire lines that a newer one replaces and take over what the catalog corrected; by dataset and row.

    Of a case remain the newest stored line, and the newest line where that is a broken successor of it.
    """
    ordered = sorted(lines, key=lambda line: (line["dataset"], line["row"]))
    newest = {(line["dataset"], line["case"]): line["row"] for line in ordered}
    stored = {(line["dataset"], line["case"]): line["row"] for line in ordered if line["status"] == "stored"}
    corrections = {plans.key_of(case): case for case in current}
    folded = []
    for line in ordered:
        out, key = dict(line), (line["dataset"], line["case"])
        if line["status"] in GONE:
            folded.append(out)
            continue
        if line["row"] not in (newest[key], stored.get(key)):
            out["status"] = "retired"
        if (case := corrections.get(key)) is not None:
            # The scheme belongs to the files of one row, the rest to the case.
            names = [name for name in FROM_CATALOG if name != "label_scheme" or line["row"] == case.row]
            out.update({name: getattr(case, name) for name in names})
            if line["row"] == case.row:
                # The same files, maybe in another place by now.
                out["files"] = _files_text(case)
        folded.append(out)
    return folded


def _mislabelled(
    lines: dict[Row, dict[str, Any]], current: Iterable[PlannedCase], spec_digest: str
) -> Iterator[Receipt]:
    """Yield a receipt of quarantine for every stored row whose label values a corrected label scheme does not know."""
    for case in current:
        line = lines.get((case.dataset, case.row))
        if line is None or line["status"] != "stored" or not line["has_label"]:
            continue
        if conflict := scheme_conflict(json.loads(line["qc"]).get("label_values", ()), case.label_scheme):
            (name,) = (file.path.rsplit("/", 1)[-1] for file in case.files if file.modality == LABEL)
            yield receipts.empty_receipt(case, spec_digest, Reason.LABEL_VALUES, f"{name}: {conflict}")


def _of_another_atlas(
    url: str, fresh: Sequence[Receipt], planned: Sequence[PlannedCase], spec_digest: str
) -> Iterator[Receipt]:
    """Yield a receipt of quarantine for every case whose descriptors have another atlas or basis than its dataset's."""
    layouts: dict[str, Layout] = {}
    cases = {(case.dataset, case.row): case for case in planned}
    for receipt in sorted(fresh, key=lambda r: (r.dataset, r.row)):
        if (table := receipt.descriptors) is None:
            continue
        mine = (table.atlas, table.basis)
        if receipt.dataset not in layouts:
            layouts[receipt.dataset] = layout_of(url, receipt.dataset) or mine
        if mine != (held := layouts[receipt.dataset]):
            detail = (
                f"its descriptors are of atlas {mine[0]} by {mine[1]}, dataset {receipt.dataset} holds those of "
                f"{held[0]} by {held[1]}; ingest it as another dataset"
            )
            case = cases[receipt.dataset, receipt.row]
            yield receipts.empty_receipt(case, spec_digest, Reason.DESCRIPTOR_ATLAS, detail)


def finalise(url: str, current: Sequence[PlannedCase], repaired: Collection[Row] = ()) -> str:
    """Publish every row that has a receipt and return the store digest; writes nothing when nothing changed.

    `repaired` are stored rows that were made again: their new receipts count.

    Order: small arrays, duplicates.parquet, cases.parquet, the finalised attribute, receipts of rows that a corrected
    label scheme put into quarantine. Only the holder of the lease may call this.
    """
    writer = open_writer(url)
    known = plans.read_plans(url)
    before, prints = _read_all(url)
    again = [case for case in known if (case.dataset, case.row) in repaired or _open(before, case)]
    fresh = _unfolded(url, again, before, writer.spec, prints)
    lines = {**before, **{(r.dataset, r.row): line_of(r) for r in fresh}}
    refused = list(_mislabelled(lines, current, writer.spec.content_digest()))
    refused += _of_another_atlas(url, fresh, again, writer.spec.content_digest())
    lines |= {(r.dataset, r.row): line_of(r) for r in refused}
    prints |= {(r.dataset, r.row): np.zeros(0, dtype=np.float32) for r in refused}
    folded = fold(lines.values(), current)
    table = _table(folded, prints)
    digest = digest_of_cases(table, writer.spec.content_digest())
    finalised = read_attributes(url)["finalised"]
    if finalised is None or fresh or folded != list(before.values()) or finalised["digest"] != digest:
        published = {row for row, line in before.items() if line["status"] in ("stored", "retired")}
        bad = {(receipt.dataset, receipt.row) for receipt in refused}
        taken = [receipt for receipt in fresh if (receipt.dataset, receipt.row) not in bad]
        _write_small(writer, taken, known, {row for row, line in lines.items() if line["status"] in GONE}, published)
        _mark_stored(writer, table)
        del before, prints, fresh, taken, lines, folded  # the search needs their memory: the table holds all there is
        search_duplicates(url, table, writer.spec)
        writer.publish(table, digest)
    for receipt in refused:
        # Last: killed before it, the next finalise finds the old receipt and refuses the row again.
        receipts.write_receipt(url, receipt)
    return digest


def _unfolded(
    url: str, open_cases: Sequence[PlannedCase], before: dict[Row, dict[str, Any]], spec: PreprocessSpec, prints: Prints
) -> list[Receipt]:
    """Return those receipts of some cases that cases.parquet does not hold yet.

    Receipts that do not count (unreadable, of other files or another spec) are left aside: the next plan redoes them.
    Their fingerprints go into `prints` and are empty in the receipts.
    """
    digest = spec.content_digest()
    there = receipts.receipt_rows(url, (case.dataset for case in open_cases)) - receipts.forgotten_rows(url)
    wanted = [case for case in open_cases if (case.dataset, case.row) in there]

    def read(case: PlannedCase) -> tuple[Receipt | None, np.ndarray]:
        receipt = receipts.read_receipt(url, case, digest)
        if receipt is None:
            return None, np.zeros(0, dtype=np.float32)
        # Not `replace`, which would check every value of the receipt once more.
        light = receipt.model_copy(update={"fingerprint": ()})
        return light, np.asarray(receipt.fingerprint, dtype=np.float32)

    fresh = []
    with ThreadPoolExecutor(receipts.READERS, thread_name_prefix="receipts") as pool:
        for receipt, found in pool.map(read, wanted):
            line = None if receipt is None else before.get((receipt.dataset, receipt.row))
            if receipt is not None and (line is None or receipt.status == "stored" or receipt.reason != line["reason"]):
                fresh.append(receipt)
                prints[receipt.dataset, receipt.row] = found
    return fresh


def _open(before: dict[Row, dict[str, Any]], case: PlannedCase) -> bool:
    """Say whether a row has no line yet, or one that another receipt may still change."""
    line = before.get((case.dataset, case.row))
    return line is None or line["status"] == "quarantined"


def _write_small(
    writer: StoreWriter,
    fresh: Sequence[Receipt],
    known: Sequence[PlannedCase],
    gone: Collection[Row],
    published: Collection[Row],
) -> None:
    for dataset in sorted({case.dataset for case in known}):
        mine = [case for case in known if case.dataset == dataset]
        names = {case.row: "" if (dataset, case.row) in gone else case.case for case in mine}
        rows = [row for name, row in published if name == dataset]
        writer.write_small(dataset, [r for r in fresh if r.dataset == dataset], names, rows)


def clean_partials(url: str) -> int:
    """Delete what a killed process left half-written on a local disk; returns how many files. S3 leaves nothing."""
    if not storage.is_local(url):
        return 0
    removed = 0
    for pattern in ("*.partial", ".*.tmp"):
        for path in storage.local_path(url).rglob(pattern):
            path.unlink(missing_ok=True)
            removed += 1
    return removed
