import json
import multiprocessing
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from nifti_files import SMALL, write_case, write_dataset, write_nifti
from store_builds import ingest, scans_of, shard_of

from infra import storage
from models.spec import PreprocessSpec
from models.store import StoreError, case_digest, create_or_open, open_store, store_digest
from tasks import plan as plans
from tasks import receipts, shards
from tasks.preprocess import preprocess_batch
from tasks.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden" / "store_metadata.json"


def build(folder, subjects=3, labels=True):
    """Write a small store without Prefect or Dask."""
    url = str(folder / "s.zarr")
    writer = create_or_open(url, SMALL)
    rows = plans.plan_rows(plans.cases_from_scans(write_dataset(folder / "src", subjects, labels)), [], SMALL)
    plans.write_plan(url, rows.added, SMALL.content_digest())
    writer.grow("toy", subjects, labels)
    preprocess_batch(url, [case.model_dump(mode="json") for case in rows.added], "token")
    shards.finalise(url, rows.current)
    return url


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return build(tmp_path_factory.mktemp("store"))


@pytest.fixture
def damaged(tmp_path):
    return build(tmp_path, subjects=2)


@pytest.fixture
def data(url):
    return open_store(url).dataset("toy")


def test_cases_and_info(url, data):
    store = open_store(url)
    assert store.datasets == ["toy"]
    assert store.spec == SMALL
    table = store.cases()
    assert table.column_names == shards.CASES_SCHEMA.names
    assert table.column("status").to_pylist() == ["stored"] * 3
    info = data.case_info(0)
    assert (info.case, info.present, info.extent, info.has_label) == ("s0", (False, True, True), (22, 20, 16), True)
    assert data.rows == [0, 1, 2]
    np.testing.assert_array_equal(data.present[:], [[False, True, True]] * 3)
    np.testing.assert_array_equal(data.extent[0], info.extent)
    np.testing.assert_array_equal(data.origin[0], info.origin)
    np.testing.assert_array_equal(data.affine[0], info.affine)
    assert data.label.dtype == np.uint8


@pytest.mark.parametrize("start", [(0, 0, 0), (-3, 2, 5), (15, 15, 12), (30, 0, 0), (-30, 0, 0)])
def test_crops_are_padded_with_zeros(data, start):
    image, label = data.read_case(0)
    size = (10, 9, 8)
    padded = np.pad(image.astype(np.float32), [(0, 0), (40, 40), (40, 40), (40, 40)])
    window = tuple(slice(s + 40, s + 40 + n) for s, n in zip(start, size, strict=True))
    crop = data.read_crop(0, [2, 1, 0], start, size)
    assert crop.dtype == np.float32
    np.testing.assert_array_equal(crop, padded[(slice(None), *window)][[2, 1, 0]])
    np.testing.assert_array_equal(data.read_label(0, start, size), np.pad(label, 40)[window])


def test_reading_what_is_not_there_is_refused(url, data):
    with pytest.raises(StoreError, match=r"case 's1' of toy .* has no label"):
        data.read_label(1, (0, 0, 0), (2, 2, 2))
    with pytest.raises(StoreError, match="row 7 of toy cannot be read: it is not published"):
        data.read_crop(7, [0], (0, 0, 0), (2, 2, 2))
    with pytest.raises(StoreError, match="has no dataset 'ixi'; it has: toy"):
        open_store(url).dataset("ixi")


def test_the_rust_pipeline_is_active(data):
    for array in (data.image, data.label):
        assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"


