from __future__ import annotations

import gzip
import struct
import tracemalloc
from contextlib import suppress

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.records import Reason
from tasks.headers import HeaderError, file_identity, is_nifti, parse_header, read_header, stem


def write_nifti(path, shape=(4, 5, 6), spacing=(1.0, 1.0, 1.0), dtype="int16"):
    nib.save(nib.Nifti1Image(np.ones(shape, dtype), np.diag([*spacing, 1.0])), path)
    return path


def patched(path, offset, data):
    """Overwrite decompressed bytes of a .nii.gz file."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


def refused(path, reason, text):
    with pytest.raises(HeaderError, match=text) as caught:
        read_header(str(path))
    assert caught.value.reason == reason


def test_header_agrees_with_nibabel(tmp_path):
    affine = np.array([[0, 0, 2.0, -9], [-1, 0, 0, 4], [0, 3.0, 0, 7], [0, 0, 0, 1]])
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), affine), path)
    header = read_header(str(path))
    assert header.shape == (3, 4, 5)
    assert header.dtype == "float32"
    assert header.spacing_mm == (1.0, 3.0, 2.0)
    np.testing.assert_array_equal(header.affine, nib.load(path).affine)
    assert (header.size_bytes, header.etag) == (path.stat().st_size, str(path.stat().st_mtime_ns))
    assert file_identity(str(path)) == (header.size_bytes, header.etag)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_versions_byte_orders_and_compressions(tmp_path, name, kind, order):
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    nib.save(kind(np.ones((2, 3, 4), np.int16), np.diag([2, 2, 2, 1]), header), tmp_path / name)
    found = read_header(str(tmp_path / name))
    assert (found.shape, found.dtype, found.spacing_mm) == ((2, 3, 4), "int16", (2.0, 2.0, 2.0))


def test_qform_is_used_when_there_is_no_sform(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), None)
    image.set_qform(np.diag([3, 3, 3, 1]), code=1)
    image.set_sform(None, code=0)
    nib.save(image, tmp_path / "a.nii.gz")
    assert read_header(str(tmp_path / "a.nii.gz")).spacing_mm == (3.0, 3.0, 3.0)


def test_a_singleton_fourth_axis_is_3d(tmp_path):
    assert read_header(str(write_nifti(tmp_path / "a.nii.gz", (4, 4, 4, 1)))).shape == (4, 4, 4, 1)


@pytest.mark.parametrize("shape", [(4, 4, 4, 2), (4, 4), (4, 4, 1), (2, 2, 2, 1, 3)])
def test_other_ranks_are_not_3d(tmp_path, shape):
    refused(write_nifti(tmp_path / "a.nii.gz", shape), Reason.NOT_3D, "three axes of two or more voxels")


def test_missing_file(tmp_path):
    refused(tmp_path / "a.nii.gz", Reason.MISSING_FILE, r"a\.nii\.gz does not exist; restore it")


def test_a_folder_is_unreadable(tmp_path):
    (tmp_path / "a.nii.gz").mkdir()
    refused(tmp_path / "a.nii.gz", Reason.UNREADABLE, "cannot be read: Is a directory")


def test_empty_and_truncated_headers(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"")
    refused(path, Reason.UNREADABLE, "ends inside the NIfTI header: 0 of 348 bytes")
    path.write_bytes(gzip.compress(b"x" * 100))
    refused(path, Reason.UNREADABLE, "ends inside the NIfTI header: 100 of 348 bytes")


def test_corrupt_gzip(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz")
    raw = path.read_bytes()
    path.write_bytes(raw[:10] + b"\xff" * (len(raw) - 10))
    refused(path, Reason.UNREADABLE, "the gzip stream is corrupt")


def test_wrong_magic(tmp_path):
    refused(patched(write_nifti(tmp_path / "a.nii.gz"), 344, b"oops"), Reason.UNREADABLE, r"magic b'oops'")


def test_absurd_dimensions(tmp_path):
    path = patched(write_nifti(tmp_path / "a.nii.gz"), 40, struct.pack("<4h", 3, 30000, 30000, 30000))
    refused(path, Reason.UNREADABLE, r"absurd dimensions \(30000, 30000, 30000\)")
    path = patched(write_nifti(tmp_path / "a.nii.gz"), 42, struct.pack("<h", -4))
    refused(path, Reason.UNREADABLE, r"absurd dimensions \(-4, 5, 6\)")
    path = patched(write_nifti(tmp_path / "a.nii.gz"), 40, struct.pack("<h", 9))
    refused(path, Reason.UNREADABLE, r"claims \d+ dimensions; NIfTI allows 1 to 7")


def test_more_voxels_than_the_file_can_hold(tmp_path):
    path = patched(write_nifti(tmp_path / "a.nii.gz"), 42, struct.pack("<3h", 900, 900, 900))
    refused(path, Reason.UNREADABLE, "claims 1,458,000,000 bytes of voxels, more than a file of")
    plain = write_nifti(tmp_path / "a.nii")
    plain.write_bytes(plain.read_bytes()[:-1])
    refused(plain, Reason.UNREADABLE, "claims 240 bytes of voxels, more than a file of 591 bytes can hold")


def test_data_types_that_are_no_real_number(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", dtype="complex64")
    refused(path, Reason.UNREADABLE, "data type complex64 is not a real number")
    refused(patched(path, 70, struct.pack("<h", 99)), Reason.UNREADABLE, "unknown NIfTI data type code 99")


def test_bad_affines(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz")
    patched(path, 252, struct.pack("<h", 0))
    refused(patched(path, 280, bytes(16)), Reason.BAD_AFFINE, "unusable affine: sform singular")
    refused(patched(path, 280, struct.pack("<f", float("nan"))), Reason.BAD_AFFINE, "sform not finite; qform not set")
    refused(patched(path, 254, struct.pack("<h", 0)), Reason.BAD_AFFINE, "sform not set; qform not set")


def test_a_gzip_bomb_costs_no_memory(tmp_path):
    raw = gzip.compress(write_nifti(tmp_path / "a.nii").read_bytes() + bytes(50_000_000))
    tracemalloc.start()
    parse_header(raw[:16384], len(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@given(st.binary(max_size=700))
def test_any_bytes_give_a_header_or_a_reason(raw):
    with suppress(HeaderError):
        parse_header(raw, len(raw))


@given(st.integers(0, 351), st.binary(min_size=1, max_size=4))
def test_any_damage_of_a_header_gives_a_header_or_a_reason(offset, damage):
    image = nib.Nifti1Image(np.ones((2, 3, 4), np.int16), np.eye(4)).to_bytes()
    raw = image[:offset] + damage + image[offset + len(damage) :]
    with suppress(HeaderError):
        header = parse_header(raw, len(raw))
        assert np.isfinite(header.affine).all()
        assert len(header.shape) >= 3


def test_names():
    assert is_nifti("x.nii.gz")
    assert is_nifti("x.nii")
    assert not is_nifti("x.json")
    assert stem("a/b/x_t1.nii.gz") == "x_t1"
    assert stem("x.nii") == "x"
    assert stem("x.txt") == "x.txt"
