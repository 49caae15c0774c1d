"""A whole case as the bytes of one shard, in one pass and without zarr's cost per shard.

zarr and zarrs allocate the full shard, grid and all modalities, and read what was there before they write a part of it
(240x240x192 voxels of 8 modalities are 177 MB). Here only chunks that hold something are touched, and the result is
one object that replaces whatever was there. Source: the Zarr v3 sharding specification (ZEP 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numcodecs.registry import get_codec

from models.store_layout import StoreError

ABSENT = 2**64 - 1
"""Offset and length of a chunk that is all zero and not written."""
SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
# One thread encodes: workers share the cores already.
blosc.use_threads = False


class ShardEncoder:
    """Encodes cases for one array of whole-case shards: (case, x, y, z) or (case, modality, x, y, z)."""

    def __init__(self, array: Any) -> None:
        """Take shapes and codecs from a zarr array; raises StoreError for a layout that is not ours."""
        sharding = array.metadata.to_dict()["codecs"][0]["configuration"]
        index = [codec["name"] for codec in sharding.get("index_codecs", ())]
        if index != ["bytes", "crc32c"] or sharding["index_location"] != "end" or array.shards[0] != 1:
            raise StoreError(
                f"array {array.path} is not laid out as one shard per case with a checked index at its end"
            )
        self.counts = tuple(s // c for s, c in zip(array.shards[1:], array.chunks[1:], strict=True))
        """Chunks by axis, without the case axis."""
        self.chunk = array.chunks[-3:]
        self.dtype = array.dtype.newbyteorder("<")
        self._pack = _packer(sharding["codecs"], self.dtype.itemsize, array.path)

    def encode(self, values: np.ndarray, leads: Sequence[tuple[int, ...]] = ((),)) -> bytes:
        """Return the shard of one case, empty when it holds nothing but zeros.

        values: (x, y, z), or (M, x, y, z) with the channels to look at as leads, [(0,), (3,)].
        """
        index = np.full((*self.counts, 2), ABSENT, dtype="<u8")
        pieces: list[bytes] = []
        offset = 0
        buffer = np.zeros(self.chunk, dtype=self.dtype)
        places = [range(-(-n // edge)) for n, edge in zip(values.shape[-3:], self.chunk, strict=True)]
        for lead, place in product(leads, product(*places)):
            window = tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(place, self.chunk, strict=True))
            part = values[lead][window]
            if part.shape != buffer.shape:
                buffer[...] = 0
            buffer[tuple(slice(0, n) for n in part.shape)] = part
            if not buffer.view(np.uint8).any():
                continue
            pieces.append(self._pack(buffer))
            index[(*lead, *place)] = offset, len(pieces[-1])
            offset += len(pieces[-1])
        if not pieces:
            return b""
        table = index.tobytes()
        return b"".join((*pieces, table, google_crc32c.value(table).to_bytes(4, "little")))


def _packer(codecs: Sequence[dict[str, Any]], itemsize: int, path: str) -> Callable[[np.ndarray], bytes]:
    """Return what turns a chunk into bytes: the codecs of the array after its plain little-endian bytes."""
    first, *packing = codecs
    if first["name"] != "bytes" or len(packing) > 1:
        raise StoreError(f"array {path}: chunks are encoded by {[c['name'] for c in codecs]}, which is not known here")
    if not packing:
        return lambda chunk: chunk.tobytes()
    name, options = packing[0]["name"], packing[0].get("configuration", {})
    if name == "blosc":
        codec = blosc.Blosc(
            cname=options["cname"],
            clevel=options["clevel"],
            shuffle=SHUFFLES[options["shuffle"]],
            blocksize=options["blocksize"],
            typesize=itemsize,
        )
    elif name in {"zstd", "gzip"}:
        codec = get_codec({"id": name, **options})
    else:
        raise StoreError(f"array {path}: chunks are packed by {name!r}, which is not known here")
    return codec.encode