def test_one_shard_a_case_and_nothing_for_missing_modalities(url, data):
    assert data.image.shards == (1, 3, 48, 48, 48)
    assert data.image.chunks == (1, 1, 48, 48, 48)
    files = [path for path in Path(url, "toy", "image", "c").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert data.label[1].max() == 0


def metadata(url):
    """Return all metadata documents of a store, without what consolidation repeats."""
    documents = {}
    for path in sorted(Path(url).rglob("zarr.json")):
        document = json.loads(path.read_text())
        document.pop("consolidated_metadata", None)
        documents[str(path.relative_to(url))] = document
    return documents


def test_metadata_equal_the_golden_file(url):
    found = metadata(url)
    found["zarr.json"]["attributes"]["brainloom"]["finalised"]["digest"] = "of the voxels"
    assert found == json.loads(GOLDEN.read_text()), "the layout changed: review it, then rewrite the golden file"


def test_xarray_opens_it_without_our_code(url, data):
    import xarray

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xarray.open_zarr(url, group="toy")
    assert opened.image.dims == ("case", "modality", "x", "y", "z")
    assert opened.label.dims == ("case", "x", "y", "z")
    one = opened.sel(case="s1", modality="t2")
    np.testing.assert_array_equal(one.image.values[:22, :20, :16], data.read_case(1)[0][2])
    assert bool(one.present)
    np.testing.assert_array_equal(one.affine, data.case_info(1).affine)


def test_dask_opens_it_without_our_code_and_with_one_chunk_a_shard(url, data):
    import dask.array
    import xarray

    voxels = zarr.open_array(url, path="toy/image", mode="r")
    array = dask.array.from_zarr(voxels, chunks=voxels.shards)
    assert array.numblocks == (3, 1, 1, 1, 1)
    image, _ = data.read_case(2)
    np.testing.assert_array_equal(array[2, 1, :22, :20, :16].compute(scheduler="synchronous"), image[1])
    lazy = xarray.open_zarr(url, group="toy", chunks={"case": 1, **dict.fromkeys(("modality", "x", "y", "z"), -1)})
    assert lazy.image.data.numblocks == (3, 1, 1, 1, 1)
    assert lazy.image.isel(case=2, modality=1).sum().compute(scheduler="synchronous") == image[1].sum()
    assert lazy.stored.values.tolist() == [True] * 3


def test_handles_are_dropped_when_pickled(data):
    data.read_crop(0, [1], (0, 0, 0), (4, 4, 4))
    copy = pickle.loads(pickle.dumps(data))
    assert copy._lazy._handles == {}
    np.testing.assert_array_equal(copy.read_case(0)[0], data.read_case(0)[0])


def crop_sum(data, queue):
    try:
        queue.put(float(data.read_crop(0, [1], (0, 0, 0), (8, 8, 8)).sum()))
    except StoreError as error:
        queue.put(str(error))


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_other_processes_read_or_refuse_but_never_hang(data, method):
    expected = float(data.read_crop(0, [1], (0, 0, 0), (8, 8, 8)).sum())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=crop_sum, args=(data, queue))
    child.start()
    answer = queue.get(timeout=60)
    child.join()
    if method == "fork":
        assert f"was forked from {os.getpid()}, which has already read a store" in answer
    else:
        assert answer == expected


def test_digest_says_what_is_stored_not_how(tmp_path, url):
    again = build(tmp_path)
    assert store_digest(again) == store_digest(url)
    assert store_digest(build(tmp_path / "fewer", subjects=2)) != store_digest(url)


def test_case_digest_covers_every_part():
    image = np.zeros((2, 3, 4, 5), np.float16)
    image[1] = 0.5
    parts = {
        "image": image,
        "label": np.zeros((3, 4, 5), np.uint8),
        "present": np.array([False, True]),
        "affine": np.eye(4),
        "origin": (1, 2, 3),
    }
    other_image, other_affine = image.copy(), np.eye(4)
    other_image[1, 2, 3, 4] = 0.25
    other_affine[0, 3] = 1e-9
    changes = {
        "image": [other_image, image[:, :, :, :4]],
        "label": [None, np.ones((3, 4, 5), np.uint8)],
        "present": [np.array([True, True])],
        "affine": [other_affine],
        "origin": [(1, 2, 4)],
    }
    digests = {case_digest(**parts)}
    digests |= {case_digest(**{**parts, key: value}) for key, values in changes.items() for value in values}
    assert len(digests) == 1 + sum(map(len, changes.values()))


def test_a_store_of_another_spec_is_refused_with_what_differs(url):
    with pytest.raises(StoreError, match=r"another preprocessing spec \(spacing_mm: store 1\.0, asked 2\.0\)"):
        create_or_open(url, SMALL.replace(spacing_mm=2.0))
    assert create_or_open(url, SMALL).spec == SMALL


