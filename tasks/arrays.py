"""Images from bytes, by their name: NIfTI, or NumPy arrays whose place is known. An array is never unpickled."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from models.reasons import Reason
from tasks.affines import BadScanError
from tasks.array_headers import KNOWN_AFFINES, array_header, is_array, space_of
from tasks.nifti import DEFAULT_MEMORY, Volume, parse_nifti


def parse_image(raw: bytes, name: str, memory_bytes: int = DEFAULT_MEMORY) -> Volume:
    """Decode one image, NIfTI or array by its name; raises BadScanError with a Reason and the numbers."""
    return (parse_array if is_array(name) else parse_nifti)(raw, name, memory_bytes)


def parse_array(raw: bytes, name: str, memory_bytes: int = DEFAULT_MEMORY) -> Volume:
    """Decode an array of shape (1, X, Y, Z) or (X, Y, Z) in whatever order of axes in memory; raises BadScanError.

    memory_bytes bounds what the file and its float32 copy may take together.
    """
    header = array_header(raw, name)
    if (need := len(raw) + 4 * math.prod(header.shape)) > memory_bytes:
        raise BadScanError(
            Reason.MEMORY,
            f"{name}: {header.shape} of {header.dtype} needs {need >> 20} MiB, the limit is {memory_bytes >> 20} MiB",
        )
    if len(raw) != header.expected:
        raise BadScanError(Reason.UNREADABLE, f"{name}: {len(raw)} bytes, its header announces {header.expected}")
    # The order of the axes is that of the file; they are never transposed and reshaped, which would scramble voxels.
    values = header.values(raw)
    space = space_of(header.shape, name)
    image = values.reshape(space)
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(np.require(image, dtype=np.float32, requirements=["A"]))
    return Volume(data, KNOWN_AFFINES[space], name, {})
