import errno
import json
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from nifti_files import FIXED, SMALL, blob, centred, oblique, planned, write_case, write_nifti

from infra import storage
from models.records import PlannedCase, Reason
from models.store import create_or_open, open_store
from tasks import receipts, shards
from tasks.affines import BadScanError
from tasks.plan import write_plan
from tasks.prepare import prepare_case
from tasks.preprocess import CasesFailedError, preprocess_batch, preprocess_case
from tasks.verify import verify


def refused(case, spec, reason, text):
    with pytest.raises(BadScanError, match=text) as error:
        prepare_case(case, spec)
    assert error.value.reason == reason


def test_image_frame_equals_the_steps_done_by_hand(tmp_path):
    files = write_case(tmp_path, "s1", label=True)
    raw = {m: nib.load(files[m]).get_fdata() for m in ("t1", "t2")}
    found = prepare_case(planned(files), SMALL)
    # Foreground is [4:-4] on each axis, already symmetric.
    crop = (slice(4, 26), slice(4, 24), slice(4, 20))
    for index, modality in ((1, "t1"), (2, "t2")):
        low, high = np.percentile(raw[modality][crop], [5, 95])
        expected = np.clip((raw[modality][crop] - low) / (high - low), 0, 1)
        inner = tuple(slice(s.start - 4, s.stop - 4) for s in crop)
        start = [o - (g - n) // 2 for o, g, n in zip(found.geometry.origin, SMALL.grid, found.extent, strict=True)]
        assert start == [0, 0, 0]
        np.testing.assert_allclose(found.image[index], expected[inner], atol=2e-3)
        assert found.geometry.intensity_range[modality] == pytest.approx((low, high), rel=1e-5)
    assert found.present == (False, True, True)
    assert not found.image[0].any()
    assert found.extent == (22, 20, 16)
    assert found.geometry.origin == (9, 8, 7)
    np.testing.assert_allclose(np.array(found.geometry.affine)[:3, 3], [-14.5 + 4, -13.5 + 4, -11.5 + 4])
    np.testing.assert_array_equal(found.label, nib.load(files["label"]).get_fdata()[crop])
    assert found.qc["label_values"] == [0, 1]
    json.dumps(found.qc, allow_nan=False)


def test_image_frame_crops_twice_when_scaling_empties_the_rim(tmp_path):
    values = blob((32, 30, 28), margin=2)
    values[2:4] = np.where(values[2:4] > 0, 0.5, 0)
    values[-4:-2] = np.where(values[-4:-2] > 0, 0.5, 0)
    case = planned({"t1": write_nifti(tmp_path / "a.nii.gz", values)})
    found = prepare_case(case, SMALL)
    assert found.extent[0] == 24
    assert found.geometry.origin[0] == (40 - 24) // 2
    np.testing.assert_allclose(found.geometry.affine[0][3], -15.5 + 4)


def test_other_grids_are_resampled_onto_the_reference(tmp_path):
    fine = blob((30, 28, 24))
    thick = fine[:, :, ::2]
    affine = centred(fine.shape) @ np.diag([1, 1, 2, 1])
    files = {"t1": write_nifti(tmp_path / "t1.nii", fine), "flair": write_nifti(tmp_path / "f.nii", thick, affine)}
    found = prepare_case(planned(files), SMALL)
    assert found.present == (True, True, False)
    low, high = found.geometry.intensity_range["flair"]
    back = found.image[0].astype(float) * (high - low) + low
    first = round(found.geometry.affine[2][3] + 11.5)
    assert first == 3  # the plane before the first of tissue is half tissue
    planes = slice(4, 20, 2)  # of the thick slices, where nothing is interpolated
    stored = back[:, :, planes.start - first : planes.stop - first : 2]
    np.testing.assert_allclose(stored, np.clip(fine[4:-4, 4:-4, planes], low, high), atol=0.003 * high)


def test_template_frame_places_a_scan_where_its_affine_says(tmp_path):
    from nilearn.image import resample_img

    affine = nib.affines.from_matvec(np.diag([-1.0, 1.2, 1.0]), [14, -16, -12])
    path = write_nifti(tmp_path / "t1.nii.gz", blob().astype(np.int16), affine, slope=1.5)
    found = prepare_case(planned({"t1": path}), FIXED)
    other = resample_img(
        nib.load(path),
        np.array(FIXED.grid_affine),
        FIXED.grid,
        interpolation="linear",
        copy_header=True,
        force_resample=True,
    ).get_fdata()
    hit = np.argwhere(other > 0)
    assert found.geometry.origin == tuple(hit.min(axis=0))
    assert found.extent == tuple(hit.max(axis=0) - hit.min(axis=0) + 1)
    crop = tuple(slice(a, b + 1) for a, b in zip(hit.min(axis=0), hit.max(axis=0), strict=True))
    low, high = np.percentile(other[crop], [5, 95])
    np.testing.assert_allclose(found.image[1], np.clip((other[crop] - low) / (high - low), 0, 1), atol=2e-3)
    np.testing.assert_allclose(
        np.array(found.geometry.affine) @ [0, 0, 0, 1],
        np.array(FIXED.grid_affine) @ [*found.geometry.origin, 1],
    )


def test_the_share_that_a_fixed_grid_cuts_off_is_kept_and_no_other_frame_has_one(tmp_path):
    whole = write_nifti(tmp_path / "whole.nii.gz", blob())
    moved = centred((30, 28, 24))
    moved[1, 3] += 21 + 0.5  # the grid's front face then runs through the middle of the tissue
    half = write_nifti(tmp_path / "half.nii.gz", blob(), moved)
    inside, cut = (prepare_case(planned({"t1": path}), FIXED).qc["outside_grid_t1"] for path in (whole, half))
    assert inside == 0
    assert 0.4 < cut < 0.6
    assert "outside_grid_t1" not in prepare_case(planned({"t1": whole}), SMALL).qc


def test_reasons(tmp_path):
    good = write_case(tmp_path, "s1")
    far = centred((30, 28, 24))
    far[:3, 3] += 500
    shifted = centred((30, 28, 24))
    shifted[2, 3] += 3
    label = np.ones((30, 28, 24), np.uint8)
    write = lambda name, *a, **k: write_nifti(tmp_path / f"{name}.nii.gz", *a, **k)  # noqa: E731
    refused(planned({**good, "t2": write("a", blob(), far)}), SMALL, Reason.NO_OVERLAP, "a.nii.gz: centre at")
    refused(planned({"t1": write("b", blob(), far)}), FIXED, Reason.NO_OVERLAP, "b.nii.gz")
    refused(planned({**good, "label": write("c", label[:-1])}), SMALL, Reason.LABEL_SHAPE, r"\(29, 28, 24\) voxels")
    refused(planned({**good, "label": write("d", label, shifted)}), SMALL, Reason.LABEL_SHAPE, "by 3.0 voxels")
    refused(planned({**good, "label": write("e", blob())}), SMALL, Reason.LABEL_VALUES, "integers of 0")
    refused(planned({"mra": good["t1"]}), SMALL, Reason.NO_SCAN, r"files of \['mra'\]")
    refused(planned({"t1": write("f", blob((60, 20, 20)))}), SMALL, Reason.TOO_LARGE, r"\(52, 12, 12\) voxels after")
    gone = planned(good)
    good["t2"].unlink()
    refused(gone, SMALL, Reason.MISSING_FILE, "is not there any more")
    good["t2"].write_bytes(b"12345")
    refused(gone, SMALL, Reason.UNREADABLE, r"has 5 bytes, the catalog says \d+")
    twice = PlannedCase(**{**gone.model_dump(), "files": [gone.files[0], gone.files[0]]})
    refused(twice, SMALL, Reason.DUPLICATE_SCAN, "more than one file of t1")


def test_unknown_modalities_are_flagged_not_lost_in_silence(tmp_path):
    files = write_case(tmp_path, "s1")
    found = prepare_case(planned({**files, "bold": files["t1"]}), SMALL)
    assert found.qc["ignored_modalities"] == ["bold"]


@pytest.fixture
def store(tmp_path):
    writer = create_or_open(str(tmp_path / "s.zarr"), SMALL)
    writer.grow("toy", 4, with_label=True)
    return writer


def test_a_case_goes_through_the_store_and_back(tmp_path, store):
    case = planned(write_case(tmp_path, "s1", label=True), row=2)
    receipt = preprocess_case(case, SMALL, store)
    assert receipt.status == "stored"
    receipts.write_receipt(store.url, receipt)
    assert receipts.read_receipt(store.url, case, SMALL.content_digest()) == receipt
    write_plan(store.url, [case], SMALL.content_digest())
    shards.finalise(store.url, [case])
    data = open_store(store.url).dataset("toy")
    prepared = prepare_case(case, SMALL)
    image, label = data.read_case(2)
    np.testing.assert_array_equal(image, prepared.image)
    np.testing.assert_array_equal(label, prepared.label)
    assert verify(store.url, deep=True) == []


def test_batch_skips_what_has_a_receipt_and_quarantines_what_kills(tmp_path, store):
    lines = [
        planned(write_case(tmp_path, f"s{n}", n), row=n, subject=f"s{n}").model_dump(mode="json") for n in range(3)
    ]
    broken = tmp_path / "s1_t1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    lines[1] = planned({"t1": broken}, row=1, subject="s1").model_dump(mode="json")
    killer = PlannedCase.model_validate(lines[2])
    for _ in range(receipts.MAX_ATTEMPTS):
        assert receipts.claim_attempt(store.url, "token", killer)
    found = preprocess_batch(store.url, lines, "token")
    assert [line["status"] for line in found] == ["stored", "quarantined", "quarantined"]
    assert found[1]["reason"] == "unreadable"
    assert found[2]["reason"] == "killed the worker"
    assert found[2]["detail"] == "its worker process died 2 times while it was being preprocessed"
    json.dumps(found, allow_nan=False)
    # Sources may vanish once the receipts are there.
    for path in tmp_path.glob("*.nii.gz"):
        path.unlink()
    assert preprocess_batch(store.url, lines, "other token") == found


def test_a_bug_raises_and_leaves_no_receipt(tmp_path, store):
    case = planned(write_case(tmp_path, "s1"), row=9)
    with pytest.raises(RuntimeError, match="row 9 of toy was not planned"):
        preprocess_batch(store.url, [case.model_dump(mode="json")], "token")
    assert receipts.receipt_rows(store.url, ["toy"]) == set()


@pytest.mark.parametrize("degrees", [0, 12])
def test_voxels_do_not_depend_on_the_number_of_threads(tmp_path, degrees):
    fine = blob((60, 56, 50), margin=6)
    affine = oblique((60, 56, 25), (0.7, 0.8, 1.5), degrees)
    files = {
        "t1": write_nifti(tmp_path / "t1.nii.gz", fine, oblique(fine.shape, (0.7, 0.8, 0.75), 0)),
        "t2": write_nifti(tmp_path / "t2.nii.gz", (fine[:, :, ::2] * 100).astype(np.int16), affine),
    }
    spec, before = SMALL.replace(grid=(60, 60, 60)), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(prepare_case(planned(files), spec))
    torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0].image, found[1].image)
    assert found[0].geometry == found[1].geometry
    assert found[0].qc == found[1].qc


