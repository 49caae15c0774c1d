from __future__ import annotations

import base64
import io
import json
import re

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from models.records import PreprocessSpec, Reason
from models.store import create_or_open, open_store
from tasks import plan, shards
from tasks.catalog import build_catalog, write_catalog
from tasks.catalog_report import short_detail
from tasks.preprocess import preprocess_batch
from tasks.qc import mosaic_of, qc_cases, qc_outliers, qc_page, quarantine_table
from tasks.sources import BidsSource

SPEC = PreprocessSpec(name="tiny", spacing_mm=8.0, grid=(24, 28, 24))


def put(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([8.0, 8.0, 8.0, 1.0])), path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A catalog with one left-out file and a store with five cases, one of them in quarantine."""
    root = tmp_path_factory.mktemp("qc")
    rng = np.random.default_rng(0)
    inside = (((np.indices((20, 24, 20)).T - [10, 12, 10]) / [9, 11, 9]) ** 2).sum(-1).T < 1
    for number in range(5):
        name = f"sub-{number}"
        image = np.where(inside, 100 + 50 * rng.random(inside.shape), 0).astype(np.float32)
        put(root / f"bids/{name}/anat/{name}_FLAIR.nii.gz", image)
        if number == 3:
            image[:] = np.nan
        put(root / f"bids/{name}/anat/{name}_T1w.nii.gz", image)
    put(root / "bids/sub-4/anat/sub-4_T2starw.nii.gz", image)
    store = str(root / "store.zarr")
    result = build_catalog([BidsSource(dataset="demo", root=str(root / "bids"))])
    write_catalog(result, str(root))
    writer = create_or_open(store, SPEC)
    rows = plan.plan_rows(plan.cases_from_scans(scan for scan in result.scans if scan.status == "ok"), [])
    plan.write_plan(store, rows.added, SPEC.content_digest())
    writer.grow("demo", 5, False)
    preprocess_batch(store, [case.model_dump(mode="json") for case in rows.current], token="t")
    shards.finalise(store, rows.current)
    return root, store


def test_the_table_joins_left_outs_and_quarantine(workspace):
    root, store = workspace
    rows = quarantine_table(store, str(root))
    assert [(row["dataset"], row["case"], row["file"], row["reason"]) for row in rows] == [
        ("demo", "sub-4", "sub-4_T2starw.nii.gz", Reason.UNKNOWN_MODALITY),
        ("demo", "sub-3", "sub-3_T1w.nii.gz", Reason.NOT_FINITE),
    ]
    assert all(row["detail"] for row in rows)
    assert quarantine_table(open_store(store).cases()) == rows[1:]
    assert quarantine_table(None, f"{root}/catalog.parquet") == rows[:1]
    assert quarantine_table(str(root / "no.zarr"), None) == []


def test_cases_are_spread_and_end_with_the_last(workspace):
    _, store = workspace
    names = [line["case"] for line in open_store(store).cases().to_pylist()]
    assert [names[row] for _, row in qc_cases(store, per_dataset=2)] == ["sub-0", "sub-4"]
    assert len(qc_cases(store, per_dataset=10)) == 4


def test_the_page_has_counts_pictures_and_outliers(workspace):
    _, store = workspace
    page = qc_page(store, per_dataset=2)
    assert "| demo | 4 | 1 | 0 |" in page
    pictures = re.findall(r"!\[demo (sub-\d)\]\(data:image/png;base64,([^)]*)\)", page)
    assert [name for name, _ in pictures] == ["sub-0", "sub-4"]
    for _, data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format == "PNG"
    assert page.rstrip().endswith("none")


def test_a_mosaic_of_a_stored_case_has_a_row_per_modality(workspace):
    _, store = workspace
    with Image.open(io.BytesIO(mosaic_of(open_store(store), "demo", 0))) as picture:
        assert picture.height > 400


def table(lines):
    common = {"dataset": "d", "status": "stored", "reason": "", "detail": "", "files": "[]"}
    return pa.Table.from_pylist([common | {"row": n, "case": f"c{n:02d}"} | line for n, line in enumerate(lines)])


def qc(**measures):
    return {"qc": json.dumps(measures)}


def test_outliers_are_found_by_their_modified_z_score():
    cases = [qc(snr_t1=20 + 0.1 * n, flag=True, note="x") for n in range(10)] + [qc(snr_t1=2.0)]
    (row,) = qc_outliers(table(cases))
    assert (row["dataset"], row["case"], row["measure"], row["value"]) == ("d", "c10", "snr_t1", 2.0)
    values = np.array([20 + 0.1 * n for n in range(10)] + [2.0])
    median = np.median(values)
    expected = abs(2.0 - median) / (1.4826 * np.median(abs(values - median)))
    assert row["z"] == round(expected, 1)


def test_few_values_no_spread_and_quarantined_cases_are_no_outliers():
    assert qc_outliers(table([qc(a=1.0)] * 6 + [qc(a=99.0)])) == []
    assert qc_outliers(table([qc(a=1.0)] * 20 + [qc(a=99.0)])) == []
    usual = [qc(a=1 + 0.01 * n) for n in range(10)]
    assert qc_outliers(table([*usual, qc(a=99.0) | {"status": "quarantined"}])) == []
    assert qc_outliers(table([*usual, qc(a=99.0) | {"dataset": "other"}])) == []


def test_the_worst_outliers_come_first_and_are_limited():
    cases = table([qc(a=1 + 0.01 * n) for n in range(10)] + [qc(a=5.0), qc(a=9.0)])
    assert [row["case"] for row in qc_outliers(cases)] == ["c11", "c10"]
    assert [row["case"] for row in qc_outliers(cases, limit=1)] == ["c11"]


@pytest.mark.parametrize(
    ("paths", "detail", "file"),
    [
        (["/a/x_t1.nii.gz", "/a/x_t2.nii.gz"], "x_t2.nii.gz: truncated", "x_t2.nii.gz"),
        (["/a/x_t1.nii.gz"], "killed the worker", "x_t1.nii.gz"),
        (["/a/x_t1.nii.gz", "/a/x_t2.nii.gz"], "killed the worker", "all 2 files"),
    ],
)
def test_the_file_to_blame(paths, detail, file):
    line = {"status": "quarantined", "reason": "r", "detail": detail, "qc": "{}"}
    cases = table([line | {"files": json.dumps([{"path": path} for path in paths])}])
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
def test_a_detail_repeats_neither_file_nor_folders(detail, file, short):
    assert short_detail(detail, file) == short
