"""Windows of local shards without zarr's cost per call: map the file, read its index, decode only the chunks needed.

A shard is what Zarr's `sharding_indexed` codec writes: chunks one after the other, then for each chunk (in C order)
offset and length as little-endian uint64, then the CRC-32C of that index. Only the layout that `models.store_layout`
writes is read here; everything else, and S3, goes through zarr. Source: the Zarr v3 sharding specification (ZEP 2).
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from infra import storage
from models.store_layout import StoreError

ABSENT = 2**64 - 1
"""Offset of a chunk that is all zero and was not written."""
INDEX_ENTRY, INDEX_CRC = 16, 4
# One thread decodes: loader processes share the cores already, and blosc's own threads do not survive a fork.
blosc.use_threads = False

Lead = tuple[int, ...]
"""Indices before the spatial ones: (modality,) of an image, () of a label."""
Span = tuple[slice, slice, int]
"""Along one axis: voxels inside a chunk, where they go in the output, and the number of the chunk."""


class ShardReader:
    """Reads windows of an array of whole-case shards: (case, x, y, z) or (case, modality, x, y, z)."""

    def __init__(
        self, folder: Path, counts: tuple[int, ...], chunk: tuple[int, int, int], dtype: np.dtype, packed: bool
    ) -> None:
        self.folder = folder
        """Of the array; its shards lie in `c/<row>/0/...`."""
        self.counts = counts
        """Chunks of a shard by axis, without the case axis: (x, y, z) or (modality, x, y, z)."""
        self.chunk = chunk
        self.dtype = dtype
        self._view: Callable[[Any, np.ndarray], np.ndarray] = _decoded if packed else _plain

    @classmethod
    def of(cls, url: str, path: str, array: Any) -> ShardReader | None:
        """Return a reader for a zarr array of a store, or None when it is not local or not laid out as ours."""
        if not storage.is_local(url) or array.shards is None or array.dtype.byteorder == ">":
            return None
        packed = _is_packed(array.metadata.to_dict())
        # One shard a case: all axes but the first have one shard.
        whole = all(n <= s for n, s in zip(array.shape[1:], array.shards[1:], strict=True)) and array.shards[0] == 1
        if packed is None or not whole or any(c != 1 for c in array.chunks[:-3]):
            return None
        counts = tuple(s // c for s, c in zip(array.shards[1:], array.chunks[1:], strict=True))
        return cls(storage.local_path(storage.join(url, path)), counts, array.chunks[-3:], array.dtype, packed)

    def read(
        self, row: int, wanted: Iterable[tuple[int, ...]], window: Sequence[slice], out: Iterable[np.ndarray]
    ) -> bool:
        """Fill out[i] with a window of the i-th wanted channel; False when the row has no shard.

        window: voxels inside the grid.
        out: an array per channel, shaped as the window, zero where nothing was written. Raises StoreError for a
        damaged shard.
        """
        path = self.folder.joinpath("c", str(row), *["0"] * len(self.counts))
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                self._fill(memoryview(mapped), wanted, window, out)
        except FileNotFoundError:
            return False
        except (ValueError, RuntimeError, struct.error) as error:
            raise StoreError(f"{path} is damaged: {error}; run preprocess with repair: true") from error
        return True

    def _fill(
        self, shard: memoryview, wanted: Iterable[tuple[int, ...]], window: Sequence[slice], out: Iterable[np.ndarray]
    ) -> None:
        with shard:
            index = self._index(shard)
            end = len(shard)
            buffer = np.empty(self.chunk, self.dtype)
            spans = [_spans(w, edge) for w, edge in zip(window, self.chunk, strict=True)]
            for target, lead in zip(out, wanted, strict=True):
                channel = index[lead]
                for (xs, xo, i), (ys, yo, j), (zs, zo, k) in product(*spans):
                    begin, length = channel[i, j, k].tolist()
                    if begin == ABSENT:
                        continue
                    if begin + length > end:
                        raise ValueError(f"chunk {(*lead, i, j, k)} lies beyond its end at byte {end}")
                    with shard[begin : begin + length] as piece:
                        target[xo, yo, zo] = self._view(piece, buffer)[xs, ys, zs]

    def _index(self, shard: memoryview) -> np.ndarray:
        size = INDEX_ENTRY * int(np.prod(self.counts))
        if len(shard) < size + INDEX_CRC:
            raise ValueError(f"{len(shard)} bytes cannot hold an index of {size + INDEX_CRC}")
        body = bytes(shard[-size - INDEX_CRC : -INDEX_CRC])
        (stated,) = struct.unpack("<I", shard[-INDEX_CRC:])
        if google_crc32c.value(body) != stated:
            raise ValueError("the checksum of its index is wrong")
        return np.frombuffer(body, "<u8").reshape(*self.counts, 2)


def to_float32(half: np.ndarray) -> np.ndarray:
    """Return float16 voxels as float32; numpy takes six times longer for it than torch, which need not be loaded."""
    torch = sys.modules.get("torch")
    return half.astype(np.float32) if torch is None else torch.from_numpy(half).float().numpy()


def _spans(window: slice, edge: int) -> list[Span]:
    """Cut a window along one axis at the borders of the chunks."""
    spans = []
    for number in range(window.start // edge, -(-window.stop // edge)):
        begin, end = max(window.start, number * edge), min(window.stop, (number + 1) * edge)
        inside = slice(begin - number * edge, end - number * edge)
        spans.append((inside, slice(begin - window.start, end - window.start), number))
    return spans


def _decoded(piece: Any, buffer: np.ndarray) -> np.ndarray:
    """Unpack a blosc frame into the buffer; its header must state the size of a chunk (blosc itself writes less)."""
    decoded, packed = struct.unpack_from("<I4xI", piece, 4)
    if decoded != buffer.nbytes or packed != len(piece):
        raise ValueError(f"a chunk of {packed} bytes that holds {decoded}, not {len(piece)} that hold {buffer.nbytes}")
    blosc.decompress(piece, buffer)
    return buffer


def _plain(piece: Any, buffer: np.ndarray) -> np.ndarray:
    if len(piece) != buffer.nbytes:
        raise ValueError(f"a chunk of {len(piece)} bytes, not {buffer.nbytes}")
    return np.frombuffer(piece, buffer.dtype).reshape(buffer.shape)


def _is_packed(metadata: Any) -> bool | None:
    """Say whether the chunks of a shard are blosc frames or plain bytes; None for any other layout."""
    sharding = metadata["codecs"][0]["configuration"]
    names = tuple(codec["name"] for codec in sharding["codecs"])
    index = [codec["name"] for codec in sharding["index_codecs"]]
    keys = metadata["chunk_key_encoding"]
    ours = keys["name"] == "default" and keys.get("configuration", {}).get("separator", "/") == "/"
    if not ours or index != ["bytes", "crc32c"] or sharding["index_location"] != "end":
        return None
    return {("bytes", "blosc"): True, ("bytes",): False}.get(names)
