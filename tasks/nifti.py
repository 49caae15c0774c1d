"""From the bytes of a NIfTI file to a checked volume, with memory bounded by what the header says.

The gzip stream is always drained to its end, so a wrong CRC or a missing tail is found. What a header claims is
compared with what the file can hold before anything of that size is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip_lib, isal_zlib
from nibabel.spatialimages import HeaderDataError

from models.records import Reason

GZIP_MAGIC = b"\x1f\x8b"
GZIP_ERROR: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stub says instance
BLOCK_BYTES = 1 << 20
SLACK_BYTES = 1 << 16
"""What a file may hold beyond the voxels that its header announces (padding, footers)."""
DEFLATE_RATIO = 1040
"""Deflate cannot expand further than 1032:1; the rest is for headers."""
DEFAULT_MEMORY = 4 << 30
SHEAR_LIMIT = 0.02
"""Largest cosine between two voxel axes that still counts as rectangular."""
CONFLICT_MM = 0.5
"""sform and qform conflict when they place a corner of the volume further apart than this."""


class BadScanError(Exception):
    """A file that cannot be used: data, not a bug. Becomes a quarantined case with this reason and detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Volume:
    """One image as it was read: real intensities and where they lie."""

    data: np.ndarray
    """(X, Y, Z) float32; may hold NaN until `finite` was applied."""
    affine: np.ndarray
    """(4, 4) float64: voxel -> RAS+ mm."""
    name: str
    """File name, for messages."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Oddities of the header that do not forbid using it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels by axis."""
        x, y, z = self.data.shape
        return x, y, z


@dataclass(frozen=True)
class _Layout:
    header: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def expected(self) -> int:
        return self.offset + self.voxels * self.dtype.itemsize


def parse_nifti(raw: bytes, name: str, memory_bytes: int = DEFAULT_MEMORY) -> Volume:
    """Decode one `.nii` or `.nii.gz` file; raises BadScanError with a Reason and the numbers.

    memory_bytes bounds what the decoded file and its float32 copy may take together.
    """
    blocks = _inflate(raw, name) if raw[:2] == GZIP_MAGIC else _plain(raw)
    head = bytearray()
    for block in blocks:
        head += block
        if len(head) >= 540:
            break
    layout = _layout(bytes(head), name)
    _refuse_absurd(layout, len(raw), raw[:2] == GZIP_MAGIC, name, memory_bytes)
    body = _drain(head, blocks, layout.expected, name)
    values = np.frombuffer(body, dtype=layout.dtype, count=layout.voxels, offset=layout.offset)
    data = _scaled(values.reshape(_three_axes(layout.shape, name), order="F"), layout.header, name)
    affine, flags = choose_affine(layout.header, data.shape, name)
    return Volume(data, affine, name, flags)


def _plain(raw: bytes) -> Iterator[bytes]:
    for start in range(0, len(raw), BLOCK_BYTES):
        yield raw[start : start + BLOCK_BYTES]


def _inflate(raw: bytes, name: str) -> Iterator[bytes]:
    """Yield the decoded stream in blocks; checks each member's CRC and that nothing but zeros follows the last."""
    view, position = memoryview(raw), 0
    while position < len(view):
        stream = isal_zlib.decompressobj(wbits=31)
        while not stream.eof:
            piece = view[position : position + BLOCK_BYTES]
            if not piece:
                raise BadScanError(Reason.UNREADABLE, f"{name}: truncated, the gzip stream has no end")
            position += len(piece)
            yield from _member_blocks(stream, piece, name)
        position -= len(stream.unused_data)
        if not any(view[position : position + BLOCK_BYTES]):
            return
        if bytes(view[position : position + 2]) != GZIP_MAGIC:
            raise BadScanError(Reason.UNREADABLE, f"{name}: {len(view) - position} bytes of garbage after the gzip end")


def _member_blocks(stream: Any, piece: memoryview, name: str) -> Iterator[bytes]:
    data: bytes | memoryview = piece
    try:
        while True:
            out = stream.decompress(data, BLOCK_BYTES)
            if out:
                yield out
            data = stream.unconsumed_tail
            if stream.eof or (not data and len(out) < BLOCK_BYTES):
                return
    except GZIP_ERROR as error:
        raise BadScanError(Reason.UNREADABLE, f"{name}: corrupt gzip stream ({error})") from error


