"""Known transforms and bias fields are recovered. The phantom is nilearn's MNI152 at 4 mm: seconds, not minutes."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from nifti_files import planned, write_nifti
from nilearn import datasets

from models.records import Reason
from models.spec import SPECS
from tasks import registration
from tasks.affines import BadScanError
from tasks.nifti import Volume
from tasks.prepare import prepare_case
from tasks.registration import MissingExtraError, register, require_extra, without_bias

DEMO = SPECS["demo"]
RIGID = DEMO.replace(registration="rigid")
N4 = DEMO.replace(bias_correction="n4")


@pytest.fixture(scope="module")
def head():
    image = datasets.load_mni152_template(resolution=4)
    return Volume(torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32)), image.affine, "head")


@pytest.fixture(scope="module")
def coarse(head, tmp_path_factory):
    """Specs whose template is the head itself at 4 mm: a sixth of the time."""
    path = write_nifti(tmp_path_factory.mktemp("t") / "template.nii.gz", head.data.numpy(), head.affine)
    rigid = RIGID.replace(template=str(path), template_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return {"rigid": rigid, "affine": rigid.replace(registration="affine")}


def moved(degrees, shift_mm, stretch=1.0):
    """Return the matrix that puts a file's world elsewhere: turned about z, shifted, stretched."""
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, :3] *= stretch
    matrix[:3, 3] = shift_mm
    return matrix


def gap_mm(a, b):
    """Return the largest distance of two transforms over a brain's box."""
    corners = np.array(np.meshgrid((-70, 70), (-105, 70), (-70, 80), (1,))).reshape(4, -1)
    return np.linalg.norm(((a - b) @ corners)[:3], axis=0).max()


@pytest.mark.parametrize(("kind", "stretch"), [("rigid", 1.0), ("affine", 1.08)])
def test_a_known_transform_is_recovered_within_half_a_voxel(head, coarse, kind, stretch):
    true = moved(9, (7, -5, 4), stretch)
    found = register(head.replace(affine=np.linalg.inv(true) @ head.affine), coarse[kind])
    assert gap_mm(found.matrix, true) < 2
    assert found.correlation > 0.9


def test_registration_moves_all_files_of_a_case(head, coarse, tmp_path):
    true = moved(-8, (5, 6, -4))
    affine = np.linalg.inv(true) @ head.affine
    data = head.data.numpy()
    files = {
        "t1": write_nifti(tmp_path / "t1.nii.gz", data, affine),
        "t2": write_nifti(tmp_path / "t2.nii.gz", (data.max() * 1.1 - data) * (data > 0), affine),
        "label": write_nifti(tmp_path / "seg.nii.gz", (data > 0.8).astype(np.uint8), affine),
    }
    still = {"t1": write_nifti(tmp_path / "still.nii.gz", data, head.affine)}
    found, expected = prepare_case(planned(files), coarse["rigid"]), prepare_case(planned(still), DEMO)
    both = np.zeros((2, *DEMO.grid), np.float32)
    for place, case in zip(both, (found, expected), strict=True):
        box = tuple(slice(o, o + n) for o, n in zip(case.geometry.origin, case.extent, strict=True))
        place[box] = case.image[1]
    assert np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1] > 0.99
    assert gap_mm(np.array(found.geometry.registration), true) < 2
    assert found.qc["registration_correlation"] > 0.9
    assert expected.geometry.registration is None
    inside = found.label > 0
    assert found.image[1][inside].mean() > 0.6
    assert found.image[3][inside].mean() < 0.4
    again = prepare_case(planned(files), coarse["rigid"])
    np.testing.assert_array_equal(again.image, found.image)


def test_a_known_bias_field_is_removed(head, monkeypatch):
    monkeypatch.setattr(registration, "N4_GRID_MM", 8.0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in head.shape), indexing="ij")
    field = np.exp(0.4 * axes[0] + 0.3 * axes[1] * axes[2]).astype(np.float32)
    found = without_bias(head.replace(data=head.data * torch.from_numpy(field)))
    inside = head.data.numpy() > 0.3
    left = (found.data / head.data).numpy()[inside]
    # 14 % of variation before, a third of it after: anatomy is a part of what N4 takes for bias.
    assert field[inside].std() / field[inside].mean() > 0.12
    assert left.std() / left.mean() < 0.06
    assert not found.data[head.data == 0].any()


def test_n4_is_a_step_of_the_spec(head, tmp_path, monkeypatch):
    case = planned({"t1": write_nifti(tmp_path / "t1.nii.gz", head.data.numpy(), head.affine)})
    monkeypatch.setattr(registration, "without_bias", lambda volume: volume.replace(data=volume.data * 2))
    plain, doubled = prepare_case(case, DEMO), prepare_case(case, N4)
    assert doubled.geometry.intensity_range["t1"] == pytest.approx(np.multiply(plain.geometry.intensity_range["t1"], 2))
    assert N4.content_digest() != DEMO.content_digest()


def test_a_result_that_is_no_head_is_refused(head, coarse, monkeypatch):
    monkeypatch.setattr(registration, "_matrix_of", lambda transform: np.diag([2.5, 1, 1, 1]))
    with pytest.raises(
        BadScanError, match=r"head: registration to .*template.nii.gz stretches by 1.00 to 2.50"
    ) as error:
        register(head, coarse["affine"])
    assert error.value.reason == Reason.REGISTRATION


def test_a_template_from_a_file_must_be_the_one_of_the_spec(head, tmp_path):
    path = write_nifti(tmp_path / "own.nii.gz", head.data.numpy(), head.affine)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    require_extra(RIGID.replace(template=str(path), template_sha256=right))
    with pytest.raises(ValueError, match=f"has the SHA-256 {right}, the spec says 00; correct template_sha256"):
        require_extra(RIGID.replace(template=str(path), template_sha256="00"))


def test_a_template_that_is_not_there_is_named(tmp_path):
    spec = RIGID.replace(template=str(tmp_path / "gone.nii.gz"), template_sha256="00")
    with pytest.raises(
        FileNotFoundError, match=r"the spec's `template` names .*gone\.nii\.gz, which is no file; correct"
    ):
        require_extra(spec)


def test_the_default_template_is_mni152(head):
    found = registration.template("mni152", "")
    assert found.shape == (99, 117, 95)
    require_extra(RIGID)


def test_without_the_extra_the_spec_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)
    require_extra(DEMO)
    for spec in (N4, RIGID):
        with pytest.raises(MissingExtraError, match=r"need antspyx; install the extra: .*brainloom\[registration\]"):
            require_extra(spec)
