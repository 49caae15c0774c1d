import numpy as np
import pytest
from nifti_files import SMALL, blob, centred, planned, write_case, write_nifti

from models.records import Reason
from tasks.affines import BadScanError
from tasks.prepare import prepare_case

MASKED = SMALL.replace(brain_mask="file")


def mask_of(shape=(30, 28, 24), step=1):
    mask = np.zeros(shape, np.uint8)
    mask[8 // step : 20 // step, 6 // step : 20 // step, 6 // step : 18 // step] = 1
    return mask


def test_everything_outside_the_mask_becomes_air(tmp_path):
    files = write_case(tmp_path, "s1", label=True)
    files["brain_mask"] = write_nifti(tmp_path / "mask.nii.gz", mask_of())
    found = prepare_case(planned(files), MASKED)
    by_hand = {
        m: write_nifti(tmp_path / f"{m}_masked.nii.gz", mask_of() * np.asarray(blob_of(files[m]))) for m in ("t1", "t2")
    }
    expected = prepare_case(planned({**by_hand, "label": files["label"]}), SMALL)
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.label, expected.label)
    assert found.geometry.intensity_range == expected.geometry.intensity_range
    assert "ignored_modalities" not in found.qc
    plain = prepare_case(planned(files), SMALL)
    assert plain.extent != found.extent  # the mask is used only when the spec says so
    assert "ignored_modalities" not in plain.qc


def blob_of(path):
    import nibabel as nib

    return nib.load(path).get_fdata().astype(np.float32)


def test_a_mask_on_another_grid_and_in_another_orientation(tmp_path):
    scan = write_nifti(tmp_path / "t1.nii.gz", blob())
    coarse = np.diag([2.0, 2, 2, 1])
    coarse[:3, 3] = centred((30, 28, 24))[:3, 3] + 0.5
    turned = coarse @ np.array([[-1, 0, 0, 14], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    mask = write_nifti(tmp_path / "mask.nii.gz", np.ascontiguousarray(mask_of((15, 14, 12), 2)[::-1]), turned)
    found = prepare_case(planned({"t1": scan, "brain_mask": mask}), MASKED)
    fine = write_nifti(tmp_path / "fine.nii.gz", mask_of())
    expected = prepare_case(planned({"t1": scan, "brain_mask": fine}), MASKED)
    np.testing.assert_array_equal(found.image, expected.image)


def test_masks_that_cannot_be_used(tmp_path):
    files = write_case(tmp_path, "s1")
    for mask, reason, text in (
        (None, Reason.NO_MASK, "the case has no file of brain_mask"),
        (np.zeros((30, 28, 24), np.uint8), Reason.NO_MASK, "mask.nii.gz: the brain mask is empty"),
        (np.full((30, 28, 24), 0.5, np.float32), Reason.LABEL_VALUES, "labels must be integers"),
        (np.pad(np.ones((2, 2, 2), np.uint8), ((0, 28), (0, 26), (0, 22))), Reason.EMPTY, "nothing but zeros inside"),
    ):
        if mask is not None:
            files["brain_mask"] = write_nifti(tmp_path / "mask.nii.gz", mask)
        with pytest.raises(BadScanError, match=text) as error:
            prepare_case(planned(files), MASKED)
        assert error.value.reason == reason
