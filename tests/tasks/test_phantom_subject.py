"""One subject: known voxels when undeformed, exact masks, measurable age effect, plausible contrasts."""

import gzip
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nilearn import datasets
from nilearn.image import resample_img

from tasks.phantom.acquire import KNOWN_GAIN
from tasks.phantom.anatomy import load_atlas
from tasks.phantom.config import NO_LESIONS, TINY
from tasks.phantom.contrasts import INTENSITY, signal, tissue_at
from tasks.phantom.layout import bids_place, datalist_place
from tasks.phantom.lesions import to_scheme
from tasks.phantom.subject import Subject, draw_subject_traits, make_subject

SMALL = TINY.replace(spacing_mm=4.0, missing_share=0.0, other_grid_share=0.0)
UNDEFORMED = SMALL.replace(undeformed=True, lesions=NO_LESIONS, anisotropic=False, spacing_mm=3.0)


def subject(config: Any = SMALL, number: int = 0, group: str = "bids", **traits: Any) -> Subject:
    place = bids_place(config, number) if group == "bids" else datalist_place(config, number, group)  # type: ignore[arg-type]
    return make_subject(config, place, draw_subject_traits(config, place, **traits))


def read(volume: Any) -> Any:
    return nib.Nifti1Image.from_bytes(gzip.decompress(volume.to_bytes()))


@pytest.mark.filterwarnings("ignore:Resampling binary images")
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "oblique"])
def test_undeformed_scan_equals_an_independent_resampling(orientation: str) -> None:
    config = UNDEFORMED.replace(orientations=(orientation,) * 3)
    image = read(subject(config).scans["t1"])
    assert image.get_data_dtype() == np.float32
    maps = {}
    for name, loader in {
        "grey": datasets.load_mni152_gm_template,
        "white": datasets.load_mni152_wm_template,
        "brain": datasets.load_mni152_template,
    }.items():
        template = loader(resolution=1)
        values = template.get_fdata()
        inside = datasets.load_mni152_template(resolution=1).get_fdata() > 0
        data = inside.astype(float) if name == "brain" else values * inside
        source = nib.Nifti1Image(data, template.affine)
        maps[name] = resample_img(
            source, image.affine, image.shape, interpolation="linear", copy_header=True, force_resample=True
        ).get_fdata()
    level = INTENSITY["t1"]
    csf = np.clip(1 - maps["grey"] - maps["white"], 0, 1)
    expected = level["grey"] * maps["grey"] + level["white"] * maps["white"] + level["csf"] * csf
    expected = np.where(maps["brain"] > 0.499, expected * KNOWN_GAIN, 0)
    decided = np.abs(maps["brain"] - 0.499) > 1e-3
    np.testing.assert_allclose(image.get_fdata()[decided], expected[decided], atol=0.5)
    assert (expected > 0).sum() * 27 / 1e6 == pytest.approx(1.887, abs=0.03)
    codes = {"RAS": ("R", "A", "S"), "LPS": ("L", "P", "S"), "oblique": ("A", "S", "R")}
    assert nib.aff2axcodes(image.affine) == codes[orientation]


def test_undeformed_grid_starts_at_whole_millimetres() -> None:
    affine = read(subject(UNDEFORMED.replace(orientations=("RAS",) * 3)).scans["t2"]).affine
    np.testing.assert_array_equal(affine[:3, :3], 3 * np.eye(3))
    np.testing.assert_array_equal(affine[:3, 3] % 1, 0)


@pytest.mark.parametrize(("site", "dtype"), [("A", np.int16), ("B", np.float32), ("C", np.int16)])
def test_number_formats_keep_the_background_at_exactly_zero(site: str, dtype: Any) -> None:
    made = subject(site=site)
    image = read(made.scans["t1"])
    assert image.get_data_dtype() == dtype
    values = image.get_fdata()
    inside = values > 0
    assert values.min() == 0
    assert made.latents["brain_ml"] == pytest.approx(inside.sum() * np.prod(image.header.get_zooms()) / 1000, rel=1e-3)
    if site == "C":
        assert (image.dataobj.slope, image.dataobj.inter) == (0.125, -128.0)
        assert np.abs(image.affine[:3, :3]).min() > 1e-3 or nib.aff2axcodes(image.affine) == ("A", "S", "R")


