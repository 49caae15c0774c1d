"""Reading a store: published rows only, arrays opened lazily in each process, crops padded with zeros.

store = open_store("demo.zarr")
data = store.dataset("brats2021")
crop = data.read_crop(row=7, modality_indices=[0, 3], start=(10, 10, 10), size=(96, 96, 96))  # (2, 96, 96, 96)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import DTypeLike

from infra import storage
from models.anatomy import Floats
from models.shard_reader import ShardReader, to_float32
from models.spec import PreprocessSpec
from models.store_connectomes import digest_bytes as connectome_bytes
from models.store_connectomes import has_connectome, read_connectome
from models.store_descriptors import Descriptors, descriptor_count, read_descriptors
from models.store_descriptors import digest_bytes as descriptors_bytes
from models.store_layout import (
    CASES,
    Shape3,
    StoreError,
    clip_window,
    dataset_names,
    has_array,
    open_array,
    read_small,
)
from models.store_writer import StoreWriter, case_digest, create_or_open, open_writer, read_attributes

__all__ = [
    "Descriptors",
    "Store",
    "StoreError",
    "StoreWriter",
    "StoredCase",
    "StoredDataset",
    "case_digest",
    "create_or_open",
    "open_store",
    "open_writer",
    "store_digest",
]

_decoded_in: int | None = None


def _guard_fork() -> None:
    """Refuse to decode in a forked child of a process that has decoded: the Rust thread pool would hang for ever."""
    global _decoded_in
    if _decoded_in is None:
        _decoded_in = os.getpid()
    elif _decoded_in != os.getpid():
        raise StoreError(
            f"process {os.getpid()} was forked from {_decoded_in}, which has already read a store; reading here would "
            "hang. Start loader processes with the `spawn` or `forkserver` method"
        )


@dataclass(frozen=True)
class StoredCase:
    """What a reader must know of one published row."""

    dataset: str
    row: int
    case: str
    subject: str
    session: str
    present: tuple[bool, ...]
    """By modality of the spec."""
    extent: Shape3
    """Stored voxels."""
    origin: Shape3
    """Index of stored voxel 0 in the template grid."""
    affine: np.ndarray
    """(4, 4) float64: stored voxel -> RAS+ mm."""
    digest: str
    has_label: bool
    label_scheme: str


class _Lazy:
    """Array handles of one process: dropped when pickled, opened again where they are used."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._handles: dict[str, Any] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_handles": {}, "_pid": -1}

    def open(self, path: str) -> Any:
        """Return the zarr array."""
        return self._kept(path, lambda: open_array(self.url, path))

    def reader(self, path: str) -> ShardReader | None:
        """Return the fast reader of an array, or None where zarr must read it (S3, foreign layouts)."""
        return self._kept(f"{path} reader", lambda: ShardReader.of(self.url, path, self.open(path)))

    def _kept(self, key: str, make: Callable[[], Any]) -> Any:
        if self._pid != os.getpid():
            self._handles, self._pid = {}, os.getpid()
        if key not in self._handles:
            self._handles[key] = make()
        return self._handles[key]


