"""From the bytes of a NIfTI file to a checked volume, with memory bounded by what the header says.

The gzip stream is always drained to its end, so a wrong CRC or a missing tail is found. What a header claims is
compared with what the file can hold before anything of that size is allocated.
"""

from __future__ import annotations

import io
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import MAX_WBITS

import nibabel as nib
import numpy as np
import torch
from isal import igzip, igzip_lib, isal_zlib
from nibabel.spatialimages import HeaderDataError

from models.records import Reason
from tasks.affines import BadScanError, choose_affine

GZIP_MAGIC = b"\x1f\x8b"
GZIP_ERRORS: tuple[type[Exception], ...] = (igzip_lib.IsalError, igzip.BadGzipFile, zlib.error)  # type: ignore[assignment]  # isal's stub says instance
HEADER_BYTES = 540
"""Of NIfTI-2; NIfTI-1 has 348."""
SLACK_BYTES = 1 << 16
"""What a file may hold beyond the voxels that its header announces (padding, footers)."""
DEFLATE_RATIO = 1040
"""Deflate cannot expand further than 1032:1; the rest is for headers."""
DEFAULT_MEMORY = 4 << 30
INTEGERS = {"uint8": "uint8", "int8": "int8", "int16": "int16", "uint16": "int32"}
"""Types on disk that are kept as integers, and as what: their percentiles come from a histogram. torch has few
operations on uint16."""