def _drain(head: bytearray, blocks: Iterator[bytes], expected: int, name: str) -> memoryview:
    """Return exactly the announced bytes, having read the stream to its end so that its checksum was compared."""
    limit, kept, total = expected + SLACK_BYTES, head, len(head)
    for block in blocks:
        total += len(block)
        if total > limit:
            raise BadScanError(
                Reason.UNREADABLE, f"{name}: decodes to more than {limit} bytes, its header announces {expected}"
            )
        kept += block
    if total < expected:
        raise BadScanError(Reason.UNREADABLE, f"{name}: truncated, {total} of {expected} bytes")
    return memoryview(kept)[:expected]


def _layout(head: bytes, name: str) -> _Layout:
    """Parse a NIfTI-1 or NIfTI-2 single-file header, either byte order."""
    for cls, length, magic in ((nib.Nifti1Header, 348, b"n+1\0"), (nib.Nifti2Header, 540, b"n+2\0")):
        if len(head) >= length and magic in (head[344:348], head[4:8]):
            header = cls(head[:length], check=False)
            break
    else:
        raise BadScanError(Reason.UNREADABLE, f"{name}: no NIfTI file (magic {head[344:348]!r}, {len(head)} bytes)")
    dims = [int(d) for d in header["dim"]]
    if not 1 <= dims[0] <= 7 or any(d < 1 for d in dims[1 : dims[0] + 1]):
        raise BadScanError(Reason.UNREADABLE, f"{name}: header claims dimensions {dims}")
    offset = float(header["vox_offset"])
    if not (offset == 0 or length <= offset <= SLACK_BYTES * 256):
        raise BadScanError(Reason.UNREADABLE, f"{name}: header claims a voxel offset of {offset}")
    return _Layout(header, tuple(dims[1 : dims[0] + 1]), _dtype(header, name), int(offset) or length + 4)


def _dtype(header: Any, name: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError) as error:
        raise BadScanError(Reason.UNREADABLE, f"{name}: header claims an unknown data type ({error})") from error
    if dtype.kind not in "iuf" or not 1 <= dtype.itemsize <= 8:
        raise BadScanError(Reason.UNREADABLE, f"{name}: data type {dtype} is no scalar image")
    return dtype


def _refuse_absurd(layout: _Layout, size: int, packed: bool, name: str, memory_bytes: int) -> None:
    holds = size * (DEFLATE_RATIO if packed else 1) + SLACK_BYTES * packed
    if layout.expected > holds:
        raise BadScanError(
            Reason.UNREADABLE,
            f"{name}: header claims {layout.shape} of {layout.dtype}, {layout.expected} bytes; "
            f"a {'gzip ' if packed else ''}file of {size} bytes holds at most {holds} (truncated or wrong header)",
        )
    need = layout.expected + layout.voxels * 4
    if need > memory_bytes:
        raise BadScanError(
            Reason.MEMORY,
            f"{name}: {layout.shape} of {layout.dtype} needs {need >> 20} MiB, the limit is {memory_bytes >> 20} MiB",
        )


