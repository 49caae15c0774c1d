import numpy as np
import pytest
import zarr
from nifti_files import SMALL
from zarr.codecs import BloscCodec, GzipCodec, TransposeCodec, ZstdCodec

from models.shard_encoder import ShardEncoder
from models.store import create_or_open
from models.store_layout import StoreError, open_array

SPEC = SMALL.replace(grid=(100, 60, 50))
GZIP = GzipCodec(level=1)


def case(extent=(90, 55, 50)):
    rng = np.random.default_rng(0)
    image = np.zeros((3, *extent), np.float16)
    image[1, 5:, :50] = rng.random((extent[0] - 5, 50, extent[2]))
    image[2, :10, :10, :10] = 0.5
    return image


@pytest.mark.parametrize("codec", ["lz4", "none"])
def test_what_is_written_is_what_zarr_and_the_rust_pipeline_read(tmp_path, codec):
    url = str(tmp_path / "s.zarr")
    writer = create_or_open(url, SPEC.replace(codec=codec))
    writer.grow("toy", 2, with_label=True)
    image, label = case(), np.zeros((90, 55, 50), np.uint8)
    label[60:, 50:, 3] = 4
    writer.write_case("toy", 1, image, label, (False, True, True))
    pure = zarr.open_group(url, mode="r")["toy"]
    for array in (pure["image"], open_array(url, "toy/image")):
        np.testing.assert_array_equal(array[1, :, :90, :55, :50], image)
        assert not array[1, :, 90:].any()
        assert not array[0].any()
    np.testing.assert_array_equal(pure["label"][1, :90, :55, :50], label)
    (shard,) = (path for path in (tmp_path / "s.zarr" / "toy" / "image" / "c").rglob("*") if path.is_file())
    chunks = np.frombuffer(shard.read_bytes()[-3 * 3 * 2 * 2 * 16 - 4 : -4], "<u8").reshape(3, 3, 2, 2, 2)
    assert (chunks[..., 0] != 2**64 - 1).sum(axis=(1, 2, 3)).tolist() == [0, 8, 1]  # empty chunks cost no bytes


def test_writing_again_replaces_all_of_an_earlier_attempt(tmp_path):
    url = str(tmp_path / "s.zarr")
    writer = create_or_open(url, SPEC)
    writer.grow("toy", 1, with_label=True)
    writer.write_case("toy", 0, case(), np.ones((90, 55, 50), np.uint8))
    small = np.zeros((3, 20, 20, 20), np.float16)
    small[1, 3, 3, 3] = 1
    writer.write_case("toy", 0, small, np.zeros((20, 20, 20), np.uint8))
    image, label = open_array(url, "toy/image")[0], open_array(url, "toy/label")[0]
    assert image.sum() == image[1, 3, 3, 3] == 1
    assert not label.any()
    assert not list((tmp_path / "s.zarr" / "toy").rglob("*.tmp"))


@pytest.mark.parametrize("packing", [[BloscCodec(shuffle="bitshuffle")], [ZstdCodec(level=3)], [GZIP], []])
def test_other_packings_are_read_back_by_zarr(tmp_path, packing):
    store = str(tmp_path / "a.zarr")
    options = {"shape": (2, 7, 8, 9), "shards": (1, 8, 8, 12), "chunks": (1, 4, 4, 4), "dtype": "float16"}
    array = zarr.create_array(store, compressors=packing or None, fill_value=0, **options)
    values = np.random.default_rng(1).random((7, 8, 9)).astype(np.float16)
    path = tmp_path / "a.zarr" / "c" / "1" / "0" / "0" / "0"
    path.parent.mkdir(parents=True)
    path.write_bytes(ShardEncoder(array).encode(values))
    np.testing.assert_array_equal(array[1], values)


def test_layouts_that_are_not_ours_are_refused(tmp_path):
    options = {"shape": (2, 8, 8, 8), "shards": (1, 8, 8, 8), "chunks": (1, 4, 4, 4), "dtype": "uint8"}
    turned = zarr.create_array(str(tmp_path / "a"), filters=[TransposeCodec(order=(0, 3, 2, 1))], **options)
    with pytest.raises(StoreError, match=r"chunks are encoded by \['transpose', 'bytes', 'zstd'\], which is not known"):
        ShardEncoder(turned)
    twice = zarr.create_array(str(tmp_path / "b"), compressors=[GZIP, GZIP], **options)
    with pytest.raises(StoreError, match=r"\['bytes', 'gzip', 'gzip'\]"):
        ShardEncoder(twice)
    two = zarr.create_array(str(tmp_path / "c"), **{**options, "shards": (2, 8, 8, 8)})
    with pytest.raises(StoreError, match="is not laid out as one shard per case"):
        ShardEncoder(two)