@pytest.mark.parametrize(("scheme", "enhancing", "wrong"), [("brats2021", 4, 3), ("brats2023", 3, 4)])
def test_labels_of_another_year_are_refused_for_their_scheme(tmp_path, scheme, enhancing, wrong):
    """BraTS moved enhancing tumour from 4 to 3: with the wrong scheme that region would be empty in every case."""
    data = blob()
    for value in (enhancing, wrong):
        mask = np.zeros(data.shape, np.uint8)
        mask[10:14, 10:14, 8:12] = 2
        mask[11:13, 11:13, 9:11] = value
        files = {
            "t1": write_nifti(tmp_path / f"{value}_t1.nii.gz", data),
            "label": write_nifti(tmp_path / f"{value}.nii.gz", mask),
        }
        case = planned(files).replace(label_scheme=scheme)
        if value == enhancing:
            assert prepare_case(case, SMALL).qc["label_values"] == [0, 2, enhancing]
            continue
        known = rf"\[0, 1, 2, {enhancing}\]"
        text = rf"{wrong}\.nii\.gz: label values \[{wrong}\] are outside scheme '{scheme}', which knows {known} only"
        refused(case, SMALL, Reason.LABEL_VALUES, text)
        assert prepare_case(case.replace(label_scheme="own"), SMALL).qc["label_values"] == [0, 2, wrong]


