"""Connectomes in a store: written by workers, read by name of the row, part of the digest, erased with the case."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from connectome_stores import DATASET, FEW, SPEC, Made, matrix_of, write_store

from models.connectomes import KNOWN_ATLASES, ConnectomeSpec
from models.spec import SPECS, PreprocessSpec
from models.staging import Mirror
from models.store import StoreError, create_or_open, open_store
from models.store_connectomes import connectome_url, digest_bytes
from tasks.compare import compare

CASES = (Made("both"), Made("image", network=False), Made("network", image=False))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("connectomes") / "s.zarr")
    write_store(url, CASES)
    return url


@pytest.fixture
def url(built, tmp_path):
    """A copy of the store."""
    shutil.copytree(built, tmp_path / "s.zarr")
    return str(tmp_path / "s.zarr")


def test_what_was_written_is_what_is_read(built):
    data = open_store(built).dataset(DATASET)
    assert [data.has_connectome(row) for row in data.rows] == [True, False, True]
    for row in (0, 2):
        np.testing.assert_array_equal(data.read_connectome(row), matrix_of(row))
    assert data.read_crop(2, (0,), (0, 0, 0), SPEC.grid).any() == np.False_
    assert data.case_info(2).present == (False,)
    assert data.read_case(2)[0].shape == (1, 0, 0, 0)
    with pytest.raises(StoreError, match=r"case 'image' of toy-connect \(row 1\) has no connectome"):
        data.read_connectome(1)


def test_other_readers_see_named_axes(built):
    import xarray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = xarray.open_zarr(built, group=DATASET)
    assert opened["connectome"].dims == ("case", "roi_from", "roi_to")
    assert list(opened["roi_to"].values) == list(FEW.regions)
    assert opened["connectome"].attrs == {"atlas": "six", "kind": "correlation", "fisher_z": True}
    np.testing.assert_array_equal(opened["connectome"].values[0], matrix_of(0))
    assert np.isnan(opened["connectome"].values[1]).all()


def test_a_case_digest_covers_the_connectome(tmp_path):
    with_one = write_store(str(tmp_path / "a.zarr"), CASES)
    without = write_store(str(tmp_path / "b.zarr"), [Made("both", network=False), *CASES[1:]])
    assert [a.digest == b.digest for a, b in zip(with_one, without, strict=True)] == [False, True, True]
    assert digest_bytes(None, FEW) == b""
    other = FEW.replace(atlas="other_six")
    assert digest_bytes(matrix_of(0), FEW) != digest_bytes(matrix_of(0), other)


def test_nan_and_zero_have_one_form():
    odd = np.array([[-0.0, np.nan], [np.nan, 0.0]], np.float32)
    odd.view(np.uint32)[0, 1] = 0x7FC01234
    plain = np.array([[0.0, np.nan], [np.nan, 0.0]], np.float32)
    assert digest_bytes(odd, FEW) == digest_bytes(plain, FEW)


@pytest.mark.parametrize("damage", ["lost", "short"])
def test_a_damaged_matrix_is_told(url, damage):
    path = Path(connectome_url(url, DATASET, 0))
    path.unlink() if damage == "lost" else path.write_bytes(b"1234")
    told = {
        "lost": "the connectome of toy-connect/both .row 0. is missing; run `brainloom store verify`",
        "short": r"0/0/0 is damaged: it has 4 bytes, a matrix of 6 regions has 144; run preprocess with repair: true",
    }
    with pytest.raises(StoreError, match=told[damage]):
        open_store(url).dataset(DATASET).read_connectome(0)


def test_a_matrix_of_another_atlas_is_refused(url):
    writer = create_or_open(url, SPEC)
    with pytest.raises(StoreError, match=r"connectome of shape \(5, 5\): atlas 'six' has 6 regions"):
        writer.write_case(DATASET, 0, np.zeros((1, 2, 2, 2), np.float16), None, connectome=np.zeros((5, 5), np.float32))
    with pytest.raises(StoreError, match="was built with another preprocessing spec"):
        create_or_open(url, SPECS["cinp_tiny"].replace(name="toy"))


def test_growing_keeps_and_erasing_takes_away(url):
    writer = create_or_open(url, SPEC)
    writer.grow(DATASET, 5, with_label=False)
    np.testing.assert_array_equal(open_store(url).dataset(DATASET).read_connectome(2), matrix_of(2))
    writer.erase_case(DATASET, 2)
    assert not Path(connectome_url(url, DATASET, 2)).exists()


def test_staged_copies_hold_the_connectome(built, tmp_path):
    selection = write_store(str(tmp_path / "s.zarr"), CASES)
    mirror = Mirror.of(open_store(str(tmp_path / "s.zarr")), tmp_path / "stage", [DATASET])
    mirror.copy_metadata()
    for case in selection:
        mirror.stage(case)
        assert mirror.is_staged(case)
    np.testing.assert_array_equal(open_store(str(mirror.folder)).dataset(DATASET).read_connectome(0), matrix_of(0))


def test_stores_that_differ_in_a_connectome(built, tmp_path):
    write_store(str(tmp_path / "b.zarr"), [Made("another"), *CASES])
    found = compare(built, str(tmp_path / "b.zarr"), voxels=True)
    # Subjects are numbered in order: `network` has another number, so another matrix and no image.
    assert found.voxels["toy-connect/network"].sentence() == "connectomes differ"


def test_known_atlases_have_their_regions():
    sizes = {name: len(regions) for name, regions in KNOWN_ATLASES.items()}
    assert sizes == {
        "aal116": 116, "cc200": 200, "cc400": 392, "schaefer_100": 100, "schaefer_200": 200, "schaefer_400": 400,
        "desikan_killiany": 68,
    }  # fmt: skip
    aal = KNOWN_ATLASES["aal116"]
    assert (aal[2001], aal[2002], aal[4102], aal[9081], aal[9170]) == (
        "Precentral_L", "Precentral_R", "Hippocampus_R", "Cerebelum_10_L", "Vermis_10",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"atlas": "mine"},
            "atlas 'mine' is not known, so `regions` and `values` must name its regions; known are aal",
        ),
        ({"atlas": "mine", "regions": ["a", "b"], "values": [1, 2]}, "needs 3 or more regions, each named once"),
        ({"atlas": "mine", "regions": ["a", "b", "c"], "values": [1, 2]}, "got 2 for 3 regions"),
        ({"atlas": "mine", "regions": ["a", "b", "c"], "values": [0, 1, 2]}, "one positive number per region"),
        ({"atlas": "cc200", "atlas_image": "a.nii.gz"}, "atlas_image and atlas_sha256 are given together"),
        ({"atlas": "cc200", "high_pass_hz": 0.1, "low_pass_hz": 0.08}, "high_pass_hz 0.1 must be below low_pass_hz"),
        ({"atlas": "cc200", "missing_regions": 198}, "leaves fewer than 3 of 200 regions"),
    ],
)
def test_settings_that_make_no_connectome_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        ConnectomeSpec.model_validate(given)


def test_specs_without_a_connectome_keep_their_digest():
    assert "connectome" not in SPECS["t1_mni"].identity()
    again = PreprocessSpec.model_validate(SPECS["cinp"].identity())
    assert again == SPECS["cinp"]
    assert [SPECS[name].reads("roi_series") for name in ("t1_mni", "cinp")] == [False, True]
