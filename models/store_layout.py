"""How a store lies on disk: names, array shapes, shards and chunks, and opening arrays with the Rust codec pipeline.

    <name>.zarr/        attributes: schema version, preprocessing spec and digest, finalised state
      <dataset>/        image, label, connectome (store_connectomes), and one small array per property of a case
                        (descriptors: store_descriptors)
      cases.parquet     one line per row, folded from the receipts
      _build/           plans, leases, receipts, attempts

The small arrays are written by one process alone, the flow at finalise: with 1024 cases to a chunk, several workers
writing their own rows would lose each other's; with one case to a chunk, 16,000 cases would be 110,000 tiny objects.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import zarr
import zarrs
from zarr.codecs import BloscCodec

from infra import storage
from models.records import DESCRIPTORS
from models.spec import PreprocessSpec

SCHEMA = 1
ATTRIBUTE = "brainloom"
"""Key of our attributes in the root group."""
CASES = "cases.parquet"
BUILD = "_build"
SHARD_ARRAYS = ("image", "label", "connectome")
"""Arrays whose objects belong to one case each; workers write them."""
CASE_CHUNK = 1024
"""Cases in one chunk of the small arrays."""

Shape3 = tuple[int, int, int]


class SmallArray(NamedTuple):
    """One property of every case: its dtype and the named axes after `case`."""

    dtype: str
    axes: tuple[tuple[str, int], ...]
    """Name and length; length 0 stands for the number of modalities."""


SMALL_ARRAYS: dict[str, SmallArray] = {
    # Which rows count, for readers that do not know cases.parquet: False for retired, quarantined and erased rows.
    "stored": SmallArray("bool", ()),
    "present": SmallArray("bool", (("modality", 0),)),
    "extent": SmallArray("int32", (("axis", 3),)),
    "affine": SmallArray("float64", (("row", 4), ("col", 4))),
    "origin": SmallArray("int32", (("axis", 3),)),
    "source_shape": SmallArray("int32", (("modality", 0), ("axis", 3))),
    "source_affine": SmallArray("float64", (("modality", 0), ("row", 4), ("col", 4))),
    "intensity_range": SmallArray("float32", (("modality", 0), ("bound", 2))),
}


class StoreError(RuntimeError):
    """A store that cannot be read or written as asked; the message says what, the rule, the value and what to do."""


def shard_shape(spec: PreprocessSpec) -> Shape3:
    """Return the spatial edges of a shard: the grid rounded up to whole chunks, so that a case is one shard."""
    x, y, z = (-(-edge // spec.chunk) * spec.chunk for edge in spec.grid)
    return x, y, z


_PIPELINE = threading.RLock()
"""zarr's configuration is one for all threads: two that set and restore it in turn would leave the wrong one behind."""


@contextmanager
def rust_pipeline() -> Iterator[None]:
    """Create or open arrays with the `zarrs` codec pipeline; zarr falls back to its own where that cannot be used."""
    path = f"{zarrs.__name__}.ZarrsCodecPipeline"
    with _PIPELINE, zarr.config.set({"codec_pipeline.path": path}), warnings.catch_warnings():
        # zarrs announces that it cannot serve fsspec stores; that S3 goes through zarr's pipeline is documented.
        warnings.filterwarnings("ignore", message=".*zarrs.*")
        warnings.filterwarnings("ignore", message=".*ZarrsCodecPipeline.*")
        yield


def limit_threads(threads: int) -> None:
    """Bound the codec threads of this process; Dask workers use one each."""
    zarr.config.set({"threading.max_workers": threads})


def open_array(url: str, path: str, mode: str = "r") -> Any:
    """Open one array of a store by its path. Consolidated metadata are not used: they may be older than the array."""
    with rust_pipeline(), storage.explained("open", storage.join(url, path)):
        store = storage.zarr_store(url, "r" if mode == "r" else "r+")
        return zarr.open_array(store, path=path, mode="r" if mode == "r" else "r+", zarr_format=3)


def open_small(url: str, path: str) -> Any:
    """Open an array of properties for writing, with chunks of nothing but its fill value: readers take one that is not
    there for lost. By zarr's own codec pipeline: `zarrs` leaves them out whatever the array asks for."""
    with _PIPELINE, zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        return open_array(url, path, "r+").with_config({"write_empty_chunks": True})


