import connectome_stores
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from connectome_stores import Made
from nifti_files import FIXED, SMALL, blob, centred, write_case, write_nifti
from store_builds import ingest, scans_of

from infra import storage
from models.records import Receipt
from models.store import StoreError, open_store
from tasks import prepare
from tasks.connectome import matrix_text
from tasks.export_nifti import export_cases, onto_grid
from tasks.receipts import receipt_url
from tasks.registration import Move

TOLERANCE = 5e-4
"""Of (high - low): half precision, on a source grid with the stored spacing."""


def stored(tmp_path, files, spec=SMALL):
    url = str(tmp_path / "s.zarr")
    ingest(url, scans_of(files, "a"), spec=spec)
    return url


def test_the_stored_grid(tmp_path):
    url = stored(tmp_path, write_case(tmp_path, "a", label=True))
    files = export_cases(url, ["toy/a"], tmp_path / "out")
    assert [path.name for path in files] == ["toy_a_t1.nii.gz", "toy_a_t2.nii.gz", "toy_a_label.nii.gz"]
    data = open_store(url).dataset("toy")
    image, label = data.read_case(0)
    for path, expected in zip(files, [image[1], image[2], label], strict=True):
        found = nib.load(path)
        np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
        np.testing.assert_allclose(found.affine, data.case_info(0).affine)
        assert found.header["descrip"].item().decode() == f"brainloom {data.case_info(0).digest}"
        assert int(found.header["sform_code"]) == int(found.header["qform_code"]) == 1


def test_a_case_that_is_named_twice_is_written_once(tmp_path):
    url = stored(tmp_path, write_case(tmp_path, "a"))
    assert len(export_cases(url, ["toy/a", "toy/a"], tmp_path / "out")) == 2


def within(source, low, high):
    """Voxels whose intensity survived: tissue between the percentiles."""
    return (source > max(low, 0)) & (source < high)


