"""Damaged, hostile and useless image files: each is refused with a reason, the same each time, in bounded memory."""

import gzip
import io
import struct
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
from nifti_files import blob, centred

from models.records import Reason
from tasks.affines import BadScanError
from tasks.integrity import finite, varied
from tasks.nifti import parse_nifti

MEMORY = 64 << 20
PEAK = 6 << 20
"""The good file takes 130 kB; what is refused from its header must take no more than a few buffers."""
UNREADABLE, MEMORY_REASON, NOT_3D = Reason.UNREADABLE, Reason.MEMORY, Reason.NOT_3D


def nifti(data):
    return nib.Nifti1Image(data, centred(data.shape[:3])).to_bytes()


GOOD = nifti(blob().astype(np.int16) * 100)
PACKED = gzip.compress(GOOD)


def put(offset, fmt, *values, body=GOOD):
    raw = bytearray(body)
    struct.pack_into(fmt, raw, offset, *values)
    return gzip.compress(bytes(raw), 1)


def dims(*values):
    return put(40, f"<{len(values)}h", *values)


def affines(sform=None, qform=None, sform_code=1, qform_code=0):
    """Return the good file with other rows of the sform, other quaternion and edges of the qform."""
    raw = bytearray(GOOD)
    struct.pack_into("<2h", raw, 252, qform_code, sform_code)
    if sform is not None:
        struct.pack_into("<12f", raw, 280, *np.ravel(sform))
    if qform is not None:
        struct.pack_into("<4f", raw, 76, 1, *qform[:3])
        struct.pack_into("<3f", raw, 256, *qform[3:])
    return gzip.compress(bytes(raw), 1)


def flipped(position):
    raw = bytearray(PACKED)
    raw[position] ^= 0x55
    return bytes(raw)


def rows(**entries):
    """Return the rows of an sform of the identity with some entries changed, by `r<row>c<column>`."""
    matrix = np.eye(4, dtype=np.float32)[:3]
    for name, value in entries.items():
        matrix[int(name[1]), int(name[3])] = value
    return matrix


def bomb(head, size):
    """Return a gzip stream of some bytes and this many zeros."""
    out, packer = io.BytesIO(), zlib.compressobj(1, zlib.DEFLATED, 31)
    out.write(packer.compress(head))
    for _ in range(size >> 20):
        out.write(packer.compress(bytes(1 << 20)))
    return out.getvalue() + packer.flush()


def floats(change):
    data = blob()
    change(data)
    return gzip.compress(nifti(data), 1)


