import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nifti_files import blob, centred, write_nifti

from models.records import Reason
from tasks.affines import BadScanError
from tasks.integrity import as_label, finite, varied
from tasks.nifti import parse_nifti


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_nifti(tmp_path_factory.mktemp("n") / "a.nii.gz", blob()).read_bytes()


def refused(raw, reason, text, **options):
    with pytest.raises(BadScanError, match=text) as error:
        finite(parse_nifti(raw, "a.nii.gz", **options), 0.01)
    assert error.value.reason == reason


def patched(raw, offset, fmt, *values):
    body = bytearray(gzip.decompress(raw))
    struct.pack_into(fmt, body, offset, *values)
    return gzip.compress(bytes(body))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64", ">i2", ">f4"])
def test_reads_what_nibabel_reads(tmp_path, dtype):
    values = blob().astype(dtype)
    path = write_nifti(tmp_path / "a.nii.gz", values, slope=0.37, inter=-3.5)
    volume = parse_nifti(path.read_bytes(), "a")
    assert volume.data.dtype == torch.float32
    np.testing.assert_allclose(volume.data, nib.load(path).get_fdata(), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(volume.affine, centred(values.shape))
    assert volume.flags == {}


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        ("uint8", torch.uint8),
        ("int8", torch.int8),
        (">i2", torch.int16),
        ("uint16", torch.int32),
        ("int32", torch.float32),
        ("float64", torch.float32),
    ],
)
def test_small_integers_stay_integers(tmp_path, dtype, kept):
    image = nib.Nifti1Image((blob() / 2).astype(dtype), np.eye(4))
    volume = parse_nifti(gzip.compress(image.to_bytes()), "a")
    assert volume.data.dtype == kept
    np.testing.assert_allclose(volume.data, np.asarray(image.dataobj))


def test_reads_plain_nifti2_and_concatenated_gzip(tmp_path):
    nib.save(nib.Nifti2Image(blob(), centred((30, 28, 24))), tmp_path / "b.nii")
    raw = (tmp_path / "b.nii").read_bytes()
    np.testing.assert_array_equal(parse_nifti(raw, "b").data, blob())
    members = gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]) + bytes(64)
    np.testing.assert_array_equal(parse_nifti(members, "b").data, blob())


def test_wrong_crc_is_found_although_nibabel_reads_it(packed, tmp_path):
    broken = bytearray(packed)
    broken[-6] ^= 0xFF
    refused(bytes(broken), Reason.UNREADABLE, "corrupt gzip stream")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.9999])
def test_truncated_gzip(packed, share):
    refused(packed[: int(len(packed) * share)], Reason.UNREADABLE, "truncated|no NIfTI")


def test_truncated_plain_file_says_how_much_it_can_hold(packed):
    refused(gzip.decompress(packed)[:5000], Reason.UNREADABLE, r"header claims \(30, 28, 24\).* 5000 bytes")


def test_wrong_magic_and_garbage_behind(packed):
    refused(b"PK\3\4" + bytes(1000), Reason.UNREADABLE, "no NIfTI file")
    refused(b"", Reason.UNREADABLE, "no NIfTI file")
    refused(packed + b"surplus", Reason.UNREADABLE, "7 bytes of garbage after the gzip end")


def test_absurd_dimensions_are_refused_before_anything_is_allocated(packed):
    import tracemalloc

    raw = patched(packed, 40, "<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1)
    tracemalloc.start()
    refused(raw, Reason.UNREADABLE, r"header claims \(32000, 32000, 32000\) of float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    refused(patched(packed, 40, "<8h", 3, -5, 28, 24, 1, 1, 1, 1), Reason.UNREADABLE, "claims dimensions")


def test_decompression_bomb_is_stopped_at_the_size_its_header_announces():
    bomb = nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)).to_bytes() + bytes(300 << 20)
    refused(gzip.compress(bomb, 1), Reason.UNREADABLE, "decodes to more than 65952 bytes, its header announces 416")


def test_memory_is_refused_from_the_header(packed):
    refused(packed, Reason.MEMORY, "needs .* MiB, the limit is 0 MiB", memory_bytes=1000)


def test_shapes(tmp_path):
    single = write_nifti(tmp_path / "4d.nii", blob()[..., None])
    assert parse_nifti(single.read_bytes(), "4d").shape == (30, 28, 24)
    refused(write_nifti(tmp_path / "5.nii", np.ones((5, 5, 5, 2), "f4")).read_bytes(), Reason.NOT_3D, r"\(5, 5, 5, 2\)")
    refused(write_nifti(tmp_path / "2.nii", np.ones((5, 5, 1), "f4")).read_bytes(), Reason.NOT_3D, r"\(5, 5, 1\)")