def read_small(url: str, array: Any, stored: Iterable[int]) -> np.ndarray:
    """Return a small array of a store as a whole.

    stored: rows that hold a case. Raises StoreError when the chunk of one is lost, of which zarr would make zeros.
    """
    values = np.asarray(array[:])
    empty = {row // array.chunks[0]: row for row in stored if not values[row].any()}
    for number, row in empty.items():
        # Chunks of zeros are written too (models.store_writer), so one that is not there is lost.
        chunk = array.metadata.encode_chunk_key((number, *[0] * (array.ndim - 1)))
        if not storage.exists(storage.join(url, array.path, chunk)):
            raise StoreError(
                f"{array.path} of {url} has lost the chunk {chunk}, which holds row {row}; restore it from a backup, "
                "or preprocess into a new store"
            )
    return values


def has_array(url: str, dataset: str, name: str) -> bool:
    """Say whether a dataset has an array of this name."""
    return storage.exists(storage.join(url, dataset, name, "zarr.json"))


def dataset_names(url: str) -> list[str]:
    """Return the datasets of a store, sorted."""
    names = [name for name in storage.listdir(url) if not name.startswith((BUILD, ".")) and "." not in name]
    return [name for name in names if has_array(url, name, "image")]


def grow_dataset(url: str, dataset: str, spec: PreprocessSpec, rows: int, with_label: bool) -> None:
    """Create the arrays of a dataset, or lengthen their case axis to `rows`; never shortens, never touches a voxel."""
    check_dataset_name(dataset)
    store = storage.zarr_store(url, "r+")
    wanted = ["image", *(["label"] if with_label or has_array(url, dataset, "label") else []), *SMALL_ARRAYS, "case"]
    wanted += [DESCRIPTORS] if has_array(url, dataset, DESCRIPTORS) else []
    with rust_pipeline(), storage.explained("write", storage.join(url, dataset)):
        if not storage.exists(storage.join(url, dataset, "zarr.json")):
            zarr.create_group(store, path=dataset, zarr_format=3)
        for name in wanted:
            if has_array(url, dataset, name):
                _lengthen(zarr.open_array(store, path=f"{dataset}/{name}", mode="r+", zarr_format=3), rows)
            else:
                _create(store, dataset, name, spec, rows)
        name_axis(store, url, dataset, "modality", spec.modalities)


def name_axis(store: Any, url: str, dataset: str, axis: str, names: Sequence[str]) -> None:
    """Write the coordinate of an axis unless it is complete: a kill may fall between its creation and its values."""
    if has_array(url, dataset, axis):
        coordinate = zarr.open_array(store, path=f"{dataset}/{axis}", mode="r+", zarr_format=3)
    else:
        coordinate = _create_strings(store, dataset, axis, len(names), len(names))
    if [str(name) for name in coordinate[:]] != list(names):
        coordinate[:] = np.array(names, dtype=object)


def check_dataset_name(dataset: str) -> None:
    """Raise StoreError unless the name can be a group of the store: lower case letters, digits, dashes."""
    if not dataset or not all(c.isascii() and (c.islower() or c.isdigit() or c == "-") for c in dataset):
        raise StoreError(
            f"dataset name {dataset!r} cannot be a group of the store: use lower-case letters, digits and dashes"
        )


def _lengthen(array: Any, rows: int) -> None:
    if array.shape[0] < rows:
        array.resize((rows, *array.shape[1:]))


def _create(store: Any, dataset: str, name: str, spec: PreprocessSpec, rows: int) -> None:
    if name == "case":
        _create_strings(store, dataset, name, rows, CASE_CHUNK)
    elif name in SMALL_ARRAYS:
        _create_small(store, dataset, name, rows, len(spec.modalities))
    else:
        _create_voxels(store, dataset, name, spec, rows)


def _create_voxels(store: Any, dataset: str, name: str, spec: PreprocessSpec, rows: int) -> None:
    """Create image (case, modality, x, y, z) or label (case, x, y, z): one shard per case, cubic chunks inside.

    No compressor around the shard: it would forbid reading a part of it. Chunks that are all zero are not stored.
    """
    channels: tuple[tuple[str, int], ...] = (("modality", len(spec.modalities)),) if name == "image" else ()
    axes = ("case", *(axis for axis, _ in channels), "x", "y", "z")
    zarr.create_array(
        store,
        name=f"{dataset}/{name}",
        shape=(rows, *(n for _, n in channels), *spec.grid),
        shards=(1, *(n for _, n in channels), *shard_shape(spec)),
        chunks=(1, *(1 for _ in channels), spec.chunk, spec.chunk, spec.chunk),
        dtype="float16" if name == "image" else "uint8",
        # Unshuffled: a fifth more bytes, read in three quarters of the time (docs/decisions/0004-chunk-and-codec.md).
        compressors=BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle") if spec.codec == "lz4" else None,
        fill_value=0,
        dimension_names=axes,
        zarr_format=3,
    )


def _create_small(store: Any, dataset: str, name: str, rows: int, modalities: int) -> None:
    small = SMALL_ARRAYS[name]
    lengths = tuple(length or modalities for _, length in small.axes)
    zarr.create_array(
        store,
        name=f"{dataset}/{name}",
        shape=(rows, *lengths),
        chunks=(CASE_CHUNK, *lengths),
        dtype=small.dtype,
        fill_value=0,
        dimension_names=("case", *(axis for axis, _ in small.axes)),
        zarr_format=3,
    )


def _create_strings(store: Any, dataset: str, name: str, length: int, chunk: int) -> Any:
    """Create a coordinate of a dataset: names, one per place of the axis that bears the array's name."""
    return zarr.create_array(
        store,
        name=f"{dataset}/{name}",
        shape=(length,),
        chunks=(chunk,),
        dtype=str,
        fill_value="",
        dimension_names=(name,),
        zarr_format=3,
    )


def clip_window(start: Sequence[int], size: Sequence[int], extent: Sequence[int]) -> tuple[list[slice], list[slice]]:
    """Return where a window overlaps [0, extent): the slices in the stored case, and in the window."""
    stored, window = [], []
    for begin, length, stop in zip(start, size, extent, strict=True):
        first, last = max(0, begin), max(0, begin, min(stop, begin + length))
        stored.append(slice(first, last))
        window.append(slice(first - begin, last - begin))
    return stored, window
