"""The same subjects in every layout give the same catalog, on disk and on S3."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from connectome_layouts import SERIES_LAYOUTS, SUBJECTS, write_adhd, write_anatomy, write_bold
from layouts import AFFINE, LAYOUTS, PHANTOMS, SPACING_MM, plain

from infra import storage
from tasks.catalog import CatalogResult, build_catalog, read_catalog, write_catalog
from tasks.sources import Adhd200PcpSource, FmriprepSource, SourceConfig


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> CatalogResult:
    return build_catalog([LAYOUTS["bids"](tmp_path_factory.mktemp("bids"))])


def test_the_reference_holds_what_was_written(reference: CatalogResult) -> None:
    wanted = sorted((p.case, modality) for p in PHANTOMS for modality in p.modalities)
    assert sorted((scan.case, scan.modality) for scan in reference.scans) == wanted
    for scan in reference.scans:
        assert (scan.status, scan.shape, scan.spacing_mm) == ("ok", (9, 8, 6), SPACING_MM)
        assert (scan.dtype, scan.label_scheme) == ("int16", "brats2021")
    assert reference.issues == ()
    columns = ["subject", "session", "age", "sex"]
    there = reference.phenotypes[reference.phenotypes["session"] != ""][columns]
    assert there.to_numpy().tolist() == [[p.subject, p.session, p.age, p.sex] for p in PHANTOMS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_catalog(layout: str, reference: CatalogResult, tmp_path: Path) -> None:
    result = build_catalog([LAYOUTS[layout](tmp_path / layout)], workspace=str(tmp_path / "ws"))
    same_as(result, reference)
    assert {scan.split for scan in result.scans} == {"training" if layout.startswith(("data", "table")) else ""}
    assert write_catalog(result, str(tmp_path / "ws"))
    assert read_catalog(str(tmp_path / "ws")) == result.scans


def test_converted_voxels_lie_where_they_lay(tmp_path: Path) -> None:
    result = build_catalog([LAYOUTS["dicom"](tmp_path / "dicom")], workspace=str(tmp_path / "ws"))
    for scan in result.scans:
        image = nib.as_closest_canonical(nib.load(scan.path))
        phantom = next(phantom for phantom in PHANTOMS if phantom.case == scan.case)
        np.testing.assert_array_equal(np.asarray(image.dataobj), phantom.volume(scan.modality))
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_catalog_from_s3_without_a_request_too_many(
    layout: str, reference: CatalogResult, tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = to_s3(LAYOUTS[layout](tmp_path / "layout"), tmp_path / "layout", s3_url)
    ws = storage.join(s3_url, "ws")
    first = build_catalog([source], workspace=ws)
    same_as(first, reference)
    assert all(scan.etag and scan.size_bytes and scan.path.startswith(s3_url) for scan in first.scans)
    calls = count_calls(s3_url, monkeypatch)
    again = build_catalog([source], workspace=ws)
    assert again.scans == first.scans
    scans = len(first.scans)
    # Roots and tables are looked up one by one, scans are not: a listing says their size and ETag.
    assert calls["head_object"] < scans, calls
    assert calls["get_object"] <= (2 if layout == "dicom" else 1) * scans + 4, calls


def test_checksums_are_the_identity_on_request(tmp_path: Path) -> None:
    source = LAYOUTS["tree"](tmp_path / "tree")
    first = build_catalog([source], checksums=True)
    assert all(len(scan.etag) == len("sha256:") + 64 and scan.etag.startswith("sha256:") for scan in first.scans)
    path = Path(first.scans[0].path)
    path.touch()
    assert build_catalog([source], checksums=True).report["identity"] == first.report["identity"]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    changed = build_catalog([source], checksums=True)
    assert changed.report["digest"] != first.report["digest"]
    assert build_catalog([source]).scans[0].etag == str(path.stat().st_mtime_ns)


def same_as(result: CatalogResult, reference: CatalogResult) -> None:
    assert plain(result.scans) == plain(reference.scans)
    assert result.issues == ()
    columns = ["dataset", "subject", "session", "age", "sex"]
    ours, theirs = (
        table[table["session"] != ""][columns].reset_index(drop=True)
        for table in (result.phenotypes, reference.phenotypes)
    )
    pd.testing.assert_frame_equal(ours, theirs)


def count_calls(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the requests to S3 from now on, by their kind."""
    fs, _ = storage.filesystem(s3_url)
    calls: Counter[str] = Counter()
    original = type(fs)._call_s3

    async def counted(self: object, method: str, *args: object, **kwargs: object) -> object:
        calls[method] += 1
        return await original(self, method, *args, **kwargs)

    monkeypatch.setattr(type(fs), "_call_s3", counted)
    return calls


def to_s3(source: SourceConfig, folder: Path, url: str) -> SourceConfig:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(url, "in", str(path.relative_to(folder))), path.read_bytes())
    return source.replace(root=storage.join(url, "in"))


@pytest.fixture(scope="module")
def of_abide(tmp_path_factory: pytest.TempPathFactory) -> CatalogResult:
    make, source = SERIES_LAYOUTS["abide_pcp"]
    folder = tmp_path_factory.mktemp("abide")
    make(folder)
    return build_catalog([source(str(folder))])


@pytest.mark.parametrize("layout", SERIES_LAYOUTS)
def test_every_layout_of_series_gives_the_same_catalog(layout: str, of_abide: CatalogResult, tmp_path: Path) -> None:
    make, source = SERIES_LAYOUTS[layout]
    make(tmp_path / "root")
    result = build_catalog([source(str(tmp_path / "root"))])
    assert [scan.subject for scan in result.scans] == list(SUBJECTS)
    assert plain(result.scans) == plain(of_abide.scans)
    assert [scan.size_bytes for scan in result.scans] == [scan.size_bytes for scan in of_abide.scans]
    columns = ["subject", "age", "sex"]
    pd.testing.assert_frame_equal(result.phenotypes[columns], of_abide.phenotypes[columns])
    assert write_catalog(result, str(tmp_path / "ws"))
    assert read_catalog(str(tmp_path / "ws")) == result.scans


def write_derivatives(root: Path) -> None:
    for subject in ("sub-01", "sub-02"):
        write_anatomy(root, subject)
        write_bold(root, subject)


REMOTE = {
    **SERIES_LAYOUTS,
    "adhd200_pcp": (write_adhd, lambda root: Adhd200PcpSource(dataset="demo", root=root)),
    "fmriprep": (write_derivatives, lambda root: FmriprepSource(dataset="demo", root=root)),
}


@pytest.mark.full
@pytest.mark.parametrize("layout", REMOTE)
def test_functional_data_are_the_same_on_s3_and_text_costs_no_request(
    layout: str, tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, source = REMOTE[layout]
    make(tmp_path / "root")
    here = build_catalog([source(str(tmp_path / "root"))])
    remote = to_s3(source(str(tmp_path / "root")), tmp_path / "root", s3_url)
    there = build_catalog([remote])
    assert plain(there.scans) == plain(here.scans)
    pd.testing.assert_frame_equal(there.phenotypes, here.phenotypes)
    assert all(scan.etag and scan.size_bytes and scan.path.startswith(s3_url) for scan in there.scans)
    calls = count_calls(s3_url, monkeypatch)
    assert build_catalog([remote]).scans == there.scans
    images = sum(bool(scan.shape) for scan in there.scans)
    assert calls["get_object"] <= images + 2, calls
    assert calls["head_object"] <= 4, calls