class StoredDataset:
    """The published rows of one dataset. Picklable; safe to use after fork when the parent has not read yet."""

    def __init__(self, url: str, name: str, spec: PreprocessSpec, cases: pa.Table) -> None:
        self.url = url
        self.name = name
        self.spec = spec
        self._lazy = _Lazy(url)
        columns = [column for column in cases.column_names if column != "fingerprint"]
        lines = cases.select(columns).filter(pc.field("dataset") == name).to_pylist()
        self._lines: dict[int, dict[str, Any]] = {line["row"]: line for line in lines}
        self._has_label = any(line["has_label"] for line in lines) or has_array(url, name, "label")

    @property
    def image(self) -> Any:
        """The zarr array (case, modality, x, y, z) float16."""
        return self._lazy.open(f"{self.name}/image")

    @property
    def label(self) -> Any | None:
        """The zarr array (case, x, y, z) uint8, or None when the dataset has no segmentations."""
        return self._lazy.open(f"{self.name}/label") if self._has_label else None

    @property
    def present(self) -> Any:
        """The zarr array (case, modality) bool."""
        return self._lazy.open(f"{self.name}/present")

    @property
    def extent(self) -> Any:
        """The zarr array (case, axis) int32, voxels."""
        return self._lazy.open(f"{self.name}/extent")

    @property
    def affine(self) -> Any:
        """The zarr array (case, row, col) float64: stored voxel -> RAS+ mm."""
        return self._lazy.open(f"{self.name}/affine")

    @property
    def origin(self) -> Any:
        """The zarr array (case, axis) int32: index of stored voxel 0 in the template grid."""
        return self._lazy.open(f"{self.name}/origin")

    @cached_property
    def descriptors(self) -> Descriptors | None:
        """The regional descriptors of all rows, NaN where a case has none; None when the dataset has no array of them.

        Raises StoreError for lost ones.
        """
        _guard_fork()
        counts = {row: count for row in self.rows if (count := descriptor_count(self._lines[row]))}
        return read_descriptors(self.url, self.name, counts)

    def has_connectome(self, row: int) -> bool:
        """Say whether a stored row has a connectome."""
        return self.spec.connectome is not None and has_connectome(self._stored(row))

    def read_connectome(self, row: int) -> Floats:
        """Return the connectome (R, R) of a row, regions as `spec.connectome` orders them; NaN for missing regions.

        Raises StoreError when the case has none, and when it is damaged or lost.
        """
        line, spec = self._stored(row), self.spec.connectome
        if spec is None or not has_connectome(line):
            raise StoreError(f"case {line['case']!r} of {self.name} (row {row}) has no connectome")
        found = read_connectome(self.url, self.name, row, spec)
        if found is None:
            raise self._lost("connectome", line)
        return found

    def descriptor_bytes(self, row: int) -> bytes:
        """Return what the descriptors of a row add to its case digest; empty for a case without."""
        found = self.descriptors
        return b"" if found is None else descriptors_bytes(found.values[row], found.atlas, found.basis)

    def connectome_bytes(self, row: int) -> bytes:
        """Return what the connectome of a row adds to its case digest; empty for a case without."""
        return connectome_bytes(self.read_connectome(row), self.spec.connectome) if self.has_connectome(row) else b""

    def beside_bytes(self, row: int) -> bytes:
        """Return what a row's case digest is made of beside the voxels."""
        return self.descriptor_bytes(row) + self.connectome_bytes(row)

    def small(self, name: str) -> np.ndarray:
        """Return a per-case array as a whole: one of SMALL_ARRAYS, e.g. `source_affine` (case, modality, row, col).

        Raises StoreError when a chunk that holds a stored row is lost.
        """
        return read_small(self.url, self._lazy.open(f"{self.name}/{name}"), self.rows)

    @property
    def rows(self) -> list[int]:
        """Rows with status `stored`, ascending."""
        return sorted(row for row, line in self._lines.items() if line["status"] == "stored")

    @cached_property
    def _small(self) -> dict[str, np.ndarray]:
        return {name: self.small(name) for name in ("affine", "origin")}

    def case_info(self, row: int) -> StoredCase:
        """Return what is known of a published row; raises StoreError for a row that is not stored."""
        line = self._stored(row)
        small = self._small
        return StoredCase(
            dataset=self.name,
            row=row,
            present=tuple(modality in line["modalities"] for modality in self.spec.modalities),
            extent=_triple(line["extent"]),
            origin=_triple(small["origin"][row]),
            affine=small["affine"][row],
            **{key: line[key] for key in ("case", "subject", "session", "digest", "has_label", "label_scheme")},
        )

    def read_crop(
        self,
        row: int,
        modality_indices: Sequence[int],
        start: Sequence[int],
        size: Sequence[int],
        dtype: DTypeLike = np.float32,
    ) -> np.ndarray:
        """Return a window of some modalities, (len(modality_indices), *size), zeros outside the extent.

        start may be negative. Only the chunks of these modalities are read; absent ones are zeros. dtype: float32, or
        float16 for the voxels as they are stored. Raises StoreError when the shard is damaged or missing.
        """
        line = self._stored(row)
        out = np.zeros((len(modality_indices), *size), dtype=np.float16)
        stored, window = clip_window(start, size, line["extent"])
        names = self.spec.modalities
        present = [k for k, modality in enumerate(modality_indices) if names[modality] in line["modalities"]]
        if present and all(s.stop > s.start for s in stored):
            targets = [out[k][tuple(window)] for k in present]
            if not self._read("image", row, [(int(modality_indices[k]),) for k in present], stored, targets):
                raise self._lost("shard", line)
        return to_float32(out) if np.dtype(dtype) == np.float32 else out.astype(dtype, copy=False)

    def read_label(self, row: int, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Return a window of the label, (*size) uint8, zeros outside the extent.

        Raises StoreError when the case has no label, and when its shard is damaged or missing.
        """
        line = self._stored(row)
        if not line["has_label"]:
            raise StoreError(f"case {line['case']!r} of {self.name} (row {row}) has no label")
        out = np.zeros(tuple(size), dtype=np.uint8)
        stored, window = clip_window(start, size, line["extent"])
        if all(s.stop > s.start for s in stored):
            there = self._read("label", row, [()], stored, [out[tuple(window)]])
            if not there and has_label_shard(line):
                raise self._lost("label shard", line)
        return out

    def _lost(self, what: str, line: dict[str, Any]) -> StoreError:
        return StoreError(
            f"the {what} of {self.name}/{line['case']} (row {line['row']}) is missing; run `brainloom store verify` "
            "and run preprocess with repair: true"
        )

    def read_case(self, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the whole case as stored: image (M, x, y, z) float16, and label (x, y, z) uint8 or None."""
        line = self._stored(row)
        extent = _triple(line["extent"])
        image = self.read_crop(row, range(len(self.spec.modalities)), (0, 0, 0), extent, np.float16)
        return image, self.read_label(row, (0, 0, 0), extent) if line["has_label"] else None

    def _read(
        self, name: str, row: int, leads: Sequence[tuple[int, ...]], window: Sequence[slice], out: Sequence[np.ndarray]
    ) -> bool:
        """Fill out[i] with a window of channel leads[i]; False when the row is known to have no shard."""
        path = f"{self.name}/{name}"
        if (reader := self._lazy.reader(path)) is not None:
            return reader.read(row, leads, window, out)
        array = self._lazy.open(path)
        shard = storage.join(self.url, path, array.metadata.encode_chunk_key((row, *[0] * (array.ndim - 1))))
        try:
            with storage.explained("read", shard):
                for target, lead in zip(out, leads, strict=True):
                    target[...] = array[(row, *lead, *window)]
        except (ValueError, RuntimeError, AssertionError, struct.error) as error:
            raise StoreError(f"{shard} is damaged: {error}; run preprocess with repair: true") from error
        return any(target.any() for target in out) or _is_there(shard)

    def _stored(self, row: int) -> dict[str, Any]:
        _guard_fork()
        line = self._lines.get(row)
        if line is None or line["status"] != "stored":
            status = line["status"] if line else "not published"
            raise StoreError(f"row {row} of {self.name} cannot be read: it is {status}; readers see stored rows only")
        return line


def _is_there(shard: str) -> bool:
    """Say whether a shard exists: to zarr one that is not there is one of zeros, and so is an empty object on S3."""
    folder, _, name = shard.rpartition("/")
    try:
        info = storage.find(folder).get(name)
    except FileNotFoundError:
        return False
    if info is not None and not info.get("size"):
        raise StoreError(f"{shard} is damaged: it has 0 bytes; run preprocess with repair: true")
    return info is not None


@dataclass(frozen=True)
class Store:
    """A finalised store. Holds URLs and tables only; see StoredDataset for voxels."""

    url: str
    spec: PreprocessSpec

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets, sorted."""
        return dataset_names(self.url)

    def cases(self) -> pa.Table:
        """Return cases.parquet: one line per row, stored, retired and quarantined alike."""
        return read_cases(self.url)

    def dataset(self, name: str) -> StoredDataset:
        """Return one dataset; raises StoreError listing the known ones."""
        if name not in self.datasets:
            raise StoreError(f"{self.url} has no dataset {name!r}; it has: {', '.join(self.datasets)}")
        return StoredDataset(self.url, name, self.spec, read_lines(self.url))


def open_store(url: str) -> Store:
    """Open a store for reading; raises StoreError for no store, an unknown schema, or one never finalised."""
    attributes = read_attributes(url)
    if attributes.get("finalised") is None:
        raise StoreError(
            f"{url} was never finalised, so no row is published; run `brainloom preprocess` again to finish it"
        )
    return Store(url, PreprocessSpec.model_validate(attributes["spec"]))


def read_cases(url: str, columns: list[str] | None = None) -> pa.Table:
    """Return cases.parquet of a store, or some of its columns; raises FileNotFoundError when none was published."""
    return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(url, CASES))), columns=columns)


def read_lines(url: str) -> pa.Table:
    """Return cases.parquet without the fingerprints, which are nearly all of it; raises as `read_cases` does."""
    data = storage.read_bytes(storage.join(url, CASES))
    names = [name for name in pq.read_schema(io.BytesIO(data)).names if name != "fingerprint"]
    return pq.read_table(io.BytesIO(data), columns=names)


def digest_of_cases(table: pa.Table, spec_digest: str) -> str:
    """Return the SHA-256 (hex) over the sorted lines `dataset/case digest spec` of the stored cases."""
    stored = table.select(["dataset", "case", "digest", "status"]).filter(pc.field("status") == "stored").to_pylist()
    lines = sorted(f"{line['dataset']}/{line['case']} {line['digest']} {spec_digest}\n" for line in stored)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def store_digest(url: str) -> str:
    """Return the digest of the published content: no row order, no times, no software versions."""
    columns = ["dataset", "case", "digest", "status"]
    return digest_of_cases(read_cases(url, columns), open_store(url).spec.content_digest())


def has_label_shard(line: dict[str, Any]) -> bool:
    """Say whether a line of cases.parquet stands for a label with a shard: of an all-zero one nothing is written.

    The QC of the case says how many voxels its label has; where it does not, the label is taken to have some.
    """
    return bool(line["has_label"] and json.loads(line.get("qc") or "{}").get("label_voxels", 1))


def _triple(values: Sequence[int] | np.ndarray) -> Shape3:
    x, y, z = (int(v) for v in values)
    return x, y, z