@pytest.mark.parametrize("kind", ["tumour", "stroke", "schwannoma"])
def test_mask_equals_the_formula_of_the_lesion(kind: str) -> None:
    made = subject(number=2, lesion=kind)
    assert made.mask is not None
    image = read(made.mask)
    labels = np.asarray(image.dataobj)
    assert labels.dtype == np.uint8
    brain = read(made.scans["t1"]).get_fdata() > 0
    where = np.stack(np.meshgrid(*(np.arange(n) for n in labels.shape), indexing="ij")).reshape(3, -1)
    world = image.affine[:3, :3] @ where + image.affine[:3, 3:]
    expected, within = np.zeros(labels.size, np.uint8), np.ones(labels.size, bool)
    spared = np.zeros(labels.size, bool)
    for shape in made.shapes:
        within &= shape.inside(world) < 1
        expected[within & brain.ravel()] = shape.label
        if shape.spares_csf:
            spared = within & brain.ravel()
    found = labels.ravel()
    # Only CSF inside a region that spares it may differ, and there the mask is empty.
    differs = found != expected
    assert not found[differs].any()
    assert spared[differs].all()
    voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    assert made.latents["lesion_ml"] == pytest.approx((found > 0).sum() * voxel_ml)
    for value in (1, 2, 3):
        assert made.latents[f"label_{value}_ml"] == pytest.approx((found == value).sum() * voxel_ml)
    assert (found > 0).sum() > 5


def test_tissue_is_labelled_by_the_largest_share_outside_of_lesions() -> None:
    made = subject(number=2, lesion="tumour")
    assert made.tissue is not None
    assert made.mask is not None
    labels, t1 = np.asarray(read(made.tissue).dataobj), read(made.scans["t1"])
    np.testing.assert_array_equal(read(made.tissue).affine, t1.affine)
    np.testing.assert_array_equal(labels > 0, (t1.get_fdata() > 0) & (np.asarray(read(made.mask).dataobj) == 0))
    means = [t1.get_fdata()[labels == value].mean() for value in (1, 2, 3)]
    assert means == sorted(means), "T1: dark CSF, bright white matter"
    ml = abs(np.linalg.det(t1.affine[:3, :3])) / 1000
    for value, name in ((2, "grey_ml"), (3, "white_ml")):
        assert (labels == value).sum() * ml == pytest.approx(made.latents[name], rel=0.35)
    assert subject(number=0, group="brats").tissue is None


def test_tumour_labels_follow_the_scheme_of_the_data_set() -> None:
    bids = subject(number=1, lesion="tumour")
    brats = subject(number=0, group="brats", lesion="tumour")
    assert bids.mask is not None
    assert brats.mask is not None
    assert set(np.unique(bids.mask.stored)) == {0, 1, 2, 3}
    assert set(np.unique(brats.mask.stored)) == {0, 1, 2, 4}
    with pytest.raises(KeyError, match="brats1999"):
        to_scheme(bids.mask.stored, "brats1999")


def test_lesions_show_in_the_modalities_that_should_show_them() -> None:
    stroke = subject(number=1, group="ucsf", lesion="stroke")
    assert stroke.mask is not None
    values = {name: read(volume).get_fdata() for name, volume in stroke.scans.items()}
    inside = stroke.mask.stored > 0
    tissue = (values["t1"] > 0) & ~inside
    ratio = {name: np.median(value[inside]) / np.median(value[tissue]) for name, value in values.items()}
    assert ratio["dwi"] > 1.5
    assert ratio["flair"] > 1.3
    assert ratio["adc"] < 0.7
    tumour = subject(number=0, lesion="tumour")
    assert tumour.mask is not None
    t1c, flair = read(tumour.scans["t1c"]).get_fdata(), read(tumour.scans["flair"]).get_fdata()
    labels = tumour.mask.stored
    healthy = (t1c > 0) & (labels == 0)
    assert np.median(t1c[labels == 3]) > 1.2 * np.median(t1c[healthy])
    assert np.median(flair[labels == 2]) > 1.3 * np.median(flair[healthy])
    assert np.median(t1c[labels == 1]) < 0.8 * np.median(t1c[healthy])