@dataclass(frozen=True)
class Volume:
    """One image as it was read: real intensities and where they lie."""

    data: torch.Tensor
    """(X, Y, Z): uint8, int8, int16 or int32 as on disk where no scaling applies, else float32, maybe with NaN until
    `finite` was applied. First axis fastest, as on disk."""
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

    def replace(self, **changes: Any) -> Volume:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Layout:
    """What a header says of the voxels after it."""

    header: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def voxels(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def expected(self) -> int:
        """Bytes of the decoded file."""
        return self.offset + self.voxels * self.dtype.itemsize


def parse_nifti(raw: bytes, name: str, memory_bytes: int = DEFAULT_MEMORY) -> Volume:
    """Decode one `.nii` or `.nii.gz` file; raises BadScanError with a Reason and the numbers.

    memory_bytes bounds what the decoded file and its float32 copy may take together. Decoding runs on the CPU: a
    deflate stream is sequential, each byte may refer to the 32 kB before it.
    """
    packed = raw[:2] == GZIP_MAGIC
    layout = layout_of(head_of(raw, name) if packed else raw[:HEADER_BYTES], name)
    refuse_absurd(layout, len(raw), packed, name)
    if (need := layout.expected + layout.voxels * 4) > memory_bytes:
        raise BadScanError(
            Reason.MEMORY,
            f"{name}: {layout.shape} of {layout.dtype} needs {need >> 20} MiB, the limit is {memory_bytes >> 20} MiB",
        )
    body = _gunzip(raw, layout.expected + SLACK_BYTES, name) if packed else raw
    if len(body) > layout.expected + SLACK_BYTES:
        limit = layout.expected + SLACK_BYTES
        raise BadScanError(
            Reason.UNREADABLE, f"{name}: decodes to more than {limit} bytes, its header announces {layout.expected}"
        )
    if len(body) < layout.expected:
        raise BadScanError(Reason.UNREADABLE, f"{name}: truncated, {len(body)} of {layout.expected} bytes")
    values = np.frombuffer(body, dtype=layout.dtype, count=layout.voxels, offset=layout.offset)
    data = _scaled(values.reshape(_three_axes(layout.shape, name), order="F"), layout.header, name)
    shape = (data.shape[0], data.shape[1], data.shape[2])
    affine, flags = choose_affine(layout.header, shape, name)
    return Volume(data, affine, name, flags)


def head_of(raw: bytes, name: str) -> bytes:
    """Return the header of a gzip file, decoded; raises BadScanError for a corrupt stream."""
    with gzip_errors(name):
        return igzip.GzipFile(fileobj=io.BytesIO(raw)).read(HEADER_BYTES)


def _gunzip(raw: bytes, limit: int, name: str) -> bytes:
    """Decode a gzip stream to its end, so that its checksum was compared; stops one byte beyond the limit."""
    with gzip_errors(name):
        # In one call and without a copy. Nearly every file is a single member; what follows it goes the slower way.
        member = isal_zlib.decompressobj(wbits=MAX_WBITS | 16)
        body: bytes = member.decompress(raw, limit + 1)
        if len(body) > limit:
            return body
        if not member.eof:
            raise EOFError
        rest = member.unused_data
        if not rest.strip(b"\0"):
            return body
        if rest[:2] != GZIP_MAGIC:
            raise BadScanError(Reason.UNREADABLE, f"{name}: {len(rest)} bytes of garbage after the gzip end")
        return body + igzip.GzipFile(fileobj=io.BytesIO(rest)).read(limit + 1 - len(body))


@contextmanager
def gzip_errors(name: str) -> Iterator[None]:
    """Turn what decoders raise for a damaged stream into BadScanError."""
    try:
        yield
    except EOFError:
        raise BadScanError(Reason.UNREADABLE, f"{name}: truncated, the gzip stream has no end") from None
    except GZIP_ERRORS as error:
        raise BadScanError(Reason.UNREADABLE, f"{name}: corrupt gzip stream ({error})") from error


def layout_of(head: bytes, name: str) -> Layout:
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
    return Layout(header, tuple(dims[1 : dims[0] + 1]), _dtype(header, name), int(offset) or length + 4)


def _dtype(header: Any, name: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError) as error:
        raise BadScanError(Reason.UNREADABLE, f"{name}: header claims an unknown data type ({error})") from error
    if dtype.kind not in "iuf" or not 1 <= dtype.itemsize <= 8:
        raise BadScanError(Reason.UNREADABLE, f"{name}: data type {dtype} is no scalar image")
    return dtype


def refuse_absurd(layout: Layout, size: int, packed: bool, name: str) -> None:
    """Raise BadScanError when a file of so many bytes cannot hold what its header claims."""
    holds = size * (DEFLATE_RATIO if packed else 1) + SLACK_BYTES * packed
    if layout.expected > holds:
        raise BadScanError(
            Reason.UNREADABLE,
            f"{name}: header claims {layout.shape} of {layout.dtype}, {layout.expected} bytes; "
            f"a {'gzip ' if packed else ''}file of {size} bytes holds at most {holds} (truncated or wrong header)",
        )


def _three_axes(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Drop singleton axes after the third; raises BadScanError for a real 4D volume and for single slices."""
    squeezed = shape[:3] + tuple(n for n in shape[3:] if n != 1)
    if len(squeezed) != 3 or min(squeezed) < 2:
        raise BadScanError(Reason.NOT_3D, f"{name}: shape {shape}; three axes of two or more voxels are needed")
    return squeezed


def _scaled(values: np.ndarray, header: Any, name: str) -> torch.Tensor:
    """Return the intensities: integers stay integers unless the header scales them."""
    slope, intercept = scaling_of(header, name)
    kept = INTEGERS.get(values.dtype.newbyteorder("=").name) if slope == 1 and not intercept else None
    with np.errstate(over="ignore", invalid="ignore"):
        native = np.require(values.astype(kept or "float32", order="F", copy=False), requirements=["F", "A"])
    with warnings.catch_warnings():
        # Nothing writes into the decoded file: it would be a copy of 18 MB for nothing.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(native)
    return data if kept else data * slope + intercept


def scaling_of(header: Any, name: str) -> tuple[float, float]:
    """Return slope and intercept of a header, 1 and 0 when it has none; raises BadScanError for impossible ones."""
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise BadScanError(Reason.UNREADABLE, f"{name}: header claims an impossible scaling ({error})") from error
    if np.isinf(header["scl_slope"]):  # NaN and 0 are how files say `no scaling`
        raise BadScanError(Reason.UNREADABLE, f"{name}: header claims an impossible scaling (infinite slope)")
    return (1.0 if slope is None else float(slope)), float(intercept or 0.0)
