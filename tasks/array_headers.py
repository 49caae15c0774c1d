"""Headers of NumPy arrays that are images: the grey-matter maps that OpenBHB ships as `.npy`.

An array says nothing of where it lies, so only shapes are accepted whose place is known. Without torch, because the
catalog reads many headers with it.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.reasons import Reason
from tasks.affines import BadScanError

ARRAY_SUFFIX = ".npy"
KNOWN_AFFINES: dict[tuple[int, int, int], np.ndarray] = {
    (121, 145, 121): np.array([[-1.5, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 1.5, -72], [0, 0, 0, 1]], dtype=np.float64),
}
"""Voxel -> RAS+ mm by shape: SPM's tissue maps at 1.5 mm, which CAT12 and OpenBHB use; x runs from right to left."""
HEADER_BYTES = 1 << 14
"""What is looked at for a header; NumPy itself writes some hundred bytes."""
_READERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_NO_HEADER = (
    *(ValueError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError, RecursionError),
    *(LookupError, tokenize.TokenError),
)
"""What NumPy raises on a header that is no literal, or none of an array."""


@dataclass(frozen=True)
class ArrayHeader:
    """What an array's first bytes say of the rest."""

    shape: tuple[int, ...]
    fortran: bool
    """Whether the first axis is the fastest in memory."""
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the values."""

    @property
    def expected(self) -> int:
        """Bytes that the whole file must have."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def values(self, raw: bytes) -> np.ndarray:
        """Return the values of a file of that size in their shape and order of axes, read-only and without a copy."""
        flat = np.frombuffer(raw, self.dtype, count=math.prod(self.shape), offset=self.offset)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def is_array(name: str) -> bool:
    """Return whether a file name is that of a NumPy array."""
    return name.endswith(ARRAY_SUFFIX)


def array_header(raw: bytes, name: str) -> ArrayHeader:
    """Read the header in an array's first bytes; raises BadScanError for what is no array of real numbers."""
    stream = io.BytesIO(raw[:HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _READERS:
            raise BadScanError(Reason.UNREADABLE, f"{name}: array format {version}, known are 1.0 and 2.0")
        shape, fortran, dtype = _READERS[version](stream)
    except _NO_HEADER as error:
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BadScanError(Reason.UNREADABLE, f"{name}: no NumPy array ({said})") from None
    if dtype.hasobject or dtype.kind not in "iuf" or not 1 <= dtype.itemsize <= 8:
        what = "pickled objects, which are never read" if dtype.hasobject else str(dtype)[:80]
        raise BadScanError(Reason.UNREADABLE, f"{name}: holds {what}; real numbers are expected")
    return ArrayHeader(shape, fortran, dtype, stream.tell())


def space_of(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Return the three spatial axes of an array's shape; raises BadScanError when its place is not known."""
    inner = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    if inner not in KNOWN_AFFINES:
        known = " or ".join(map(str, KNOWN_AFFINES))
        raise BadScanError(
            Reason.ARRAY_SHAPE,
            f"{name}: shape {shape}; an array says not where it lies, so {known} is expected (1.5 mm MNI of CAT12), "
            "with or without a first axis of 1; write other images as NIfTI",
        )
    return inner[0], inner[1], inner[2]