def test_age_is_measurable_on_anatomy() -> None:
    """The same person at 25 and 80: less grey matter, more CSF, larger ventricles, the same head."""
    draws = [draw_subject_traits(SMALL, bids_place(SMALL, number)) for number in range(200)]
    rate = np.polyfit([t.age for t in draws], [t.grey_loss for t in draws], 1)[0]
    young, old = (subject(number=4, age=age, grey_loss=0.12 + rate * (age - 52.5), ventricle_log=0.012 * (age - 52.5),
                          medial_temporal_loss=0.1, lesion="none") for age in (25.0, 80.0))  # fmt: skip
    assert old.latents["grey_ml"] < 0.93 * young.latents["grey_ml"]
    assert old.latents["ventricles_ml"] > 1.5 * young.latents["ventricles_ml"]
    assert old.latents["csf_ml"] > young.latents["csf_ml"]
    assert old.latents["brain_ml"] == pytest.approx(young.latents["brain_ml"], rel=0.01)


def test_diagnosis_moves_the_medial_temporal_volume_as_its_trait_says() -> None:
    low, high = (subject(number=4, medial_temporal_loss=loss, lesion="none").latents for loss in (0.1, 0.3))
    assert high["medial_temporal_ml"] / low["medial_temporal_ml"] == pytest.approx(
        (1 - 0.8 * 0.3) / (1 - 0.8 * 0.1), abs=0.03
    )
    assert high["grey_ml"] == pytest.approx(low["grey_ml"], rel=0.02)


def test_volumes_are_those_of_people() -> None:
    volumes = [subject(number=number).latents for number in range(4)]
    assert all(1100 < v["brain_ml"] < 1900 for v in volumes)
    assert all(450 < v["grey_ml"] < 950 for v in volumes)
    assert all(v["jacobian_min"] > 0 for v in volumes)


def test_contrasts_rank_tissues_as_radiologists_see_them() -> None:
    atlas = load_atlas()
    points = np.array([[25.0, -9.0], [0, 10], [32, 18]])  # white matter, ventricle
    tissue = tissue_at(points, draw_subject_traits(UNDEFORMED, bids_place(UNDEFORMED, 0)), atlas)
    np.testing.assert_allclose(tissue.grey + tissue.white + tissue.csf, 1, atol=1e-6)
    none = np.zeros(2, np.float32)
    brighter_csf = {"t2", "adc", "pd"}
    for modality in INTENSITY:
        white, csf = signal(modality, tissue, none)
        assert (csf > white) == (modality in brighter_csf), modality
    assert signal("mra", tissue, np.ones(2, np.float32)).min() == pytest.approx(1.0)


def test_the_same_subject_twice_is_the_same_and_seeds_differ() -> None:
    first, second = subject(number=3), subject(number=3)
    other = subject(SMALL.replace(seed=8), number=3)
    for modality, volume in first.scans.items():
        assert volume.to_bytes() == second.scans[modality].to_bytes()
        assert volume.to_bytes() != other.scans[modality].to_bytes()


def test_missing_modalities_and_grids_of_their_own() -> None:
    config = SMALL.replace(missing_share=0.6, other_grid_share=0.9, spacing_mm=8.0)
    made = [subject(config, number=number) for number in range(8)]
    counts = [len(one.scans) for one in made]
    assert min(counts) >= 2
    assert min(counts) < 4
    for one in made:
        grids = {name: volume.stored.shape for name, volume in one.scans.items()}
        assert len({shape for name, shape in grids.items() if name != "flair"}) <= 1
    assert any("t1" in one.scans and "flair" in one.scans
               and one.scans["t1"].stored.shape != one.scans["flair"].stored.shape for one in made)  # fmt: skip


def test_full_size_datalist_grid_is_that_of_brats() -> None:
    from tasks.phantom.acquire import DATALIST_FIELD_MM, make_grid

    grid = make_grid(DATALIST_FIELD_MM, (1.0, 1.0, 1.0), "LPS", np.random.default_rng(0))
    assert grid.shape == (240, 240, 155)
    assert nib.aff2axcodes(grid.affine) == ("L", "P", "S")
