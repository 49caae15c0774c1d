import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import SMALL

from models.shard_reader import ShardReader, to_float32
from models.store import StoreError, create_or_open, open_store
from models.store_layout import open_array

GRID = (100, 60, 50)
SPECS = {codec: SMALL.replace(name=codec, grid=GRID, codec=codec) for codec in ("lz4", "none")}


@pytest.fixture(scope="module", params=list(SPECS))
def array(request, tmp_path_factory):
    """Return URL, zarr array and voxels of one case with an absent modality and an empty chunk."""
    spec = SPECS[request.param]
    writer = create_or_open(str(tmp_path_factory.mktemp("reader") / f"{request.param}.zarr"), spec)
    writer.grow("toy", 2, with_label=True)
    image = np.random.default_rng(0).random((3, *GRID)).astype(np.float16)
    image[1] = 0
    image[2, :48, :48, :48] = 0
    writer.write_case("toy", 1, image, (image[0] * 4).astype(np.uint8))
    return writer.url, open_array(writer.url, "toy/image"), image


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_equal_what_zarr_reads(array, draw):
    url, image, voxels = array
    window = []
    for length in GRID:
        start = draw.draw(st.integers(0, length - 1))
        window.append(slice(start, draw.draw(st.integers(start + 1, length))))
    leads = draw.draw(st.permutations(range(3)))[: draw.draw(st.integers(1, 3))]
    out = np.zeros((len(leads), *(s.stop - s.start for s in window)), np.float16)
    reader = ShardReader.of(url, "toy/image", image)
    assert reader is not None
    assert reader.read(1, [(lead,) for lead in leads], window, out)
    np.testing.assert_array_equal(out, voxels[(leads, *window)])
    np.testing.assert_array_equal(out, np.stack([image[(1, lead, *window)] for lead in leads]))


def test_zarr_itself_reads_the_same(array):
    url, _, voxels = array
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        plain = zarr.open_array(url, path="toy/image", mode="r")
    np.testing.assert_array_equal(plain[1], voxels)
    assert plain[1].dtype == np.float16


def test_labels_have_no_channel_axis(array):
    url, _, voxels = array
    reader = ShardReader.of(url, "toy/label", open_array(url, "toy/label"))
    out = np.zeros((1, 20, 20, 20), np.uint8)
    assert reader is not None
    assert reader.read(1, [()], [slice(40, 60), slice(30, 50), slice(30, 50)], out)
    np.testing.assert_array_equal(out[0], (voxels[0, 40:60, 30:50, 30:50] * 4).astype(np.uint8))


def test_a_row_without_shard_is_told_from_an_empty_one(array):
    url, image, _ = array
    reader = ShardReader.of(url, "toy/image", image)
    assert reader is not None
    assert not reader.read(0, [(0,)], [slice(0, 4)] * 3, np.zeros((1, 4, 4, 4), np.float16))


@pytest.mark.parametrize(
    "change",
    [
        {"shards": None},
        {"shards": (1, 4, 32, 32, 32), "shape": (2, 4, 64, 32, 32)},
        {"chunks": (1, 2, 16, 16, 16)},
        {"compressors": zarr.codecs.ZstdCodec()},
        {"dtype": ">f2"},
        {"chunk_key_encoding": {"name": "default", "separator": "."}},
    ],
)
def test_other_layouts_are_left_to_zarr(tmp_path, change):
    layout = {"shape": (2, 4, 32, 32, 32), "shards": (1, 4, 32, 32, 32), "chunks": (1, 1, 16, 16, 16), "dtype": "f2"}
    codec = zarr.codecs.BloscCodec()
    array = zarr.create_array(str(tmp_path), name="a", **{**layout, "compressors": codec, **change})
    assert ShardReader.of(str(tmp_path), "a", array) is None
    ours = zarr.create_array(str(tmp_path), name="b", **layout, compressors=codec)
    assert ShardReader.of(str(tmp_path), "b", ours) is not None


def test_s3_is_left_to_zarr(array):
    assert ShardReader.of("s3://bucket/store.zarr", "toy/image", array[1]) is None


def test_what_the_index_promises_must_be_there(tmp_path):
    writer = create_or_open(str(tmp_path / "s.zarr"), SPECS["lz4"])
    writer.grow("toy", 1, with_label=False)
    writer.write_case("toy", 0, np.ones((3, *GRID), np.float16), None)
    reader = ShardReader.of(writer.url, "toy/image", open_array(writer.url, "toy/image"))
    (path,) = [p for p in (tmp_path / "s.zarr/toy/image/c").rglob("*") if p.is_file()]
    sound = path.read_bytes()
    index = 3 * 3 * 2 * 2 * 16 + 4

    def refused(body, text):
        path.write_bytes(body)
        with pytest.raises(StoreError, match=text):
            reader.read(0, [(0,)], [slice(0, 9)] * 3, np.zeros((1, 9, 9, 9), np.float16))

    refused(sound[:-1], "is damaged: the checksum of its index is wrong; run preprocess with repair: true")
    refused(sound[-100:], rf"100 bytes cannot hold an index of {index}")
    refused(sound[-index:], r"chunk \(0, 0, 0, 0\) lies beyond its end at byte 580")
    refused(b"\0" * 16 + sound[16:], "that holds 0, not ")
    refused(b"", "is damaged: cannot mmap an empty file")


def test_float32_is_exact_with_and_without_torch(monkeypatch):
    import sys

    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert to_float32(finite).dtype == np.float32
    np.testing.assert_array_equal(to_float32(finite), finite.astype(np.float32))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    np.testing.assert_array_equal(to_float32(finite), finite.astype(np.float32))


def test_crops_come_as_they_are_stored_when_asked(tmp_path):
    from store_builds import ingest, three_subjects

    ingest(str(tmp_path / "s.zarr"), three_subjects(tmp_path))
    data = open_store(str(tmp_path / "s.zarr")).dataset("toy")
    half = data.read_crop(0, [1, 2], (-2, 3, 4), (9, 9, 9), np.float16)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half.astype(np.float32), data.read_crop(0, [1, 2], (-2, 3, 4), (9, 9, 9)))
