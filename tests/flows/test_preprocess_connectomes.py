"""The flow with cases of every kind: images, time series, BOLD images, both; done again it does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import xarray
from connectome_files import (
    AFFINE,
    bold_of,
    confounds_bytes,
    confounds_of,
    correlation_of,
    own_spec,
    pcp_text,
    planted,
    store_spec,
    write_atlas,
    write_bold,
)
from nifti_files import blob, scan_of, write_nifti
from store_builds import catalog_of

from flows import preprocess as module
from flows.preprocess import PreprocessParams, preprocess
from flows.preprocess_params import check_params
from infra import storage
from models.records import BOLD, CONFOUNDS, SERIES, Scan
from models.store import open_store, store_digest
from tasks.atlas_image import AtlasImageError
from tasks.qc_report import report_urls
from tasks.verify import verify


@pytest.fixture
def scans(tmp_path: Path) -> list[Scan]:
    """Return a case of every kind and one whose series are too short."""
    correlation = correlation_of(1)
    files = {
        "t1": write_nifti(tmp_path / "t1.nii.gz", blob((16, 16, 16)), AFFINE),
        SERIES: tmp_path / "rois.1D",
        BOLD: write_bold(tmp_path / "bold.nii.gz", bold_of(planted(correlation) * 10)),
        CONFOUNDS: tmp_path / "confounds.tsv",
    }
    files[SERIES].write_bytes(pcp_text(planted(correlation)))
    files[CONFOUNDS].write_bytes(confounds_bytes(confounds_of()))
    (tmp_path / "short.1D").write_bytes(pcp_text(planted(correlation)[:30]))
    kinds = {"image": ("t1",), "series": (SERIES,), "bold": ("t1", BOLD, CONFOUNDS), "both": ("t1", SERIES)}
    found = [scan_of(files[name], name, case) for case, names in kinds.items() for name in names]
    return [*found, scan_of(tmp_path / "short.1D", SERIES, "short")]


def params_of(tmp_path: Path, scans: list[Scan], **connectome: object) -> PreprocessParams:
    return PreprocessParams.model_validate(
        {
            "catalog": catalog_of(tmp_path / "ws", scans),
            "store": str(tmp_path / "s.zarr"),
            "own_spec": store_spec(own_spec(**connectome)).model_dump(mode="json"),
            "workers": 1,
            "max_quarantined_share": 0.5,
        }
    )


@pytest.mark.full
def test_cases_of_every_kind(
    tmp_path: Path, scans: list[Scan], prefect_server: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of(tmp_path, scans, **write_atlas(tmp_path / "six.nii.gz"))
    first = preprocess(params)
    assert {key: first[key] for key in ("cases", "stored", "quarantined", "preprocessed")} == {
        "cases": 5, "stored": 4, "quarantined": 1, "preprocessed": 5,
    }  # fmt: skip
    assert verify(params.store, deep=True) == []
    rows = {line["case"]: line for line in open_store(params.store).cases().to_pylist()}
    assert rows["short"]["reason"] == "too few frames"
    data = open_store(params.store).dataset("toy")
    assert {case: data.has_connectome(rows[case]["row"]) for case in ("image", "series", "bold", "both")} == {
        "image": False, "series": True, "bold": True, "both": True,
    }  # fmt: skip
    with xarray.open_zarr(params.store, group="toy") as found:
        assert found["connectome"].shape == (5, 6, 6)
    page = storage.read_bytes(report_urls(params.store)[0]).decode()
    assert "<h3>Connectomes</h3>" in page
    monkeypatch.setattr(module, "DaskTaskRunner", None)  # with nothing to do no cluster is started
    second = preprocess(params)
    assert (second["preprocessed"], second["digest"]) == (0, first["digest"]) == (0, store_digest(params.store))


def test_what_cannot_work_is_refused_before_a_store_is_made(tmp_path: Path, scans: list[Scan]) -> None:
    text = r"there are BOLD images \(1 of toy\), and the connectome of spec 'six' has no label image: give an own_spec"
    with pytest.raises(ValueError, match=text):
        check_params(params_of(tmp_path, scans))
    atlas = write_atlas(tmp_path / "six.nii.gz")
    with pytest.raises(AtlasImageError, match=r"has the SHA-256 .* the spec says 00; correct one"):
        check_params(params_of(tmp_path, scans, **{**atlas, "atlas_sha256": "00"}))
    assert not (tmp_path / "s.zarr").exists()
    wanted = check_params(params_of(tmp_path, scans, **atlas))
    assert wanted.refused == {}
    series = [scan for scan in scans if scan.modality in ("t1", SERIES)]
    assert check_params(params_of(tmp_path, series)).refused == {}
