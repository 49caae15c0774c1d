from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.records import Reason, Scan
from tasks.catalog import build_catalog
from tasks.sources import Found, TableSource, find_scans
from tasks.table_files import read_table


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.int16), np.eye(4)), path)


def found(root: Path, text: str, **fields: object) -> Found:
    (root / "t.csv").write_text(text)
    return find_scans(TableSource.model_validate({"dataset": "d", "root": str(root), "table": "t.csv"} | fields))


def short(scans: list[Scan]) -> list[tuple[str, str, str, str]]:
    return [(scan.case, scan.modality, scan.path.rsplit("/", 1)[-1], scan.reason) for scan in scans]


def test_rows_of_scans_with_a_label_that_is_repeated(tmp_path: Path) -> None:
    text = "subject,file,type,seg,set,scheme\na,a1,T1w,m,training,s1\na,a2,swi,m,training,s1\n"
    text += "b,,flair,,test,\nc,c,ASL,,,\n"
    scans = found(
        tmp_path,
        text,
        path="file",
        modality="type",
        label="seg",
        split="set",
        label_scheme_column="scheme",
        label_scheme="s0",
        aliases={"ASL": "ignore"},
    ).scans
    assert short(scans) == [
        ("a", "t1", "a1", ""),
        ("a", "swi", "a2", Reason.UNKNOWN_MODALITY),
        ("b", "flair", "row-4", Reason.MISSING_FILE),
        ("a", "label", "m", ""),
    ]
    assert [(scan.split, scan.label_scheme) for scan in scans] == [("training", "s1")] * 2 + [
        ("test", "s0"),
        ("training", "s1"),
    ]
    assert scans[1].detail.endswith("name it in `aliases` of the source, or as 'ignore'")
    assert scans[2].detail.endswith("t.csv, row 4: the column 'file' is empty")


def test_rows_of_cases_skip_empty_cells(tmp_path: Path) -> None:
    text = "subject,when,t1,flair,seg,mask\na,1,x,,m,b\na,2,n/a,y,,\n"
    images = {"t1": "t1", "flair": "flair", "brain_mask": "mask"}
    scans = found(tmp_path, text, session="when", images=images, label="seg").scans
    assert short(scans) == [
        ("a_1", "t1", "x", ""),
        ("a_1", "brain_mask", "b", ""),
        ("a_1", "label", "m", ""),
        ("a_2", "flair", "y", ""),
    ]


def test_two_labels_of_a_case_are_duplicates(tmp_path: Path) -> None:
    for name in ("x", "y", "m", "n"):
        put(tmp_path / f"{name}.nii")
    (tmp_path / "t.csv").write_text("subject,file,type,seg\na,x.nii,t1,m.nii\na,y.nii,t2,n.nii\n")
    source = TableSource(dataset="d", root=str(tmp_path), table="t.csv", path="file", modality="type", label="seg")
    assert [scan.reason for scan in build_catalog([source]).scans] == ["", "", "", Reason.DUPLICATE_SCAN]


def test_case_names_that_clash(tmp_path: Path) -> None:
    put(tmp_path / "x.nii")
    put(tmp_path / "y.nii")
    (tmp_path / "t.csv").write_text("subject,when,t1\na_1,,x.nii\na,1,y.nii\n")
    source = TableSource(dataset="d", root=str(tmp_path), table="t.csv", session="when", images={"t1": "t1"})
    kept, clash = build_catalog([source]).scans
    assert (kept.subject, kept.status) == ("a_1", "ok")
    assert clash.detail == "case a_1 is already subject 'a_1', session ''; rename one of them"


def test_phenotype_columns_of_the_same_table(tmp_path: Path) -> None:
    text = "subject,when,t1,Age,DX,MMSE\na,1,x,61,ad,21\na,2,y,63,ad,\nb,1,z,n/a,hc,30\n"
    columns = {"age": "Age", "diagnosis": "DX", "mmse": "MMSE"}
    table = found(tmp_path, text, session="when", images={"t1": "t1"}, phenotype_columns=columns).phenotypes
    assert table[["subject", "session", "diagnosis"]].to_numpy().tolist() == [
        ["a", "1", "ad"],
        ["a", "2", "ad"],
        ["b", "1", "hc"],
    ]
    assert table["mmse"].fillna(-1).tolist() == [21, -1, 30]
    with pytest.raises(
        ValueError, match=r"t\.csv has no column 'Alter'; its columns: subject, when, t1, Age, DX, MMSE"
    ):
        found(tmp_path, text, images={"t1": "t1"}, phenotype_columns={"age": "Alter"})


@pytest.mark.parametrize(
    "fields",
    [{}, {"path": "p"}, {"modality": "m"}, {"path": "p", "modality": "m", "images": {"t1": "x"}}],
)
def test_one_layout_is_chosen(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"give `path` and `modality` \(one row per scan\) or `images`"):
        TableSource(dataset="d", root="x", table="t.csv", **fields)


def test_images_are_canonical() -> None:
    with pytest.raises(ValidationError, match="unknown modality T1w; use adc, bold, bold_confounds, brain_mask"):
        TableSource(dataset="d", root="x", table="t.csv", images={"T1w": "x"})


def test_tables_of_all_kinds_read_alike(tmp_path: Path) -> None:
    rows = {"id": ["a", "b"], "n": ["1", ""], "name": ["Ä, b", "x"]}
    (tmp_path / "t.csv").write_bytes('\ufeffid, n,name\r\na,1,"Ä, b"\r\n\r\nb,NaN,x\r\n'.encode())
    (tmp_path / "t.tsv").write_text("id\tn\tname\na\t1\tÄ, b\nb\tn/a\tx\n")
    pd.DataFrame({"id": ["a", "b"], "n": [1.0, None], "name": ["Ä, b", "x"]}).to_parquet(tmp_path / "t.parquet")
    for suffix in ("csv", "tsv", "parquet"):
        assert {name: list(cells) for name, cells in read_table(str(tmp_path / f"t.{suffix}")).items()} == rows


def test_a_table_without_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("subject,t1\n")
    assert read_table(str(tmp_path / "t.csv")).shape == (0, 2)


def test_a_table_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(ValueError, match="has 314,572,800 bytes, 268,435,456 are allowed for a table"):
        read_table(str(tmp_path / "t.csv"))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_table_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for suffix in ("csv", "tsv", "parquet"):
        path = folder / f"any.{suffix}"
        path.write_bytes(raw)
        with suppress(ValueError):
            table = read_table(str(path))
            assert all(isinstance(cell, str) for cell in itertools.chain(*table.to_numpy().tolist()))
