"""Files that a source's config names and that are not there: dataset, key and what to do are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connectome_layouts import write
from layouts import write_series, write_tree
from pydantic import TypeAdapter

from tasks.catalog import build_catalog
from tasks.catalog_estimate import estimate_catalog
from tasks.sources import SourceConfig

CONFIG: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)
VOLUME = np.arange(280, dtype=np.int16).reshape(8, 7, 5)
TABLE = {"kind": "table", "path": "file", "modality": "type"}
DICOM = {"kind": "dicom", "series": {"*T1*": "t1"}}
ABIDE_TABLE = "Phenotypic_V1_0b_preprocessed1.csv"


def source(root: Path, **fields: Any) -> SourceConfig:
    return CONFIG.validate_python({"dataset": "ixi", "root": str(root)} | fields)


def both_refuse(one: SourceConfig, ws: Path, error: type[Exception], text: str) -> None:
    """The catalog and its dry run say the same."""
    with pytest.raises(error, match=text):
        build_catalog([one], workspace=str(ws))
    with pytest.raises(error, match=text):
        estimate_catalog([one], str(ws))


@pytest.mark.parametrize(
    ("fields", "key", "name"),
    [
        ({**TABLE, "table": "scans.csv"}, "table", "scans.csv"),
        ({"kind": "datalist", "datalist": "list.json"}, "datalist", "list.json"),
        ({"kind": "datalist"}, "datalist", "dataset.json"),
        ({**DICOM, "crosswalk": {"path": "ids.csv"}}, "crosswalk.path", "ids.csv"),
        ({"kind": "abide_pcp"}, "phenotypic", ABIDE_TABLE),
        ({"kind": "abide_pcp", "phenotypic": "own.csv"}, "phenotypic", "own.csv"),
        ({"kind": "adhd200_pcp", "phenotypic": "own.tsv"}, "phenotypic", "own.tsv"),
        ({"kind": "roi_series", "participants": "people.csv"}, "participants", "people.csv"),
    ],
)
def test_absent_tables_and_lists(tmp_path: Path, fields: dict[str, Any], key: str, name: str) -> None:
    write(tmp_path / "Outputs/cpac/filt_noglobal/rois_cc200/Pitt_0050003_rois_cc200.1D")
    write(tmp_path / "NYU/0010001/sfnwmrda0010001_session_1_rest_1_cc200_TCs.1D")
    one = source(tmp_path, **fields)
    text = (
        rf"dataset ixi: `{key}` names {tmp_path}/{name}, which does not exist; correct `{key}`, or put the file there"
    )
    both_refuse(one, tmp_path / "ws", FileNotFoundError, text)
    (tmp_path / name).mkdir()
    both_refuse(one, tmp_path / "ws", IsADirectoryError, rf"dataset ixi: `{key}` names .*/{name}, which is a folder;")


@pytest.mark.parametrize("kind", ["tree", "dicom"])
def test_absent_phenotypes(tmp_path: Path, kind: str) -> None:
    table = {"path": "people.csv"}
    if kind == "tree":
        one = write_tree(tmp_path)
        one, number = one.replace(phenotypes=(*one.phenotypes, table)), 1
    else:
        write_series(tmp_path / "s1", VOLUME, description="T1")
        one, number = source(tmp_path, **DICOM, phenotypes=[table]), 0
    key = rf"phenotypes\.{number}\.path"
    both_refuse(
        one, tmp_path / "ws", FileNotFoundError, rf"dataset \w+: `{key}` names .*/people\.csv, which does not exist"
    )


def test_only_the_default_participants_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [{"image": ["a_t1.nii.gz"]}]}))
    assert build_catalog([source(tmp_path, kind="datalist")]).report["subjects"] == 0
    named = source(tmp_path, kind="datalist", participants="people.csv")
    both_refuse(named, tmp_path / "ws", FileNotFoundError, r"`participants` names .*/people\.csv, which does not exist")


def test_a_dicom_folder_without_a_wanted_series(tmp_path: Path) -> None:
    text = r"dataset ixi: no scan was found below .* as dicom; check `root` and `kind`"
    both_refuse(source(tmp_path, **DICOM), tmp_path / "ws", ValueError, text)
    write_series(tmp_path / "scout", VOLUME, description="scout")
    ignoring = source(tmp_path, kind="dicom", series={"*scout*": "ignore"})
    both_refuse(ignoring, tmp_path / "ws", ValueError, text)
    # A series that no pattern matches is a row of the catalog: the dry run counts it out, and refuses nothing.
    assert "ixi (dicom): 0 series to convert" in estimate_catalog([source(tmp_path, **DICOM)], str(tmp_path / "ws"))


def test_a_crosswalk_that_cannot_be_used(tmp_path: Path) -> None:
    write_series(tmp_path / "s1", VOLUME, description="T1")
    (tmp_path / "ids.csv").write_text("id,subject\nP1,a\n")
    both_refuse(
        source(tmp_path, **DICOM, crosswalk={"path": "ids.csv"}),
        tmp_path / "ws",
        ValueError,
        r"ids\.csv has no column 'patient_id'; its columns: id, subject",
    )


@pytest.mark.parametrize("kind", ["fmriprep", "abide_pcp", "adhd200_pcp", "roi_series"])
def test_absent_roots_of_functional_data(tmp_path: Path, kind: str) -> None:
    text = rf"dataset ixi: the root {tmp_path}/nowhere is not a folder; correct `root`"
    both_refuse(source(tmp_path / "nowhere", kind=kind), tmp_path / "ws", FileNotFoundError, text)
    nothing = "no scan was found|holds no"
    both_refuse(source(tmp_path, kind=kind), tmp_path / "ws", ValueError, nothing)