def _three_axes(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Drop singleton axes after the third; raises BadScanError for a real 4D volume and for single slices."""
    squeezed = shape[:3] + tuple(n for n in shape[3:] if n != 1)
    if len(squeezed) != 3 or min(squeezed) < 2:
        raise BadScanError(Reason.NOT_3D, f"{name}: shape {shape}; three axes of two or more voxels are needed")
    return squeezed


def _scaled(values: np.ndarray, header: Any, name: str) -> np.ndarray:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise BadScanError(Reason.UNREADABLE, f"{name}: header claims an impossible scaling ({error})") from error
    with np.errstate(over="ignore", invalid="ignore"):
        data = np.ascontiguousarray(values, dtype=np.float32)
        if slope not in (None, 1.0) or intercept not in (None, 0.0):
            data = data * np.float32(1.0 if slope is None else slope) + np.float32(intercept or 0.0)
    return data


def choose_affine(header: Any, shape: tuple[int, ...], name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the voxel -> RAS+ mm matrix and flags: the sform if it is set and usable, else the qform.

    Usable: finite, not singular, not sheared by more than SHEAR_LIMIT. nibabel prefers the sform, ITK the qform; a
    conflict is flagged, never resolved in silence. Raises BadScanError when neither is usable.
    """
    found: dict[str, np.ndarray] = {}
    defects: list[str] = []
    for kind, read in (("sform", header.get_sform), ("qform", header.get_qform)):
        try:
            matrix, code = read(coded=True)
        except (ValueError, HeaderDataError) as error:
            defects.append(f"{kind} {error}")
            continue
        if not code or matrix is None:
            defects.append(f"{kind} not set")
        elif defect := affine_defect(matrix):
            defects.append(f"{kind} {defect}")
        else:
            found[kind] = np.asarray(matrix, dtype=np.float64)
    if not found:
        raise BadScanError(Reason.BAD_AFFINE, f"{name}: {'; '.join(defects)}")
    kind, affine = next(iter(found.items()))
    flags: dict[str, Any] = {"affine_from": kind} if kind != "sform" else {}
    if any("not set" not in defect for defect in defects):
        flags["affine_defect"] = "; ".join(defects)
    if len(found) == 2 and (gap := _corner_gap_mm(found["sform"], found["qform"], shape)) > CONFLICT_MM:
        flags["affine_conflict_mm"] = round(gap, 3)
    zooms = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(zooms, lengths, rtol=0.01):
        flags["zooms_disagree"] = [round(float(v), 4) if math.isfinite(v) else None for v in (*zooms, *lengths)]
    return affine, flags


def affine_defect(matrix: np.ndarray) -> str:
    """Say what is wrong with a voxel -> mm matrix (not finite, singular, sheared); empty when it is usable."""
    axes = np.asarray(matrix, dtype=np.float64)[:3, :3]
    if not np.isfinite(matrix).all():
        return "not finite"
    lengths = np.linalg.norm(axes, axis=0)
    if lengths.min() < 1e-3 or lengths.max() > 1e3:
        return f"singular: voxel edges of {', '.join(f'{v:.4g}' for v in lengths)} mm"
    unit = axes / lengths
    if abs(np.linalg.det(unit)) < 1e-2:
        return f"singular: determinant {np.linalg.det(axes):.3g}"
    cosine = np.abs(unit.T @ unit - np.eye(3)).max()
    return f"sheared: cosine {cosine:.3f} between axes, at most {SHEAR_LIMIT}" if cosine > SHEAR_LIMIT else ""


def _corner_gap_mm(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> float:
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]], (1,), indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((a - b) @ corners)[:3], axis=0).max())


def finite(volume: Volume, share_max: float) -> Volume:
    """Replace NaN and infinities by 0 and count them in the flags; above share_max raises BadScanError."""
    bad = ~np.isfinite(volume.data)
    count = int(bad.sum())
    if not count:
        return volume
    share = count / bad.size
    if share > share_max:
        raise BadScanError(
            Reason.NOT_FINITE, f"{volume.name}: {share:.2%} of the voxels are NaN or infinite, at most {share_max:.2%}"
        )
    data = np.where(bad, np.float32(0), volume.data)
    return Volume(data, volume.affine, volume.name, {**volume.flags, "nan_replaced": count})


def varied(volume: Volume) -> Volume:
    """Return the volume unchanged; raises BadScanError when it is all zero or has one value everywhere."""
    low, high = float(volume.data.min()), float(volume.data.max())
    if low == high == 0:
        raise BadScanError(Reason.EMPTY, f"{volume.name}: all voxels are zero")
    if low == high:
        raise BadScanError(Reason.CONSTANT, f"{volume.name}: all voxels are {low:g}")
    return volume


def as_label(volume: Volume) -> Volume:
    """Round a label image to integers; raises BadScanError when values are not integers of 0..255."""
    rounded = np.rint(volume.data)
    off = float(np.abs(volume.data - rounded).max())
    if off > 1e-3 or rounded.min() < 0 or rounded.max() > 255:
        raise BadScanError(
            Reason.LABEL_VALUES,
            f"{volume.name}: labels must be integers of 0..255, found values {rounded.min():g}..{rounded.max():g}, "
            f"up to {off:.3g} from an integer",
        )
    return Volume(rounded + np.float32(0), volume.affine, volume.name, volume.flags)
