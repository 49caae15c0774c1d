from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from prefect.client.orchestration import get_client
from pydantic import ValidationError

from flows import artifacts as artifacts_module
from flows.catalog import CatalogParams, StrictCatalogError, catalog, refuse_left_out, run_name
from tasks.catalog import CatalogResult, build_catalog, read_catalog, read_phenotypes, rows_digest
from tasks.phenotype_join import PhenotypeIssue
from tasks.phenotypes import phenotypes_digest
from tasks.sources import BidsSource, DatalistSource, DicomSource, PhenotypeTable, TableSource, TreeSource
from tasks.sources.dicom import Crosswalk


@pytest.fixture
def params(tmp_path):
    """Two subjects, one with a real 4D file."""
    for name, shape in (("sub-1_T1w", (4, 4, 4)), ("sub-2_T1w", (4, 4, 4)), ("sub-2_T2w", (4, 4, 4, 2))):
        path = tmp_path / f"bids/{name.split('_')[0]}/anat/{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.ones(shape, np.int16), np.eye(4)), path)
    source = {"kind": "bids", "dataset": "ixi", "root": str(tmp_path / "bids")}
    return CatalogParams.model_validate({"sources": [source], "workspace": str(tmp_path / "ws")})


def artifacts():
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact for artifact in client.read_artifacts(limit=200)}


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_writes_once_and_publishes_what_it_found(params):
    first = catalog(params)
    assert first == {
        "workspace": params.workspace,
        "written": True,
        "cases": 2,
        "scans": 2,
        "labels": 0,
        "left_out": 1,
        "digest": first["digest"],
        "rows_digest": rows_digest(read_catalog(params.workspace)),
        "phenotypes_digest": phenotypes_digest(read_phenotypes(params.workspace)),
    }
    assert [scan.status for scan in read_catalog(params.workspace)] == ["ok", "ok", "left out"]
    assert catalog(params) == first | {"written": False}
    found = artifacts()
    assert "**2 cases, 2 scans, 0 labels**" in found["catalog"].data
    assert f"kept as `versions/phenotypes-{first['phenotypes_digest'][:12]}.parquet`." in found["catalog"].data
    (row,) = json.loads(found["catalog-left-out"].data)
    assert (row["file"], row["reason"]) == ("sub-2_T2w.nii.gz", "not 3D")
    assert found["progress-catalog"].data == 100


@pytest.mark.usefixtures("prefect_server")
def test_sources_without_a_usable_image_never_replace_a_catalog(params, tmp_path):
    catalog(params)
    former = read_catalog(params.workspace)
    tree = {"kind": "tree", "dataset": "ixi", "root": str(tmp_path / "bids"), "patterns": ["x{subject}/{modality}.nii"]}
    wrong = CatalogParams.model_validate({"sources": [tree], "workspace": params.workspace})
    with pytest.raises(ValueError, match=r"no image of ixi can be used \(3 .+\); the former catalog, if any, is kept"):
        catalog(wrong)
    assert read_catalog(params.workspace) == former


@pytest.mark.usefixtures("prefect_server")
def test_strict_mode_fails_and_keeps_the_former_catalog(params, tmp_path):
    with pytest.raises(StrictCatalogError, match="strict catalog: 1 files would be left out, 0 are allowed"):
        catalog(params.model_copy(update={"strict": True}))
    assert not (tmp_path / "ws").exists()


def test_strict_mode_names_the_files(params):
    result = build_catalog(params.sources)
    with pytest.raises(StrictCatalogError, match=r"  ixi sub-2 sub-2_T2w\.nii\.gz: not 3D \(shape \(4, 4, 4, 2\)"):
        refuse_left_out(result)
    many = CatalogResult([scan for scan in result.scans if scan.status != "ok"] * 30, result.phenotypes, {})
    with pytest.raises(StrictCatalogError, match=r"30 files would be left out[\s\S]*\.\.\. and 10 more"):
        refuse_left_out(many)
    clean = CatalogResult([scan for scan in result.scans if scan.status == "ok"], result.phenotypes, {})
    refuse_left_out(clean)


def test_strict_mode_names_nobody_on_a_public_api(params, monkeypatch):
    monkeypatch.setattr(artifacts_module, "is_private", lambda url: False)
    result = build_catalog(params.sources)
    with pytest.raises(StrictCatalogError, match=r"1 files would be left out[\s\S]*\n  1 not 3D in ixi$") as caught:
        refuse_left_out(result)
    assert "sub-2" not in str(caught.value)
    issue = PhenotypeIssue("ixi", "sub-1", "conflict", "age of sub-1: 50, 51; left empty")
    clean = [scan for scan in result.scans if scan.status == "ok"]
    with pytest.raises(StrictCatalogError, match=r"1 phenotypes disagree, 0 may[^\n]*\n  1 in ixi$"):
        refuse_left_out(CatalogResult(clean, result.phenotypes, {}, (issue,)))


def test_strict_mode_names_phenotypes_that_disagree(params):
    result = build_catalog(params.sources)
    clean = [scan for scan in result.scans if scan.status == "ok"]
    issue = PhenotypeIssue("ixi", "sub-1", "conflict", "age of sub-1: 50, 51; left empty")
    with pytest.raises(StrictCatalogError, match=r"1 phenotypes disagree, 0 may[\s\S]*ixi age of sub-1: 50, 51"):
        refuse_left_out(CatalogResult(clean, result.phenotypes, {}, (issue,)))
    unread = PhenotypeIssue("ixi", "sub-1", "bad value", "p.csv, row 3: DX is '7'; known are 0, 1; left empty")
    with pytest.raises(StrictCatalogError, match=r"2 phenotypes disagree or cannot be read, 0 may[\s\S]*row 3: DX is"):
        refuse_left_out(CatalogResult(clean, result.phenotypes, {}, (issue, unread)))
    stranger = PhenotypeIssue("ixi", "sub-9", "unknown subject", "")
    refuse_left_out(CatalogResult(clean, result.phenotypes, {}, (stranger,)))


def test_run_names_tell_the_datasets():
    sources = [BidsSource(dataset=name, root="x") for name in "abcda"]
    assert run_name(CatalogParams(sources=sources[:2])) == "catalog a b"
    assert run_name(CatalogParams(sources=sources)) == "catalog a b c and 1 more"


def test_the_kind_chooses_the_source():
    params = CatalogParams.model_validate(
        {"sources": [{"kind": "bids", "dataset": "a", "root": "x"}, {"kind": "datalist", "dataset": "b", "root": "y"}]}
    )
    assert [type(source) for source in params.sources] == [BidsSource, DatalistSource]
    assert CatalogParams.model_validate(params.model_dump(mode="json")) == params


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"sources": []}, "at least 1 item"),
        ({"sources": [{"kind": "nifti", "dataset": "a", "root": "x"}]}, "'bids', 'datalist', 'table', 'tree', 'dicom'"),
        ({"sources": [{"kind": "bids", "dataset": "a", "root": "x"}], "stict": True}, "Extra inputs"),
        ({"sources": [{"kind": "bids", "dataset": "a", "root": ""}]}, "at least 1 character"),
    ],
)
def test_wrong_parameters_are_refused(bad, text):
    with pytest.raises(ValidationError, match=text):
        CatalogParams.model_validate(bad)


def test_every_parameter_has_a_title_and_a_description():
    for model in (
        CatalogParams,
        BidsSource,
        DatalistSource,
        TableSource,
        TreeSource,
        DicomSource,
        PhenotypeTable,
        Crosswalk,
    ):
        for name, field in model.model_fields.items():
            assert name == "kind" or (field.title and field.description), f"{model.__name__}.{name}"
