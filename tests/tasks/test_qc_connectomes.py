"""Quality control of connectomes: bad ones stand out for the right reason, motion's trace is found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from connectome_files import AFFINE, correlation_of, own_spec, pcp_text, planted, store_spec, write_atlas
from nifti_files import blob, scan_of, write_nifti
from PIL import Image
from store_builds import ingest

from models.records import SERIES
from models.spec import PreprocessSpec
from models.store import open_store
from tasks.atlas import desikan_killiany_labels
from tasks.qc import mosaic_of
from tasks.qc_connectomes import centres_of, dataset_picture, distance_dependence, matrix_picture
from tasks.qc_content import StoreQuality, gather
from tasks.qc_report import qc_csv, qc_page, render_qc

CASES = 14


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PreprocessSpec:
    return store_spec(own_spec(**write_atlas(tmp_path_factory.mktemp("atlas") / "six.nii.gz")))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, spec: PreprocessSpec) -> str:
    """Cases with a T1 and a connectome, of which the last has none; one connectome of few frames, without a T1."""
    folder = tmp_path_factory.mktemp("qc")
    scans = []
    for number in range(CASES):
        name = f"s{number:02d}"
        frames = 85 if number == 3 else 220 + 5 * (number % 3)
        (folder / f"{name}.1D").write_bytes(pcp_text(planted(correlation_of(number % 5), frames, number)))
        image = write_nifti(folder / f"{name}.nii.gz", blob((16, 16, 16), number), AFFINE)
        scans += [scan_of(image, "t1", name)] if number != 3 else []
        scans += [scan_of(folder / f"{name}.1D", SERIES, name)] if number != CASES - 1 else []
    url = str(folder / "s.zarr")
    ingest(url, scans, spec=spec)
    return url


@pytest.fixture(scope="module")
def found(store: str) -> StoreQuality:
    return gather(store, [], mosaics=2)


def test_few_frames_and_a_missing_connectome_stand_out(found: StoreQuality) -> None:
    why = {case["case"]: case["why"] for case in found.outliers}
    assert set(why) == {"s03", f"s{CASES - 1}"}
    assert any(reason.startswith("frames of the connectome is") for reason in why["s03"])
    assert "no t1, which nearly all others have" in why["s03"]
    assert why[f"s{CASES - 1}"] == ["no connectome, which nearly all others have"]
    numbers = {case["case"]: case for case in found.datasets[0].cases}
    assert numbers["s03"]["modalities"] == "connectome"
    assert numbers["s00"]["modalities"] == "t1 connectome"
    assert numbers["s00"]["numbers"]["frames of the connectome"] == 220
    assert numbers["s00"]["numbers"]["share of frames kept"] == 1


def test_pages_show_them(found: StoreQuality) -> None:
    (dataset,) = found.datasets
    assert dataset.connectomes is not None
    text = "distance dependence unknown (needs 8 cases whose motion is known, and the atlas's label image)"
    assert dataset.connectomes.caption == f"mean connectome of {CASES - 1} cases; {text}"
    page = render_qc(found)
    assert "<h3>Connectomes</h3>" in page
    assert "mean framewise displacement" in page
    assert "toy: mean connectome, motion, distance" in qc_page(found)
    assert "connectome_frames" in qc_csv(found).splitlines()[0]


def test_stores_without_connectomes_have_no_word_of_them(tmp_path: Path, spec: PreprocessSpec) -> None:
    files = [write_nifti(tmp_path / f"{n}.nii.gz", blob((16, 16, 16), n), AFFINE) for n in range(2)]
    scans = [scan_of(path, "t1", path.name[0]) for path in files]
    url = str(tmp_path / "s.zarr")
    ingest(url, scans, spec=spec.replace(connectome=None))
    plain = gather(url, [], mosaics=1)
    assert plain.datasets[0].connectomes is None
    assert "connectome" not in render_qc(plain) + qc_csv(plain) + qc_page(plain)


def test_a_store_without_any_image_has_its_report(tmp_path: Path, spec: PreprocessSpec) -> None:
    scans = []
    for number in range(9):
        path = tmp_path / f"s{number}.1D"
        path.write_bytes(pcp_text(planted(correlation_of(number), 120, number)))
        scans.append(scan_of(path, SERIES, path.stem))
    url = str(tmp_path / "s.zarr")
    ingest(url, scans, spec=spec)
    report = gather(url, [], mosaics=1)
    assert [picture.alt.split()[0] for picture in report.datasets[0].pictures] == ["toy"]
    assert report.datasets[0].modalities == []
    assert "<h3>Connectomes</h3>" in render_qc(report)
    assert qc_page(report)


def test_a_case_is_drawn_with_what_it_has(store: str) -> None:
    opened = open_store(store)
    sizes = {}
    for row, kind in ((0, "both"), (3, "connectome"), (CASES - 1, "image")):
        with Image.open(io.BytesIO(mosaic_of(opened, "toy", row))) as picture:
            sizes[kind] = picture.size
    assert sizes["both"][0] == sizes["image"][0] + sizes["connectome"][0]
    assert sizes["connectome"][1] <= sizes["both"][1]


def test_regions_without_signal_are_grey(spec: PreprocessSpec) -> None:
    assert spec.connectome is not None
    matrix = np.zeros((6, 6), np.float32)
    matrix[0, 1] = matrix[1, 0] = 1.2
    matrix[2] = matrix[:, 2] = np.nan
    with Image.open(io.BytesIO(matrix_picture(matrix, spec.connectome, "x"))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    corner, edge = np.array([14, 74]), 224 / 6
    seen = {
        name: pixels[int(corner[1] + (i + 0.5) * edge), int(corner[0] + (j + 0.5) * edge)]
        for name, i, j in (("strong", 0, 1), ("zero", 0, 3), ("none", 2, 4))
    }
    assert seen["strong"][0] > 90 > seen["strong"][2]  # red
    assert seen["zero"].min() > 230
    assert np.ptp(seen["none"]) < 30
    assert seen["none"].max() < 110


def test_what_motion_did_is_found() -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform(-60, 60, (20, 3))
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    moved = rng.uniform(0.05, 0.4, 40)
    clean = rng.normal(0.3, 0.1, (40, 20, 20))
    clean = (clean + clean.transpose(0, 2, 1)) / 2
    spoiled = clean + moved[:, None, None] * (1 - distance / 60)
    for matrices, low, high in ((clean, -0.2, 0.2), (spoiled, -1.0, -0.6)):
        dependence = distance_dependence(matrices, moved, centres)
        assert dependence is not None
        assert low < dependence.rho < high
        assert dependence.cases == 40
        assert len(dependence.qc_fc) == 190
    by_hand = np.corrcoef(spoiled[:, 2, 7], moved)[0, 1]
    one, other = np.triu_indices(20, 1)
    assert dependence.qc_fc[(one == 2) & (other == 7)][0] == pytest.approx(by_hand)
    assert distance_dependence(clean[:7], moved[:7], centres) is None
    assert distance_dependence(clean, np.full(40, np.nan), centres) is None
    assert distance_dependence(clean, np.full(40, 0.1), centres) is None


def test_motion_has_its_panels(store: str, spec: PreprocessSpec) -> None:
    motion = {row: 0.1 + 0.02 * row for row in range(CASES - 1)}
    picture = dataset_picture(open_store(store), "toy", motion)
    assert picture is not None
    assert "median of the mean framewise displacement 0.22 mm" in picture.caption
    assert "over 15 connections of 13 cases" in picture.caption
    with Image.open(io.BytesIO(picture.png)) as drawn:
        assert drawn.width > 900
    assert dataset_picture(open_store(store), "toy", {}) is None


def test_centres_come_from_the_atlas(spec: PreprocessSpec) -> None:
    assert spec.connectome is not None
    centres = centres_of(spec.connectome)
    assert centres is not None
    np.testing.assert_allclose(centres[0], AFFINE[:3, :3] @ [3.5, 5.5, 7.5] + AFFINE[:3, 3])
    assert centres_of(own_spec()) is None
    assert centres_of(own_spec(atlas_image="/nowhere/six.nii", atlas_sha256="00")) is None
    shipped = centres_of(own_spec(atlas="desikan_killiany", regions=(), values=()))
    assert shipped is not None
    assert shipped.shape == (68, 3)
    labels, _ = desikan_killiany_labels()
    assert sorted(np.unique(labels)) == list(range(69))
    left, right = shipped[:34, 0], shipped[34:, 0]
    assert left.max() < 0 < right.min()
