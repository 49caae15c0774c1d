import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from nifti_files import centred, planned, volume_of, write_nifti
from nilearn import datasets
from pydantic import ValidationError

from flows.preprocess_params import PreprocessParams, chosen_spec
from models.records import MODALITIES, Reason
from models.spec import SPECS, PreprocessSpec, find_spec
from tasks.affines import BadScanError
from tasks.mni import require_mni
from tasks.prepare import prepare_case
from tasks.volumes import tight, to_ras

T1_MNI = SPECS["t1_mni"]


@pytest.fixture(scope="module")
def head():
    image = datasets.load_mni152_template(resolution=2)
    return volume_of(np.asarray(image.dataobj, dtype=np.float32), image.affine)


def checked(volume):
    return require_mni(to_ras(tight(volume)))


def test_mni_images_pass_skull_stripped_or_not(head):
    checked(head)
    flipped = np.diag([-1.0, 1, 1, 1]) @ head.affine
    checked(head.replace(affine=flipped))  # the brain is symmetric enough
    rng = np.random.default_rng(0)
    noisy = head.data.numpy() + rng.uniform(0, 0.05, head.shape).astype(np.float32)
    checked(volume_of(noisy, head.affine))


@pytest.mark.parametrize(
    ("affine", "text"),
    [
        (
            lambda a: np.array([[0.98, -0.17, 0, 0], [0.17, 0.98, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ a,
            "turned by 9.8",
        ),
        (lambda a: a - np.array([[0, 0, 0, 120.0], [0] * 4, [0] * 4, [0] * 4]), r"covers \d+% of the MNI152 brain"),
        (lambda a: np.eye(4), r"covers 11% of the MNI152 brain, at least 90%"),
    ],
)
def test_images_elsewhere_are_refused(head, affine, text):
    with pytest.raises(BadScanError, match=rf"a: .*{text}.*register it first") as error:
        checked(head.replace(affine=affine(head.affine)))
    assert error.value.reason == Reason.NOT_MNI


def test_tissue_that_is_centred_elsewhere_is_refused():
    data = np.zeros((120, 120, 120), np.float32)
    data[20:60, 40:90, 70:110] = 1
    with pytest.raises(BadScanError, match=r"tissue is centred \d+ mm from the MNI152 brain's centre, at most 25"):
        checked(volume_of(data, centred(data.shape, (2, 2, 2))))


def test_t1_mni_needs_no_interpolation_for_images_on_the_template_grid(tmp_path):
    image = datasets.load_mni152_template(resolution=1)
    data = np.round(np.asarray(image.dataobj) * 1000).astype(np.int16)
    case = planned({"t1": write_nifti(tmp_path / "t1.nii.gz", data, image.affine)})
    found = prepare_case(case, T1_MNI)
    start = np.array(T1_MNI.grid_affine)[:3, 3] + found.geometry.origin - image.affine[:3, 3]
    window = tuple(slice(int(s), int(s) + n) for s, n in zip(start, found.extent, strict=True))
    low, high = np.percentile(data[data > 0], (0.5, 99.5))
    np.testing.assert_allclose(found.image[0], np.clip((data[window] - low) / (high - low), 0, 1), atol=5e-4)
    assert (data > 0).sum() == (data[window] > 0).sum()  # the grid holds the whole brain
    with pytest.raises(BadScanError, match=r"not in MNI space: t1_native\.nii\.gz: field of view"):
        prepare_case(planned({"t1": write_nifti(tmp_path / "t1_native.nii.gz", data, np.eye(4))}), T1_MNI)


def test_brainmvp_is_what_the_reference_does():
    spec = SPECS["brainmvp"]
    assert (spec.spacing_mm, spec.grid, spec.frame) == (1.0, (240, 240, 155), "image")
    assert (spec.percentiles, spec.percentile_region) == ((5.0, 95.0), "volume")
    assert spec.modalities == MODALITIES
    inside = spec.replace(percentile_region="foreground")
    assert inside.content_digest() != spec.content_digest()


def test_an_own_spec_takes_the_place_of_a_named_one():
    own = {
        "name": "mine",
        "spacing_mm": 2,
        "grid": [128, 96, 96],
        "percentiles": [1, 99],
        "percentile_region": "foreground",
    }
    params = PreprocessParams(catalog="c", store="s", own_spec=own)
    assert chosen_spec(params) == PreprocessSpec(**own)
    assert chosen_spec(PreprocessParams(catalog="c", store="s", spec="generic")) == SPECS["generic"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"grid": (240, 240, 1)}, "two or more voxels along each axis"),
        ({"percentiles": (95, 5)}, "percentiles must rise"),
        ({"space": "mni"}, "need frame 'template'"),
        ({"registration": "rigid"}, "need frame 'template'"),
        ({"template": "own.nii.gz"}, "template_sha256 is required for a template from a file"),
        ({"template_sha256": "00"}, "refused for 'mni152'"),
        (
            {"template": "own.nii.gz", "template_sha256": "00"},
            "template own.nii.gz would not be used, for registration is 'none'; set registration, or leave",
        ),
        ({"brain_mask": "hd-bet"}, "'none' or 'file'"),
        ({"spacing_mm": float("inf")}, "finite number"),
        ({"modalities": ()}, "one or more channels, each once"),
        ({"modalities": ("t1", "t1")}, "one or more channels, each once"),
        ({"reference_order": ("t1", "T2")}, r"unknown modalities in reference_order: \['T2'\]"),
    ],
)
def test_specs_that_make_no_sense_are_refused(change, text):
    with pytest.raises(ValidationError, match=text):
        SPECS["brainmvp"].replace(**change)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], "four rows, the last one 0 0 0 1"),
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]], "four rows, the last one 0 0 0 1"),
        ([[1, 0, 0, float("nan")], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "must be finite"),
        ([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "singular"),
    ],
)
def test_template_grids_that_are_no_grids_are_refused(rows, text):
    with pytest.raises(ValidationError, match=text):
        T1_MNI.replace(grid_affine=rows)


def test_a_spec_that_is_not_known_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="unknown preprocessing spec 'mni'; known: brainmvp, demo, t1_mni, cinp, "):
        find_spec("mni")


def test_template_grids_must_have_the_spacing_that_the_spec_names():
    with pytest.raises(ValidationError, match=r"voxel edges of \[1.0, 1.0, 1.0\] mm, but spacing_mm is 2"):
        T1_MNI.replace(spacing_mm=2.0)
    with pytest.raises(ValidationError, match="registration does it: choose one"):
        T1_MNI.replace(registration="rigid")


def test_the_own_specs_of_the_page_are_specs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "preprocessing.md").read_text(encoding="utf-8")
    blocks = [
        yaml.safe_load(block)
        for block in re.findall(r"(?:^    .*\n)+", page, flags=re.MULTILINE)
        if "own_spec:" in block
    ]
    assert [PreprocessSpec.model_validate(block["own_spec"]).name for block in blocks] == ["mine", "mine-mni"]
