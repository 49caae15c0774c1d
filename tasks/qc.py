"""Quality control of a store: mosaics, cases that stand out, and everything that was left out or quarantined."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra import storage
from models.store import Store, open_store
from models.store_layout import CASES
from tasks.catalog import read_catalog
from tasks.catalog_report import left_out_table, markdown_table, short_detail
from tasks.duplicates import THRESHOLD, read_duplicates
from tasks.mosaic import mosaic

__all__ = ["mosaic", "mosaic_of", "qc_cases", "qc_outliers", "qc_page", "quarantine_table"]

OUTLIER_Z = 3.5
"""Iglewicz and Hoaglin (1993): a modified z-score above 3.5 labels an outlier."""
MAD_TO_SD = 1.4826
MIN_CASES = 8
"""Fewer values of a measure say too little about what is usual."""
SHOWN_OUTLIERS = 30
SHOWN_QUARANTINED = 50


def qc_cases(store_url: str, per_dataset: int = 3) -> list[tuple[str, int]]:
    """Return (dataset, row) of the cases to look at: of each dataset the worst outlier, the rest evenly by case id."""
    return _choose(open_store(store_url).cases(), per_dataset)


def _choose(cases: pa.Table, per_dataset: int) -> list[tuple[str, int]]:
    lines = _stored(cases)
    worst = {line["dataset"]: line["case"] for line in reversed(qc_outliers(cases, limit=len(lines)))}
    chosen = []
    for dataset in sorted({line["dataset"] for line in lines}):
        own = sorted((line["case"], line["row"]) for line in lines if line["dataset"] == dataset)
        first = [row for case, row in own if case == worst.get(dataset)]
        even = [own[round(place)][1] for place in np.linspace(0, len(own) - 1, min(per_dataset, len(own)))]
        chosen += [(dataset, row) for row in dict.fromkeys([*first, *even])][:per_dataset]
    return chosen


def mosaic_of(store: Store, dataset: str, row: int) -> bytes:
    """Return the mosaic of one stored case as PNG."""
    data = store.dataset(dataset)
    info = data.case_info(row)
    image, label = data.read_case(row)
    return mosaic(
        image,
        info.affine,
        label,
        modalities=store.spec.modalities,
        title=f"{dataset}  {info.case}",
        frame=store.spec.frame,
    )


def qc_page(store_url: str, per_dataset: int = 3) -> str:
    """Return a Markdown page: counts, mosaics as data: URIs (each below 120 kB), outliers of the QC measures."""
    store = open_store(store_url)
    cases = store.cases()
    lines = ["### Cases", "", *markdown_table(_status_rows(cases)), "", "### Pictures", ""]
    for dataset, row in _choose(cases, per_dataset):
        png = base64.b64encode(mosaic_of(store, dataset, row)).decode()
        case = store.dataset(dataset).case_info(row).case
        lines += [f"![{dataset} {case}](data:image/png;base64,{png})", ""]
    outliers = qc_outliers(cases)
    lines += [
        "### Cases that stand out",
        "",
        f"Modified z-score above {OUTLIER_Z} within the dataset (median and median absolute deviation).",
        "",
        *markdown_table(outliers[:SHOWN_OUTLIERS]),
        "",
        *_duplicates(store_url),
    ]
    return "\n".join(lines)


def _duplicates(store_url: str) -> list[str]:
    """Return the section on subjects that look like one person."""
    pairs = [
        {
            "one": f"{pair['dataset_a']}/{pair['subject_a']}",
            "other": f"{pair['dataset_b']}/{pair['subject_b']}",
            "similarity": round(pair["similarity"], 3),
        }
        for pair in read_duplicates(store_url)
    ]
    note = f"Fingerprints above {THRESHOLD}; splits keep such subjects together. {len(pairs)} pairs."
    return ["### Subjects that look alike", "", note, "", *markdown_table(pairs[:SHOWN_OUTLIERS]), ""]


def qc_outliers(cases: pa.Table, limit: int = SHOWN_OUTLIERS) -> list[dict[str, Any]]:
    """Return the QC measures of stored cases that are unusual in their dataset, the strangest first.

    The modified z-score is |value - median| / (1.4826 MAD) over the dataset's stored cases; measures with fewer than
    MIN_CASES values or without spread are passed over.
    """
    groups: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for line in _stored(cases):
        for measure, value in _measures(line):
            groups.setdefault((line["dataset"], measure), []).append((line["case"], value))
    found = [row for (dataset, measure), values in groups.items() for row in _unusual(dataset, measure, values)]
    found.sort(key=lambda row: (-row["z"], row["dataset"], row["case"], row["measure"]))
    return found[:limit]


def _measures(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for measure, value in json.loads(line["qc"] or "{}").items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield measure, float(value)


def _unusual(dataset: str, measure: str, values: list[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    numbers = np.array([value for _, value in values])
    median = float(np.median(numbers))
    deviation = MAD_TO_SD * float(np.median(np.abs(numbers - median)))
    if len(numbers) < MIN_CASES or deviation <= 1e-9 * max(abs(median), 1.0):
        return
    for case, value in values:
        z = abs(value - median) / deviation
        if z > OUTLIER_Z:
            usual = f"{median - 2 * deviation:.4g} to {median + 2 * deviation:.4g}"
            row = {"dataset": dataset, "case": case, "measure": measure, "value": round(value, 4)}
            yield {**row, "usual": usual, "z": round(z, 1)}


def quarantine_table(store: str | pa.Table | None, catalog: str | None = None) -> list[dict[str, str]]:
    """Return everything that is not used: dataset, case, file, reason, detail.

    What the catalog left out comes first, then the cases that preprocessing quarantined.

    Args:
        store: URL of a store (one never finalised has published nothing and adds no row), its cases table, or None.
        catalog: path of catalog.parquet or of the workspace that holds it, or None.

    Raises FileNotFoundError when there is no catalog at the path, StoreError for a store of another schema.
    """
    rows = [] if catalog is None else left_out_table(read_catalog(catalog))
    if isinstance(store, str):
        store = open_store(store).cases() if storage.exists(storage.join(store, CASES)) else None
    return rows if store is None else rows + quarantined_rows(store)


def quarantined_rows(cases: pa.Table) -> list[dict[str, str]]:
    """Return one row per case with status quarantined: dataset, case, file, reason, detail."""
    columns = ["dataset", "case", "reason", "detail", "files"]
    found = [
        {
            "dataset": line["dataset"],
            "case": line["case"],
            "file": _blamed_file(line),
            "reason": line["reason"],
            "detail": short_detail(line["detail"], _blamed_file(line)),
        }
        for line in cases.filter(pc.field("status") == "quarantined").select(columns).to_pylist()
    ]
    return sorted(found, key=lambda row: (row["dataset"], row["case"]))


def _blamed_file(line: dict[str, Any]) -> str:
    """Return the file that the detail names, or the only file, or how many files the case has."""
    names = [str(file["path"]).rsplit("/", 1)[-1] for file in json.loads(line["files"] or "[]")]
    named = [name for name in names if name in line["detail"]]
    if named or len(names) == 1:
        return max(named or names, key=len)
    return f"all {len(names)} files"


def _stored(cases: pa.Table) -> list[dict[str, Any]]:
    columns = cases.select(["dataset", "row", "case", "status", "qc"])
    return [line for line in columns.to_pylist() if line["status"] == "stored"]


def _status_rows(cases: pa.Table) -> list[dict[str, Any]]:
    pairs = list(zip(*(cases.column(name).to_pylist() for name in ("dataset", "status")), strict=True))
    statuses = ("stored", "quarantined", "retired")
    return [
        {"dataset": dataset, **{status: pairs.count((dataset, status)) for status in statuses}}
        for dataset in sorted({dataset for dataset, _ in pairs})
    ]