@pytest.mark.parametrize("axes", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_native_is_the_source_again(tmp_path, axes):
    values = blob()
    flipped = values[tuple(slice(None, None, step) for step in axes)]
    affine = centred(values.shape) @ np.diag([*axes, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(values.shape) - 1) / 2)
    mask = np.zeros(values.shape, np.uint8)
    mask[10:14, 10:15, 8:12] = 3
    files = {
        "t1": write_nifti(tmp_path / "t1.nii.gz", flipped, affine),
        "label": write_nifti(tmp_path / "seg.nii.gz", mask, affine),
    }
    url = stored(tmp_path, files)
    t1, label = (nib.load(path) for path in export_cases(url, ["toy/a"], tmp_path / "out", native=True))
    np.testing.assert_allclose(t1.affine, affine)
    assert t1.shape == values.shape
    low, high = open_store(url).dataset("toy").small("intensity_range")[0, 1]
    kept = within(flipped, low, high)
    assert kept.mean() > 0.1
    np.testing.assert_allclose(t1.get_fdata()[kept], flipped[kept], atol=TOLERANCE * (high - low))
    assert not t1.get_fdata()[flipped == 0].any()
    np.testing.assert_array_equal(np.asarray(label.dataobj), mask)


def test_native_goes_back_through_a_template_grid(tmp_path):
    x, y, z = np.meshgrid(*(np.arange(n) for n in (30, 28, 24)), indexing="ij")
    values = (200 + 2 * x + 3 * y + 4 * z).astype(np.float32)  # linear: trilinear steps there and back lose nothing
    mask = (x > 14).astype(np.uint8)
    files = {"t1": write_nifti(tmp_path / "t1.nii.gz", values), "label": write_nifti(tmp_path / "seg.nii.gz", mask)}
    url = stored(tmp_path, files, FIXED)
    t1, label = (nib.load(path) for path in export_cases(url, ["toy/a"], tmp_path / "out", native=True))
    assert t1.shape == values.shape
    low, high = open_store(url).dataset("toy").small("intensity_range")[0, 1]
    kept = within(values, low + 28, high - 28)  # beyond that a 3 mm neighbour was clipped
    kept[:3], kept[-3:], kept[:, :3], kept[:, -3:], kept[:, :, :3], kept[:, :, -3:] = (False,) * 6
    assert kept.mean() > 0.2
    np.testing.assert_allclose(t1.get_fdata()[kept], values[kept], atol=2 * TOLERANCE * (high - low))
    inner = (slice(3, -3),) * 3
    assert (
        np.asarray(label.dataobj)[inner] != mask[inner]
    ).mean() < 0.1  # of 24 planes, the two at the border may differ
    on_grid = export_cases(url, ["toy/a"], tmp_path / "grid", modalities=["t1"])
    assert [int(nib.load(path).header["sform_code"]) for path in on_grid] == [4]


REGISTERED = FIXED.replace(registration="affine")


@pytest.fixture
def moved(monkeypatch):
    """Registration finds this matrix: a turn of 8 degrees, a shift and a slight stretch."""
    angle = np.deg2rad(8)
    matrix = np.diag([1.03, 1.0, 0.98, 1.0])
    matrix[:2, :2] = [[1.03 * np.cos(angle), -np.sin(angle)], [1.03 * np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = (3, -2, 1)
    monkeypatch.setattr(prepare.registration, "register", lambda scan, spec: Move(matrix, 0.9))
    return matrix


def test_native_lies_in_the_world_of_the_files_after_registration(tmp_path, moved):
    data, mask = blob(), np.zeros((30, 28, 24), np.uint8)
    mask[10:20, 9:19, 8:16] = 2
    away = np.linalg.inv(moved) @ centred(data.shape)  # so that registration brings the head to the centre of the grid
    files = {
        "t1": write_nifti(tmp_path / "t1.nii.gz", data, away),
        "label": write_nifti(tmp_path / "seg.nii.gz", mask, away),
    }
    url = stored(tmp_path, files, REGISTERED)
    t1, label = (nib.load(path) for path in export_cases(url, ["toy/a"], tmp_path / "out", native=True))
    for found in (t1, label):
        np.testing.assert_allclose(found.affine, nib.load(files["t1"]).affine, atol=1e-5)
        assert found.shape == data.shape
    assert np.corrcoef(t1.get_fdata().ravel(), data.ravel())[0, 1] > 0.95  # through voxels of 3 mm and back
    both = (np.asarray(label.dataobj) == 2) & (mask == 2)
    assert 2 * both.sum() / ((np.asarray(label.dataobj) == 2).sum() + (mask == 2).sum()) > 0.8
    (grid,) = export_cases(url, ["toy/a"], tmp_path / "grid", modalities=["t1"])
    np.testing.assert_allclose(nib.load(grid).affine, open_store(url).dataset("toy").case_info(0).affine)


@pytest.mark.parametrize("t1_first", [True, False])
def test_a_file_of_grey_matter_returns_to_where_it_lay_for_it_was_never_moved(tmp_path, moved, t1_first):
    grey = (blob((12, 14, 11), margin=1) / 400).astype(np.float32)
    place = np.asarray(FIXED.grid_affine)  # of the template: not a voxel is interpolated there and back
    head, mask = blob(), np.zeros((30, 28, 24), np.uint8)
    mask[10:20, 9:19, 8:16] = 2
    away = np.linalg.inv(moved) @ centred(head.shape) if t1_first else centred(head.shape)
    files = {
        "t1": write_nifti(tmp_path / "t1.nii.gz", head, away),
        "gm": write_nifti(tmp_path / "mwp1.nii.gz", grey, place),
        "label": write_nifti(tmp_path / "seg.nii.gz", mask, away),
    }
    order = ("t1", "gm") if t1_first else ("gm", "t1")
    spec = REGISTERED.replace(modalities=("t1", "gm"), intensity="keep", reference_order=order)
    url = stored(tmp_path, files, spec)
    registration = Receipt.model_validate_json(storage.read_bytes(receipt_url(url, "toy", 0))).geometry.registration
    assert (registration is not None) == t1_first
    found = {path.name: nib.load(path) for path in export_cases(url, ["toy/a"], tmp_path / "out", native=True)}
    np.testing.assert_allclose(found["toy_a_gm.nii.gz"].affine, place, atol=1e-6)
    np.testing.assert_allclose(found["toy_a_gm.nii.gz"].get_fdata(), grey, atol=TOLERANCE)
    np.testing.assert_allclose(found["toy_a_t1.nii.gz"].affine, nib.load(files["t1"]).affine, atol=1e-5)
    assert np.corrcoef(found["toy_a_t1.nii.gz"].get_fdata().ravel(), head.ravel())[0, 1] > 0.95
    data = open_store(url).dataset("toy")
    label = data.read_case(0)[1]
    again = onto_grid(data, 0, label, mask.shape, away)  # of the label, in the world of its file
    assert 2 * ((again == 2) & (mask == 2)).sum() / ((again == 2).sum() + (mask == 2).sum()) > 0.8
    storage.delete(receipt_url(url, "toy", 0))
    with pytest.raises(StoreError, match=r"toy/a: .*00000000\.json, which holds its registration, is missing"):
        export_cases(url, ["toy/a"], tmp_path / "out", native=True, modalities=["gm"], overwrite=True)


def test_native_without_the_registration_is_refused(tmp_path, moved):
    url = stored(tmp_path, write_case(tmp_path, "a"), REGISTERED)
    storage.delete(receipt_url(url, "toy", 0))
    with pytest.raises(
        StoreError, match=r"toy/a: .*00000000\.json, which holds its registration, is missing; preprocess"
    ):
        export_cases(url, ["toy/a"], tmp_path / "out", native=True)
    assert not (tmp_path / "out" / "toy_a_t1.nii.gz").exists()
    assert len(export_cases(url, ["toy/a"], tmp_path / "out")) == 2


def test_each_modality_returns_to_its_own_grid(tmp_path):
    fine = blob()
    affine = centred(fine.shape) @ np.diag([1, 1, 2, 1])
    files = {
        "t1": write_nifti(tmp_path / "t1.nii.gz", fine),
        "t2": write_nifti(tmp_path / "t2.nii.gz", fine[:, :, ::2], affine),
    }
    url = stored(tmp_path, files)
    _, t2 = (nib.load(path) for path in export_cases(url, ["toy/a"], tmp_path / "out", native=True))
    assert t2.shape == (30, 28, 12)
    np.testing.assert_allclose(t2.affine, affine)
    low, high = open_store(url).dataset("toy").small("intensity_range")[0, 2]
    source = fine[:, :, ::2]
    kept = within(source, low, high)
    kept[:, :, [0, 1, 2, -3, -2, -1]] = False
    np.testing.assert_allclose(t2.get_fdata()[kept], source[kept], atol=TOLERANCE * (high - low))


def test_what_cannot_be_exported_is_refused(tmp_path):
    url = stored(tmp_path, write_case(tmp_path, "a"))
    with pytest.raises(StoreError, match=r"no stored case 'toy/x' in .*; for example 'toy/a'"):
        export_cases(url, ["toy/x"], tmp_path / "out")
    for absent in ("flair", "label"):
        with pytest.raises(StoreError, match=f"toy/a has no {absent}; it has: t1, t2"):
            export_cases(url, ["toy/a"], tmp_path / "out", modalities=[absent])
    export_cases(url, ["toy/a"], tmp_path / "out", modalities=["t1"])
    with pytest.raises(StoreError, match=r"toy_a_t1.nii.gz exists; choose another folder or pass --overwrite"):
        export_cases(url, ["toy/a"], tmp_path / "out")
    assert len(export_cases(url, ["toy/a"], tmp_path / "out", overwrite=True)) == 2


@pytest.mark.full
def test_export_from_s3(tmp_path, s3_url):
    files = write_case(tmp_path, "a", label=True)
    url = storage.join(s3_url, "s.zarr")
    ingest(url, scans_of(files, "a"))
    assert len(export_cases(url, ["toy/a"], tmp_path / "out", native=True)) == 3


def test_a_connectome_is_written_as_a_table(tmp_path):
    store = tmp_path / "s.zarr"
    connectome_stores.write_store(str(store), [Made("a"), Made("b", image=False), Made("c", network=False)])
    names = [f"{connectome_stores.DATASET}/{case}" for case in "abc"]
    files = export_cases(str(store), names, tmp_path / "out", native=False)
    table = f"{connectome_stores.DATASET}_b_connectome.tsv"
    assert [path.name.split("_", 1)[1] for path in files] == [
        "a_t1.nii.gz", "a_connectome.tsv", "b_connectome.tsv", "c_t1.nii.gz",
    ]  # fmt: skip
    found = pd.read_csv(tmp_path / "out" / table, sep="\t", index_col="region")
    assert tuple(found.columns) == tuple(found.index) == connectome_stores.FEW.regions
    np.testing.assert_array_equal(found.to_numpy(np.float32), connectome_stores.matrix_of(1))
    (only,) = export_cases(str(store), names[:1], tmp_path / "one", modalities=["connectome"])
    assert only.name == f"{connectome_stores.DATASET}_a_connectome.tsv"
    with pytest.raises(StoreError, match="b has no t1; it has: connectome"):
        export_cases(str(store), names[1:2], tmp_path / "none", modalities=["t1"])


def test_regions_without_signal_have_no_number():
    matrix = np.array([[0, np.nan, 0.1], [np.nan] * 3, [0.1, np.nan, 0]], np.float32)
    assert matrix_text(matrix, ("a", "b", "c")) == (
        "region\ta\tb\tc\na\t0.0\tn/a\t0.1\nb\tn/a\tn/a\tn/a\nc\t0.1\tn/a\t0.0\n"
    )