def test_what_is_no_finalised_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"gone is not a store: it has no zarr\.json"):
        open_store(str(tmp_path / "gone"))
    zarr.create_group(str(tmp_path / "foreign"), zarr_format=3)
    with pytest.raises(StoreError, match=r"is a Zarr group, but not a store of ours"):
        open_store(str(tmp_path / "foreign"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"not empty and is no store: it holds \['notes\.txt'\]"):
        create_or_open(str(tmp_path / "full"), SMALL)
    create_or_open(str(tmp_path / "new"), SMALL)
    with pytest.raises(StoreError, match="was never finalised"):
        open_store(str(tmp_path / "new"))
    document = json.loads((tmp_path / "new" / "zarr.json").read_text())
    document["attributes"]["brainloom"]["schema"] = 99
    (tmp_path / "new" / "zarr.json").write_text(json.dumps(document))
    newer = "has store schema 99; this version reads schema 1: a newer brainloom wrote it; install that"
    with pytest.raises(StoreError, match=newer):
        open_store(str(tmp_path / "new"))


def test_only_what_fits_a_planned_row_is_written(tmp_path):
    writer = create_or_open(str(tmp_path / "s.zarr"), SMALL)
    writer.grow("toy", 1, with_label=False)
    with pytest.raises(StoreError, match=r"case of 3 channels x \(41, 5, 5\) voxels does not fit toy"):
        writer.write_case("toy", 0, np.ones((3, 41, 5, 5), np.float16), None)
    with pytest.raises(StoreError, match="row 1 of toy was not planned: the array has 1 rows"):
        writer.write_case("toy", 1, np.ones((3, 5, 5, 5), np.float16), None)
    with pytest.raises(StoreError, match="dataset name 'Toy' cannot be a group"):
        writer.grow("Toy", 1, with_label=False)


def test_growing_keeps_the_voxels_and_never_shrinks(damaged):
    writer = create_or_open(damaged, SMALL)
    before = open_store(damaged).dataset("toy").read_case(0)[0]
    writer.grow("toy", 5, with_label=True)
    writer.grow("toy", 1, with_label=True)
    data = open_store(damaged).dataset("toy")
    assert data.image.shape == (5, 3, 40, 36, 30)
    np.testing.assert_array_equal(data.read_case(0)[0], before)
    assert verify(damaged, deep=True) == []


def test_half_a_shard_is_replaced_not_merged(tmp_path):
    writer = create_or_open(str(tmp_path / "s.zarr"), SMALL)
    writer.grow("toy", 1, with_label=False)
    image = np.random.default_rng(0).random((3, 30, 30, 30)).astype(np.float16)
    writer.write_case("toy", 0, image, None)
    (shard,) = [path for path in Path(writer.url, "toy/image/c").rglob("*") if path.is_file()]
    shard.write_bytes(shard.read_bytes()[:1000])
    writer.write_case("toy", 0, image[:, :20], None)
    found = zarr.open_array(writer.url, path="toy/image", mode="r")[0]
    np.testing.assert_array_equal(found[:, :20, :30, :30], image[:, :20])
    assert not found[:, 20:].any()


def test_verify_finds_changed_voxels_and_lost_shards(damaged):
    assert verify(damaged, deep=True) == []
    array = zarr.open_array(damaged, path="toy/image", mode="r+")
    array[0, 1, 0, 0, 0] = 0.123
    assert verify(damaged) == []
    assert "toy/s0 (row 0): digest of the voxels is" in verify(damaged, deep=True)[0]
    storage.delete(storage.join(damaged, "toy", "image", "c", "1"))
    assert verify(damaged) == ["toy/s1 (row 1): the shard of image is missing; run preprocess with repair: true"]


def test_verify_finds_a_damaged_shard(damaged):
    (shard,) = [path for path in Path(damaged, "toy/image/c/1").rglob("*") if path.is_file()]
    shard.write_bytes(shard.read_bytes()[:500])
    (problem,) = verify(damaged, deep=True)
    assert problem.startswith("toy/s1 (row 1): cannot be decoded")


def test_receipts_of_other_sources_do_not_count(damaged):
    (case, *_) = plans.read_plans(damaged)
    assert receipts.read_receipt(damaged, case, SMALL.content_digest())
    assert receipts.read_receipt(damaged, case, "another spec") is None
    other = case.replace(files=case.files[:1])
    assert receipts.read_receipt(damaged, other, SMALL.content_digest()) is None
    moved = case.replace(files=tuple(file.replace(path="/elsewhere") for file in case.files))
    assert receipts.read_receipt(damaged, moved, SMALL.content_digest())


def test_specs_whose_chunks_do_not_divide_the_grid_get_whole_chunks():
    from models.store_layout import shard_shape

    assert shard_shape(PreprocessSpec(name="x")) == (240, 240, 192)


def test_a_kill_while_the_store_is_made_leaves_nothing_behind(tmp_path, monkeypatch):
    from models import store_writer

    url, spec = str(tmp_path / "s.zarr"), PreprocessSpec(name="s", grid=(48, 48, 48))
    write = store_writer._write_attributes
    monkeypatch.setattr(store_writer, "_write_attributes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        create_or_open(url, spec)
    monkeypatch.setattr(store_writer, "_write_attributes", write)
    assert create_or_open(url, spec).spec == spec


def test_modality_names_lost_in_a_kill_are_written_again(tmp_path):
    url, spec = str(tmp_path / "s.zarr"), PreprocessSpec(name="s", grid=(48, 48, 48))
    writer = create_or_open(url, spec)
    writer.grow("ixi", 2, False)
    names = zarr.open_array(storage.zarr_store(url, "r+"), path="ixi/modality", mode="r+", zarr_format=3)
    names[:] = np.array([""] * len(spec.modalities), dtype=object)
    writer.grow("ixi", 2, False)
    assert [str(name) for name in names[:]] == list(spec.modalities)


def test_a_lost_label_shard_is_no_empty_label(damaged):
    Path(shard_of(damaged, 0, "label")).unlink()
    data = open_store(damaged).dataset("toy")
    with pytest.raises(
        StoreError, match=r"the label shard of toy/s0 \(row 0\) is missing; run `brainloom store verify`"
    ):
        data.read_label(0, (0, 0, 0), (4, 4, 4))
    with pytest.raises(StoreError, match="the label shard of toy/s0"):
        data.read_case(0)


def test_an_empty_label_has_no_shard_and_reads_as_zeros(tmp_path, store_url):
    files = write_case(tmp_path, "a", label=True)
    write_nifti(files["label"], np.zeros((30, 28, 24), np.uint8))
    ingest(store_url, scans_of(files, "a"))
    data = open_store(store_url).dataset("toy")
    assert not storage.exists(storage.join(store_url, "toy", "label", "c", "0"))
    assert not data.read_case(0)[1].any()


@pytest.mark.parametrize("name", ["present", "extent"])
def test_a_lost_chunk_of_what_the_table_says_too_does_no_harm(damaged, name):
    before, info = open_store(damaged).dataset("toy").read_case(0)[0], open_store(damaged).dataset("toy").case_info(0)
    storage.delete(storage.join(damaged, "toy", name, "c"))
    data = open_store(damaged).dataset("toy")
    np.testing.assert_array_equal(data.read_case(0)[0], before)
    assert before.any()
    assert (data.case_info(0).present, data.case_info(0).extent) == (info.present, info.extent)
    (problem,) = verify(damaged, deep=True)
    assert problem.startswith(f"toy: structure: {name} cannot be read: toy/{name} of ")


@pytest.mark.parametrize("name", ["affine", "origin", "source_affine"])
def test_a_lost_chunk_of_properties_is_not_read_as_zeros(damaged, name):
    storage.delete(storage.join(damaged, "toy", name, "c"))
    data = open_store(damaged).dataset("toy")
    lost = rf"toy/{name} of .* has lost the chunk c/0/0.*, which holds row \d; restore it from a backup"
    with pytest.raises(StoreError, match=lost):
        data.small(name)
    if name != "source_affine":
        with pytest.raises(StoreError, match=lost):
            data.case_info(0)
    # A new case must not bury the loss under a chunk that holds only itself.
    with pytest.raises(StoreError, match=lost):
        ingest(damaged, write_dataset(Path(damaged).parent / "src", 3, labels=True))
    assert any(p.startswith(f"toy: structure: {name} cannot be read: toy/{name} of ") for p in verify(damaged))


@pytest.mark.parametrize("pipeline", ["zarrs.ZarrsCodecPipeline", "zarr.core.codec_pipeline.BatchedCodecPipeline"])
def test_cases_that_fill_the_grid_have_a_chunk_of_zeros_as_origin(tmp_path, store_url, pipeline):
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        ingest(store_url, scans_of(write_case(tmp_path, "a"), "a"), spec=SMALL.replace(grid=(22, 20, 16)))
    assert open_store(store_url).dataset("toy").case_info(0).origin == (0, 0, 0)
    assert verify(store_url, deep=True) == []
