import numpy as np
import pytest
import zarr
from nifti_files import planned, write_case
from store_builds import ingest, shard_of, three_subjects

from infra import storage
from models.store import open_store
from models.store_layout import StoreError
from tasks import plan as plans
from tasks import receipts
from tasks.verify import verify


@pytest.fixture
def url(tmp_path, store_url):
    ingest(store_url, three_subjects(tmp_path))
    return store_url


def test_a_sound_store_has_no_problems(url):
    assert verify(url) == verify(url, deep=True) == []


def test_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is not a store"):
        verify(str(tmp_path / "none.zarr"))


def flip(path, position, bit=0):
    body = bytearray(storage.read_bytes(path))
    body[position] ^= 1 << bit
    storage.write_bytes(path, bytes(body))


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
    url = str(tmp_path / "s.zarr")
    ingest(url, three_subjects(tmp_path))
    path = shard_of(url, 1, name)
    sound = storage.read_bytes(path)
    spread = np.random.default_rng(0).integers(0, len(sound), 40)
    missed = []
    for position in {0, 5, len(sound) - 1, len(sound) - 5, *spread.tolist()}:
        flip(path, position, position % 8)
        problems = verify(url, deep=True)
        if not problems:
            missed.append(position)
        assert all(problem.startswith("toy/b (row 1): ") for problem in problems), problems
        storage.write_bytes(path, sound)
    # A blosc frame has bits that do not matter (format versions): then every voxel is as it was.
    assert len(missed) <= 2, missed


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -200])
def test_a_truncated_shard_is_found(url, keep):
    path = shard_of(url, 2)
    storage.write_bytes(path, storage.read_bytes(path)[:keep])
    (problem,) = verify(url, deep=True)
    # To zarr an empty object on S3 is a shard of zeros.
    assert problem.startswith(("toy/c (row 2): cannot be decoded: ", "toy/c (row 2): digest of the voxels is "))
    with pytest.raises(StoreError, match=r"is damaged: .*; run preprocess with repair: true"):
        open_store(url).dataset("toy").read_case(2)


@pytest.mark.parametrize("place", [shard_of, lambda url, row, name: storage.join(url, "toy", name, "c", str(row))])
def test_missing_shards_are_found_fast_and_never_read_as_zeros(url, place):
    storage.delete(place(url, 0, "image"))
    storage.delete(place(url, 1, "label"))
    assert verify(url) == [
        "toy/a (row 0): the shard of image is missing; run preprocess with repair: true",
        "toy/b (row 1): the shard of label is missing; run preprocess with repair: true",
    ]
    with pytest.raises(StoreError, match=r"the shard of toy/a \(row 0\) is missing; run `brainloom store verify`"):
        open_store(url).dataset("toy").read_crop(0, [1], (0, 0, 0), (4, 4, 4))


def test_a_voxel_outside_the_extent_is_found(url):
    array = zarr.open_array(storage.zarr_store(url, "r+"), path="toy/image", mode="r+")
    array[0, 1, 39, 35, 29] = 0.5
    assert verify(url) == []
    assert verify(url, deep=True) == [
        "toy/a (row 0): voxels: 1 are not zero outside the extent (22, 20, 16) or in absent modalities"
    ]


def test_every_problem_is_reported_with_case_and_rule(url):
    _, case_b, _ = plans.read_plans(url)
    storage.delete(receipts.receipt_url(url, "toy", 0))
    digest = open_store(url).spec.content_digest()
    receipts.write_receipt(url, receipts.read_receipt(url, case_b, digest).replace(digest="other"))
    storage.write_bytes(receipts.receipt_url(url, "toy", 2), b"{}")
    group = zarr.open_group(storage.zarr_store(url, "r+"), mode="r+")["toy"]
    group["extent"][0] = (22, 20, 17)
    group["present"][1] = [True, True, True]
    group["affine"][2] = 0
    group["case"][2] = "x"
    group["stored"][0] = False
    found = "\n".join(verify(url))
    for text in (
        "toy/a (row 0): receipt: it is missing",
        "toy/b (row 1): receipt: it says ('b', 'stored', 'other'",
        "toy/c (row 2): receipt: it cannot be read: ",
        "toy/a (row 0): extent: the array says (22, 20, 17), cases.parquet says [22, 20, 16]",
        "toy/b (row 1): present: the array says ['flair', 't1', 't2'], cases.parquet says ['t1', 't2']",
        "toy/c (row 2): affine: it cannot be inverted",
        "toy/c (row 2): case: the coordinate says 'x'",
        "toy/a (row 0): stored: the array says False, cases.parquet says stored",
    ):
        assert text in found, text


def test_a_changed_layout_and_lost_arrays_are_found(url):
    storage.delete(storage.join(url, "toy", "origin"))
    image = zarr.open_array(storage.zarr_store(url, "r+"), path="toy/image", mode="r+")
    image.resize((3, 3, 41, 36, 30))
    problems = verify(url)
    assert "toy: structure: the array origin is missing" in problems
    assert any(
        problem.startswith("toy: structure: image has shape (3, 3, 41, 36, 30), spec and cases.parquet ask for")
        for problem in problems
    )
    storage.delete(storage.join(url, "toy"))
    assert "toy: the dataset is gone from the store" in verify(url)


def test_a_planned_row_without_a_line_is_found_unless_a_newer_row_took_its_place(tmp_path, url):
    files = write_case(tmp_path, "d", 4)
    digest = open_store(url).spec.content_digest()
    plans.write_plan(url, [planned(files, row=3, subject="d")], digest)
    (problem,) = verify(url)
    assert problem == "toy/d (row 3): it was planned and is neither stored nor in quarantine; preprocess again"
    write_case(tmp_path, "d", 5)
    plans.write_plan(url, [planned(files, row=4, subject="d")], digest)
    (problem,) = verify(url)
    assert problem.startswith("toy/d (row 4): ")
