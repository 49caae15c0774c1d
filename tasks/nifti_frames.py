"""The frames of a 4D NIfTI file, a few at a time: a run of many gigabytes is read in the memory of some frames.

In a NIfTI file a frame follows the other, so a stream can be cut between them. The gzip stream is drained to its end,
so that a wrong checksum or a missing tail is found, as tasks.nifti does for 3D files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import igzip

from models.reasons import Reason
from tasks.affines import BadScanError, choose_affine
from tasks.nifti import (
    DEFAULT_MEMORY,
    GZIP_MAGIC,
    HEADER_BYTES,
    SLACK_BYTES,
    Layout,
    gzip_errors,
    head_of,
    layout_of,
    refuse_absurd,
    scaling_of,
)
from tasks.plan import BLOCK_BYTES, bold_bytes

SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}
"""Of a unit of time in a header. Who leaves it out means seconds; the limits below catch who does not."""
TR_LIMITS = (0.05, 30.0)
"""Seconds between two frames that an MR scanner can need."""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The header of a 4D file."""

    name: str
    shape: tuple[int, int, int]
    """Voxels of a frame."""
    frames: int
    affine: np.ndarray
    """(4, 4) float64: voxel -> RAS+ mm."""
    tr_s: float | None
    """Seconds between frames; None when the header does not say, or what no scanner does."""
    tr_words: str
    """What the header says about it, for messages."""
    flags: dict[str, Any]
    layout: Layout

    @property
    def per_block(self) -> int:
        """Frames that are held at once."""
        return max(1, BLOCK_BYTES // (8 * math.prod(self.shape)))


def open_run(raw: bytes, name: str, memory_bytes: int = DEFAULT_MEMORY) -> Run:
    """Read the header of a 4D file; raises BadScanError for 3D files and for headers that cannot be true.

    memory_bytes bounds what a block of frames may take while it is averaged.
    """
    packed = raw[:2] == GZIP_MAGIC
    layout = layout_of(head_of(raw, name) if packed else raw[:HEADER_BYTES], name)
    refuse_absurd(layout, len(raw), packed, name)
    shape = layout.shape[:4] + tuple(n for n in layout.shape[4:] if n != 1)
    if len(shape) != 4 or min(shape) < 2:
        raise BadScanError(
            Reason.NOT_4D, f"{name}: shape {layout.shape}; three axes of two or more voxels and two or more frames"
        )
    x, y, z, frames = shape
    if (need := bold_bytes(x * y * z)) > memory_bytes:
        raise BadScanError(
            Reason.MEMORY,
            f"{name}: a frame of {(x, y, z)} needs {need >> 20} MiB, the limit is {memory_bytes >> 20} MiB",
        )
    affine, flags = choose_affine(layout.header, (x, y, z), name)
    tr_s, words = _repetition_time(layout.header)
    return Run(name, (x, y, z), frames, affine, tr_s, words, flags, layout)


def blocks_of(raw: bytes, run: Run) -> Iterator[Doubles]:
    """Yield the intensities block by block, (x, y, z, frames of the block) float64, maybe with NaN.

    Raises BadScanError at the end of a damaged stream, so nothing may be used before all was read.
    """
    packed = raw[:2] == GZIP_MAGIC
    slope, intercept = scaling_of(run.layout.header, run.name)
    size = math.prod(run.shape) * run.layout.dtype.itemsize
    stream = igzip.GzipFile(fileobj=io.BytesIO(raw)) if packed else io.BytesIO(raw)
    with gzip_errors(run.name):
        stream.read(run.layout.offset)
        for first in range(0, run.frames, run.per_block):
            count = min(run.per_block, run.frames - first)
            body = stream.read(count * size)
            if len(body) < count * size:
                found = first + len(body) // size
                raise BadScanError(Reason.UNREADABLE, f"{run.name}: truncated, {found} of {run.frames} frames")
            values = np.frombuffer(body, run.layout.dtype).astype(np.float64)
            del body
            with np.errstate(over="ignore", invalid="ignore"):
                values *= slope
                values += intercept
            yield values.reshape((*run.shape, count), order="F")
        if len(stream.read(SLACK_BYTES + 1)) > SLACK_BYTES:
            raise BadScanError(
                Reason.UNREADABLE, f"{run.name}: goes on after its {run.frames} frames, its header announces no more"
            )


def _repetition_time(header: Any) -> tuple[float | None, str]:
    try:
        unit = str(header.get_xyzt_units()[1])
    except KeyError:  # a code that NIfTI does not have
        unit = "of an unknown code"
    value = float(header["pixdim"][4])
    words = f"{value:g} {unit}"
    tr_s = value * SECONDS.get(unit, math.nan)
    return (tr_s if TR_LIMITS[0] <= tr_s <= TR_LIMITS[1] else None), words
