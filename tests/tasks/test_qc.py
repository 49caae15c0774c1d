"""The table of what is not used, and the cases that are drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from nifti_files import write_nifti
from PIL import Image
from qc_phantoms import SPEC, scans_of_brain
from store_builds import ingest

from models.records import Reason, Scan
from models.store import open_store, read_lines
from tasks import qc
from tasks.catalog import CatalogResult, summarise, write_catalog
from tasks.catalog_report import short_detail
from tasks.qc import mosaic_of, mosaics_of, qc_cases, quarantine_table

Workspace = tuple[Path, str]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A catalog with one left-out file and a store with five cases, one of them in quarantine."""
    root = tmp_path_factory.mktemp("qc")
    scans = [scan for n in range(5) for scan in scans_of_brain(root, f"c{n}", n)]
    scans = [_with_nan(scan) if (scan.case, scan.modality) == ("c3", "t1") else scan for scan in scans]
    left_out = scans[-1].replace(
        path=str(root / "c4_swi.nii.gz"), modality="swi", status="left out", reason=Reason.UNKNOWN_MODALITY, detail="x"
    )
    rows, nobody = [*scans, left_out], pd.DataFrame()
    write_catalog(CatalogResult(rows, nobody, summarise(rows, nobody)), str(root))
    store = str(root / "store.zarr")
    ingest(store, scans, spec=SPEC)
    return root, store


def _with_nan(scan: Scan) -> Scan:
    path = write_nifti(Path(scan.path), np.full((8, 8, 8), np.nan, np.float32))
    return scan.replace(size_bytes=path.stat().st_size, etag=str(path.stat().st_mtime_ns))


def test_the_table_joins_left_outs_and_quarantine(workspace: Workspace) -> None:
    root, store = workspace
    rows = quarantine_table(store, str(root))
    assert [(row["dataset"], row["case"], row["file"], row["reason"]) for row in rows] == [
        ("phantom", "c4", "c4_swi.nii.gz", Reason.UNKNOWN_MODALITY),
        ("phantom", "c3", "c3_t1.nii.gz", Reason.NOT_FINITE),
    ]
    assert all(row["detail"] for row in rows)
    assert quarantine_table(open_store(store).cases()) == rows[1:]
    assert quarantine_table(None, f"{root}/catalog.parquet") == rows[:1]
    assert quarantine_table(str(root / "no.zarr"), None) == []


def test_cases_that_cannot_be_ranked_are_spread_and_end_with_the_last(workspace: Workspace) -> None:
    _, store = workspace
    names = [line["case"] for line in open_store(store).cases().to_pylist()]
    assert [names[row] for _, row in qc_cases(store, per_dataset=2)] == ["c0", "c4"]
    assert len(qc_cases(store, per_dataset=10)) == 4


def test_a_mosaic_of_a_stored_case_has_a_row_per_modality(workspace: Workspace) -> None:
    _, store = workspace
    with Image.open(io.BytesIO(mosaic_of(open_store(store), "phantom", 0))) as picture:
        assert picture.height > 400


def test_mosaics_read_the_table_once_and_one_case_at_a_time(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reads = open_store(workspace[1]), []
    monkeypatch.setattr(qc, "read_lines", lambda url: reads.append("table") or read_lines(url))
    drawn = mosaics_of(store, [("phantom", 0), ("phantom", 2)])
    first = next(drawn)
    assert (first[:2], reads) == (("phantom", 0), ["table"])
    assert [row for _, row, _ in drawn] == [2]
    assert reads == ["table"]


@pytest.mark.parametrize(
    ("paths", "detail", "file"),
    [
        (["/a/x_t1.nii.gz", "/a/x_t2.nii.gz"], "x_t2.nii.gz: truncated", "x_t2.nii.gz"),
        (["/a/x_t1.nii.gz"], "killed the worker", "x_t1.nii.gz"),
        (["/a/x_t1.nii.gz", "/a/x_t2.nii.gz"], "killed the worker", "all 2 files"),
    ],
)
def test_the_file_to_blame(paths: list[str], detail: str, file: str) -> None:
    line = {"dataset": "d", "case": "c", "status": "quarantined", "reason": "r", "detail": detail}
    cases = pa.Table.from_pylist([line | {"files": json.dumps([{"path": path} for path in paths])}])
    assert [row["file"] for row in quarantine_table(cases)] == [file]


@pytest.mark.parametrize(
    ("detail", "file", "short"),
    [
        ("/data/a/x.nii.gz does not exist; restore it", "x.nii.gz", "does not exist; restore it"),
        ("s3://bucket/a/x.nii.gz: truncated", "x.nii.gz", "truncated"),
        ("x.nii.gz: (3, 4) voxels", "x.nii.gz", "(3, 4) voxels"),
        ("1/2 of the voxels", "x.nii.gz", "1/2 of the voxels"),
        ("killed the worker", "all 2 files", "killed the worker"),
    ],
)
def test_a_detail_repeats_neither_file_nor_folders(detail: str, file: str, short: str) -> None:
    assert short_detail(detail, file) == short