def test_a_failing_case_costs_only_itself(tmp_path, store):
    cases = [planned(write_case(tmp_path, f"s{n}", n), row=row, subject=f"s{n}") for n, row in enumerate((9, 0, 8, 1))]
    text = (
        r"2 of 4 cases failed, the others are done: toy/s0 \(row 9\): StoreError: row 9 of toy was not planned: .*; "
        r"toy/s2 \(row 8\): StoreError: row 8"
    )
    with pytest.raises(CasesFailedError, match=text) as error:
        preprocess_batch(store.url, [case.model_dump(mode="json") for case in cases], "token")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert receipts.receipt_rows(store.url, ["toy"]) == {("toy", 0), ("toy", 1)}


@pytest.mark.parametrize(("away", "tried"), [((1,), 4), ((1, 2), 3)])
def test_a_batch_ends_when_the_storage_is_away_for_two_cases_on_end(tmp_path, store, monkeypatch, away, tried):
    cases = [planned(write_case(tmp_path, f"s{n}", n), row=n, subject=f"s{n}") for n in range(4)]
    begun = []

    def prepare(case, *_):
        begun.append(case.row)
        if case.row in away:
            raise storage.StorageError(f"could not read s3://{case.row}")
        return prepare_case(case, SMALL)

    monkeypatch.setattr("tasks.preprocess.prepare_case", prepare)
    with pytest.raises(storage.StorageError, match="could not read s3://"):
        preprocess_batch(store.url, [case.model_dump(mode="json") for case in cases], "token")
    assert len(begun) == tried


def test_a_source_that_the_disk_cannot_read_is_quarantined(tmp_path, store, monkeypatch):
    files = write_case(tmp_path, "s1")
    case = planned(files)

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("tasks.source_files.storage.read_bytes", failing)
        refused(case, SMALL, Reason.UNREADABLE, r"s1_t1\.nii\.gz cannot be read: Input/output error")
    files["t1"].unlink()
    files["t1"].mkdir()
    (found,) = preprocess_batch(store.url, [case.model_dump(mode="json")], "token")
    assert (found["status"], found["reason"]) == ("quarantined", "unreadable")
    assert found["detail"].endswith("s1_t1.nii.gz cannot be read: Is a directory")