MIDDLES = range(1000, len(PACKED) - 9, len(PACKED) // 9)
NAN, INF = float("nan"), float("inf")
CASES: dict[str, tuple[bytes, Reason]] = {
    **{f"rank {n}": (dims(n), UNREADABLE) for n in (0, -1, 8, 255, 32767, -32768)},
    **{f"axis {a} of {n}": (put(40 + 2 * a, "<h", n), UNREADABLE) for a in (1, 2, 3) for n in (0, -1, 32767)},
    "every axis of 32767": (dims(3, 32767, 32767, 32767), UNREADABLE),
    "seven axes of 32767": (dims(7, *[32767] * 7), UNREADABLE),
    "one plane more than there is": (put(46, "<h", 25), UNREADABLE),
    "zero volumes": (dims(4, 30, 28, 24, 0), UNREADABLE),
    "more than the memory": (bomb(gzip.decompress(dims(3, 400, 400, 400))[:352], 130 << 20), MEMORY_REASON),
    "two volumes": (gzip.compress(nifti(np.ones((5, 5, 5, 2), np.int16))), NOT_3D),
    "vectors": (gzip.compress(nifti(np.ones((5, 5, 5, 1, 3), np.int16))), NOT_3D),
    "one slice": (gzip.compress(nifti(np.ones((5, 5, 1), np.int16))), NOT_3D),
    "one row": (dims(1, 30), NOT_3D),
    "flat": (dims(2, 30, 28), NOT_3D),
    **{
        f"data type {code}": (put(70, "<h", code), UNREADABLE)
        for code in (0, 1, 32, 128, 1536, 1792, 2048, 2304, 9999, -1, 32767)
    },
    **{f"voxel offset {v}": (put(108, "<f", v), UNREADABLE) for v in (NAN, INF, -INF, -1, 1, 100, 347, 5e5, 1e9, 1e30)},
    **{f"slope {v}": (put(112, "<2f", v, 0), UNREADABLE) for v in (INF, -INF)},
    **{f"intercept {v}": (put(112, "<2f", 2, v), UNREADABLE) for v in (INF, -INF, NAN)},
    "slope that overflows": (put(112, "<2f", 3e38, 0), Reason.NOT_FINITE),
    **{f"sform with {v}": (affines(rows(r1c1=v)), Reason.BAD_AFFINE) for v in (NAN, INF, -INF, 0, 1e-30, 1e30)},
    **{f"sform shifted by {v}": (affines(rows(r2c3=v)), Reason.BAD_AFFINE) for v in (NAN, INF)},
    "sform of zeros": (affines(np.zeros((3, 4))), Reason.BAD_AFFINE),
    "sform with parallel axes": (affines(rows(r0c1=1, r1c1=1e-3)), Reason.BAD_AFFINE),
    "sform with shear": (affines(rows(r0c1=0.5)), Reason.BAD_AFFINE),
    "no affine": (affines(sform_code=0), Reason.BAD_AFFINE),
    "qform with edges of 0": (affines(qform=(0, 0, 0, 0, 0, 0), sform_code=0, qform_code=1), Reason.BAD_AFFINE),
    "qform with edges of NaN": (affines(qform=(NAN, 1, 1, 0, 0, 0), sform_code=0, qform_code=1), Reason.BAD_AFFINE),
    "qform that is no rotation": (affines(qform=(1, 1, 1, 1, 1, 1), sform_code=0, qform_code=1), Reason.BAD_AFFINE),
    "qform with a quaternion of NaN": (
        affines(qform=(1, 1, 1, NAN, 0, 0), sform_code=0, qform_code=1),
        Reason.BAD_AFFINE,
    ),
    **{
        f"magic {magic!r}": (put(344, "4s", magic), UNREADABLE)
        for magic in (b"ni1\0", b"n+1 ", b"n+2\0", b"N+1\0", bytes(4), b"\xff" * 4)
    },
    **{f"cut to {n} bytes": (PACKED[:n], UNREADABLE) for n in (*range(12), 18, 19, 30, 100, 400)},
    **{f"cut to {share:.0%}": (PACKED[: int(len(PACKED) * share)], UNREADABLE) for share in np.linspace(0.1, 0.99, 12)},
    **{f"cut by {n} bytes": (PACKED[:-n], UNREADABLE) for n in range(1, 10)},
    **{f"bit flipped in the checksum, byte -{n}": (flipped(-n), UNREADABLE) for n in range(1, 9)},
    **{
        f"bits flipped at byte {n}": (flipped(n), UNREADABLE)
        for n in (2, *range(1000, len(PACKED) - 9, len(PACKED) // 9))
    },
    "plain file cut": (GOOD[:5000], UNREADABLE),
    "plain file with a tail": (GOOD + bytes(1 << 20), UNREADABLE),
    "garbage behind": (PACKED + b"garbage", UNREADABLE),
    "second member cut": (gzip.compress(GOOD[:900]) + gzip.compress(GOOD[900:])[:-300], UNREADABLE),
    "second member with a wrong checksum": (
        gzip.compress(GOOD[:900]) + gzip.compress(GOOD[900:])[:-8] + bytes(8),
        UNREADABLE,
    ),
    "third member is garbage": (
        gzip.compress(GOOD[:900]) + gzip.compress(GOOD[900:]) + b"\x1f\x8b\x08garbage",
        UNREADABLE,
    ),
    "bomb behind the voxels": (bomb(GOOD, 200 << 20), UNREADABLE),
    "bomb as second member": (PACKED + bomb(b"", 200 << 20), UNREADABLE),
    "bomb without a header": (bomb(b"", 200 << 20), UNREADABLE),
    "gzip in gzip": (gzip.compress(PACKED), UNREADABLE),
    "twenty thousand empty members": (gzip.compress(b"") * 20_000, UNREADABLE),
    "empty gzip": (gzip.compress(b""), UNREADABLE),
    "header alone": (gzip.compress(GOOD[:348]), UNREADABLE),
    "header and its extension flag": (gzip.compress(GOOD[:352]), UNREADABLE),
    "text": (b"subject,modality\n" * 100, UNREADABLE),
    "page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNREADABLE),
    "zip": (b"PK\3\4" + bytes(1000), UNREADABLE),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(1000), UNREADABLE),
    "NaN everywhere": (floats(lambda d: d.fill(NAN)), Reason.NOT_FINITE),
    "2 % of NaN": (floats(lambda d: d[:, :, 0].fill(NAN)), Reason.NOT_FINITE),
    "2 % of infinity": (floats(lambda d: d[:, :, 0].fill(-INF)), Reason.NOT_FINITE),
    "constant": (floats(lambda d: d.fill(7)), Reason.CONSTANT),
    "constant integers": (gzip.compress(nifti(np.full((5, 5, 5), -3, np.int16))), Reason.CONSTANT),
    "zeros": (floats(lambda d: d.fill(0)), Reason.EMPTY),
}


def refusal(raw):
    with pytest.raises(BadScanError) as error:
        varied(finite(parse_nifti(raw, "scan.nii.gz", MEMORY), 0.01))
    return error.value


def test_there_are_enough_of_them_and_the_good_one_is_read():
    assert len(CASES) >= 90
    assert len({raw for raw, _ in CASES.values()}) == len(CASES)
    assert varied(finite(parse_nifti(PACKED, "scan.nii.gz", MEMORY), 0.01)).shape == (30, 28, 24)


@pytest.mark.parametrize("name", CASES)
def test_malformed_files_are_refused_with_a_reason_in_bounded_memory(name):
    raw, reason = CASES[name]
    tracemalloc.start()
    try:
        first = refusal(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first.reason == reason, first
    assert first.detail.startswith("scan.nii.gz: ")
    assert peak < PEAK
    assert str(refusal(raw)) == str(first)