def test_types_that_are_no_image(packed):
    refused(patched(packed, 70, "<h", 128), Reason.UNREADABLE, "no scalar image")
    refused(patched(packed, 70, "<h", 9999), Reason.UNREADABLE, "data type")


def test_not_finite(tmp_path):
    values = blob()
    values[0, 0, :20] = np.nan
    values[0, 1, 0] = np.inf
    volume = finite(parse_nifti(write_nifti(tmp_path / "a.nii", values).read_bytes(), "a"), 0.01)
    assert volume.flags == {"nan_replaced": 21}
    assert volume.data.isfinite().all()
    values[:8] = np.nan
    with pytest.raises(BadScanError, match=r"26\.\d+% of the voxels are NaN or infinite, at most 1\.00%"):
        finite(parse_nifti(write_nifti(tmp_path / "b.nii", values).read_bytes(), "b"), 0.01)


@pytest.mark.parametrize(("value", "reason"), [(0, Reason.EMPTY), (7, Reason.CONSTANT)])
def test_without_contrast(tmp_path, value, reason):
    volume = parse_nifti(write_nifti(tmp_path / "a.nii", np.full((5, 5, 5), value, "f4")).read_bytes(), "a")
    with pytest.raises(BadScanError) as error:
        varied(volume)
    assert error.value.reason == reason


def with_forms(sform, qform, shape=(6, 6, 6)):
    image = nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4))
    image.set_sform(sform, 1 if sform is not None else 0)
    image.set_qform(qform, 1 if qform is not None else 0)
    return image.to_bytes()


def test_affine_precedence_and_conflict():
    a, b = np.diag([1.0, 1, 1, 1]), np.diag([1.0, 1, 1, 1])
    b[:3, 3] = 4
    both = parse_nifti(with_forms(a, b), "a")
    np.testing.assert_allclose(both.affine, a)
    assert both.flags["affine_conflict_mm"] == pytest.approx(48**0.5, abs=1e-2)
    only_q = parse_nifti(with_forms(None, b), "a")
    np.testing.assert_allclose(only_q.affine, b)
    assert only_q.flags["affine_from"] == "qform"
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    fallback = parse_nifti(with_forms(sheared, b), "a")
    np.testing.assert_allclose(fallback.affine, b)
    assert "sform sheared" in fallback.flags["affine_defect"]


def test_header_zooms_that_disagree_with_the_affine_are_flagged(packed):
    volume = parse_nifti(patched(packed, 80, "<3f", 1, 1, 5), "a")
    np.testing.assert_allclose(volume.affine, centred((30, 28, 24)))
    assert volume.flags["zooms_disagree"] == [1, 1, 5, 1, 1, 1]
    assert parse_nifti(patched(packed, 80, "<3f", 1, 1, float("nan")), "a").flags["zooms_disagree"][2] is None


def test_affines_that_are_of_no_use():
    refused(with_forms(None, None), Reason.BAD_AFFINE, "sform not set; qform not set")
    flat = np.diag([1.0, 1, 0, 1])
    refused(with_forms(flat, None), Reason.BAD_AFFINE, "sform singular: voxel edges of 1, 1, 0 mm")
    parallel = np.eye(4)
    parallel[:3, 1] = [1, 1e-3, 0]
    refused(with_forms(parallel, None), Reason.BAD_AFFINE, "sform singular: determinant")
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    refused(with_forms(sheared, None), Reason.BAD_AFFINE, "sform sheared: cosine 0.371")


def test_labels_are_rounded_and_checked(tmp_path):
    stored = write_nifti(tmp_path / "a.nii", (blob() > 50).astype(np.int16) * 30, slope=0.1)
    label = as_label(parse_nifti(stored.read_bytes(), "a"))
    assert label.data.dtype == torch.uint8
    assert set(np.unique(label.data)) == {0, 3}
    with pytest.raises(BadScanError, match=r"integers of 0\.\.255, found values 0\.\.\d+, up to 0\.\d+ from"):
        as_label(parse_nifti(write_nifti(tmp_path / "b.nii", blob()).read_bytes(), "b"))
    with pytest.raises(BadScanError, match="found values -1"):
        as_label(parse_nifti(write_nifti(tmp_path / "c.nii", -(blob() > 50).astype("f4")).read_bytes(), "c"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_reason_never_a_crash(packed, data):
    body = bytearray(gzip.decompress(packed))
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    raw = gzip.compress(bytes(body), 1)
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        volume = varied(finite(parse_nifti(raw, "a", 64 << 20), 0.01))
    except BadScanError as error:
        assert error.reason in set(Reason)  # noqa: PT017 - both outcomes are right
    else:
        assert volume.data.isfinite().all()
        assert np.isfinite(volume.affine).all()
