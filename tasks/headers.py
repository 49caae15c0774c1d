"""NIfTI headers from the first bytes of a file: what the catalog knows before any voxel is decoded.

Reading stops after 16 kB of the (compressed) file and 544 decompressed bytes, so neither a huge file nor a gzip bomb
costs memory, and 16k scans take seconds. Integrity of the voxels is checked later, when they are decoded to the end.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from infra import storage
from models.records import Reason
from tasks.affines import BadScanError, choose_affine
from tasks.array_headers import KNOWN_AFFINES, array_header, is_array, space_of

NIFTI_SUFFIXES = (".nii.gz", ".nii")
HEADER_BYTES = 544
"""NIfTI-2 needs 540; NIfTI-1 needs 348."""
READ_BYTES = 16 * 1024
CHECKSUM_BLOCK = 8 << 20
CHECKSUM_PREFIX = "sha256:"
MAX_VOXELS = 2**30
"""A 1024^3 volume: eight times a 0.25 mm head scan."""
MAX_FRAMES = 2**14
"""Of a BOLD image: three hours at 0.7 s."""
MAX_BOLD_VOXELS = 2**33
"""Over all frames: 9,000 of 2 mm."""
MAX_TEXT_BYTES = 64 << 20
"""Of a text file with ROI series or confounds: 1,200 frames of 400 regions take 6 MB."""
MAX_DEFLATE_RATIO = 1032
"""DEFLATE cannot expand a byte into more (zlib's technical notes), so a header that claims more is false."""


class HeaderError(ValueError):
    """A header that the catalog cannot use; `reason` says which rule it broke."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class HeaderInfo:
    """What a NIfTI header says, and the identity of the file that said it."""

    shape: tuple[int, ...]
    """As stored; axes beyond the third are all 1, but for the frames of a BOLD image."""
    spacing_mm: tuple[float, float, float]
    """Lengths of the affine's columns (header zooms can disagree with the affine)."""
    dtype: str
    """NumPy name of the type on disk, before slope and intercept."""
    affine: np.ndarray
    """Voxel -> RAS+ mm (4, 4); for the precedence of sform and qform see tasks.affines.choose_affine."""
    size_bytes: int
    etag: str


def is_nifti(name: str) -> bool:
    """Return whether a file name ends as a NIfTI image does."""
    return name.endswith(NIFTI_SUFFIXES)


def stem(name: str) -> str:
    """Return a file name without folders and without `.nii` or `.nii.gz`."""
    base = name.rsplit("/", 1)[-1]
    for suffix in NIFTI_SUFFIXES:
        if base.endswith(suffix):
            return base[: -len(suffix)]
    return base


def file_identity(url: str) -> tuple[int, str]:
    """Return (size in bytes, ETag); for a local file the modification time in ns stands for the ETag.

    Raises FileNotFoundError for an absent file.
    """
    if storage.is_local(url):
        status = storage.local_path(url).stat()
        return status.st_size, str(status.st_mtime_ns)
    fs, path = storage.filesystem(url)
    return listed_identity(fs.info(path))


def listed_identity(info: Mapping[str, Any]) -> tuple[int, str]:
    """Return (size, ETag) from an entry of an S3 listing."""
    return int(info.get("size") or 0), str(info.get("ETag") or "").strip('"')


def file_checksum(url: str) -> str:
    """Return `sha256:<hex>` of the bytes of a file, read in blocks; raises OSError when it cannot be read."""
    fs, path = storage.filesystem(url)
    total = hashlib.sha256()
    with fs.open(path, "rb", block_size=CHECKSUM_BLOCK) as file:
        while block := file.read(CHECKSUM_BLOCK):
            total.update(block)
    return f"{CHECKSUM_PREFIX}{total.hexdigest()}"


def read_header(url: str, identity: tuple[int, str] | None = None, frames: bool = False) -> HeaderInfo:
    """Read and check the header of one NIfTI file or NumPy array, local or on S3.

    `identity` saves a request when a listing gave it already; `frames` asks for a BOLD image, of two frames or more.
    Raises HeaderError (missing file, unreadable, not 3D or not 4D, bad affine) for what is wrong with the file, and
    OSError when the remote storage itself fails.
    """
    with _readable(url):
        size, etag = identity or file_identity(url)
        fs, path = storage.filesystem(url)
        raw = fs.cat_file(path, start=0, end=min(size, READ_BYTES)) if size else b""
    if is_array(url) and not frames:
        return parse_array_header(raw, size, etag)
    return parse_header(raw, size, etag, frames)


def text_identity(url: str, identity: tuple[int, str] | None = None) -> tuple[int, str]:
    """Return (size in bytes, ETag) of a text file with series or confounds, which is not opened.

    `identity` saves a request when a listing gave it already. Raises HeaderError for a file that is absent, empty or
    larger than MAX_TEXT_BYTES, and OSError when the remote storage itself fails.
    """
    with _readable(url):
        size, etag = identity or file_identity(url)
    if not size:
        raise HeaderError(Reason.UNREADABLE, f"{url} is empty; a table of numbers is expected")
    if size > MAX_TEXT_BYTES:
        detail = f"{url} has {size:,} bytes, {MAX_TEXT_BYTES:,} are allowed for series and confounds"
        raise HeaderError(Reason.UNREADABLE, detail)
    return size, etag


@contextmanager
def _readable(url: str) -> Iterator[None]:
    """Turn what keeps a file from being opened into a HeaderError; an error of a remote storage stays one."""
    try:
        yield
    except FileNotFoundError:
        raise HeaderError(Reason.MISSING_FILE, f"{url} does not exist; restore it or take it off the list") from None
    except OSError as error:
        if not storage.is_local(url):
            raise
        raise HeaderError(Reason.UNREADABLE, f"{url} cannot be read: {error.strerror or error}") from None


def parse_array_header(raw: bytes, size_bytes: int, etag: str = "") -> HeaderInfo:
    """Check the first bytes of a NumPy array of `size_bytes` bytes; raises HeaderError with the rule and the value."""
    try:
        header = array_header(raw, "the array")
        space = space_of(header.shape, "the array")
    except BadScanError as error:
        raise HeaderError(error.reason, error.detail) from None
    if header.expected != size_bytes:
        raise HeaderError(
            Reason.UNREADABLE, f"the array has {size_bytes:,} bytes, its header announces {header.expected:,}"
        )
    affine = KNOWN_AFFINES[space]
    x, y, z = (float(edge) for edge in np.linalg.norm(affine[:3, :3], axis=0))
    return HeaderInfo(space, (x, y, z), header.dtype.newbyteorder("=").name, affine, size_bytes, etag)


def parse_header(raw: bytes, size_bytes: int, etag: str = "", frames: bool = False) -> HeaderInfo:
    """Check the first bytes of a NIfTI file of `size_bytes` bytes; raises HeaderError naming the rule and the value.

    frames: it must be 4D with two frames or more; otherwise it must be one volume.
    """
    compressed = raw[:2] == b"\x1f\x8b"
    header = _decode(_decompress(raw) if compressed else raw[:HEADER_BYTES], size_bytes)
    shape = _check_shape(header, frames)
    dtype = _check_dtype(header)
    _check_size(math.prod(shape) * dtype.itemsize, size_bytes, compressed, header)
    affine = _check_affine(header, shape)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return HeaderInfo(
        shape=shape,
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        dtype=dtype.newbyteorder("=").name,
        affine=affine,
        size_bytes=size_bytes,
        etag=etag,
    )


def _decompress(raw: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(raw, HEADER_BYTES)
    except zlib.error as error:
        raise HeaderError(Reason.UNREADABLE, f"the gzip stream is corrupt: {error}") from None


def _decode(head: bytes, size_bytes: int) -> Any:
    """Return a nibabel header object from at least 348 decompressed bytes."""
    if len(head) < 348:
        raise HeaderError(
            Reason.UNREADABLE,
            f"the file ends inside the NIfTI header: {len(head)} of 348 bytes decoded from {size_bytes} on disk",
        )
    if head[344:348] == b"n+1\0":
        kind, length = nib.Nifti1Header, 348
    elif head[4:8] == b"n+2\0":
        kind, length = nib.Nifti2Header, 540
    else:
        raise HeaderError(Reason.UNREADABLE, f"not a single-file NIfTI: magic {head[344:348]!r}, expected b'n+1\\x00'")
    try:
        return kind.from_fileobj(BytesIO(head[:length]), check=False)
    except (ValueError, HeaderDataError) as error:
        raise HeaderError(Reason.UNREADABLE, f"the NIfTI header cannot be decoded: {error}") from None


def _check_shape(header: Any, frames: bool) -> tuple[int, ...]:
    dim = [int(value) for value in header["dim"]]
    rank = dim[0]
    if not 1 <= rank <= 7:
        raise HeaderError(Reason.UNREADABLE, f"the header claims {rank} dimensions; NIfTI allows 1 to 7")
    shape = tuple(dim[1 : rank + 1])
    limit = MAX_BOLD_VOXELS if frames else MAX_VOXELS
    if min(shape) < 1 or math.prod(shape) > limit:
        raise HeaderError(
            Reason.UNREADABLE, f"the header claims absurd dimensions {shape}; at most {limit:,} voxels are accepted"
        )
    return _check_frames(shape) if frames else _check_volume(shape)


def _check_volume(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 3 or min(shape[:3]) < 2 or any(edge != 1 for edge in shape[3:]):
        raise HeaderError(Reason.NOT_3D, f"shape {shape}; one volume with three axes of two or more voxels is expected")
    return shape


def _check_frames(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a BOLD image without empty axes behind the frames."""
    if len(shape) < 4 or min(shape[:4]) < 2 or shape[3] > MAX_FRAMES or any(edge != 1 for edge in shape[4:]):
        raise HeaderError(
            Reason.NOT_4D,
            f"shape {shape}; a BOLD image has three axes of two or more voxels and 2 to {MAX_FRAMES:,} frames",
        )
    return shape[:4]


def _check_dtype(header: Any) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        raise HeaderError(Reason.UNREADABLE, f"unknown NIfTI data type code {int(header['datatype'])}") from None
    if dtype.kind not in "iuf":
        raise HeaderError(Reason.UNREADABLE, f"data type {dtype} is not a real number per voxel")
    return dtype


def _check_size(claimed: int, size_bytes: int, compressed: bool, header: Any) -> None:
    """Refuse headers whose voxels cannot fit into the file."""
    offset = 0.0 if compressed else float(header["vox_offset"])
    limit = size_bytes * MAX_DEFLATE_RATIO if compressed else size_bytes
    if not math.isfinite(offset) or claimed + offset > limit:
        raise HeaderError(
            Reason.UNREADABLE,
            f"the header claims {claimed:,} bytes of voxels, more than a file of {size_bytes:,} bytes can hold",
        )


def _check_affine(header: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return choose_affine(header, shape, "affine")[0]
    except BadScanError as error:
        raise HeaderError(error.reason, f"unusable {error.detail}") from None
