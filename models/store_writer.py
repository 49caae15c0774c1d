"""The writing side of a store: create it for one spec, grow datasets, write whole cases, publish rows.

Order matters more than locks: voxels first, then the receipt (tasks.receipts), then at finalise the small arrays,
cases.parquet, and the `finalised` attribute last. What was interrupted stays invisible and is written again.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from infra import storage
from models.anatomy import Floats
from models.records import CaseGeometry, Receipt, digest_of
from models.shard_encoder import ShardEncoder
from models.spec import PreprocessSpec
from models.stopwatch import step
from models.store_connectomes import make_room, write_connectome
from models.store_descriptors import clear_descriptors, write_descriptors
from models.store_layout import (
    ATTRIBUTE,
    CASES,
    SCHEMA,
    SHARD_ARRAYS,
    SMALL_ARRAYS,
    Shape3,
    StoreError,
    dataset_names,
    grow_dataset,
    open_array,
    open_small,
    read_small,
    rust_pipeline,
)
from models.store_schema import refuse_schema


def case_digest(
    image: np.ndarray,
    label: np.ndarray | None,
    present: np.ndarray,
    affine: np.ndarray,
    origin: Shape3,
    beside: bytes = b"",
) -> str:
    """Return the XXH3-128 (hex) of a case as it decodes: voxels, label, present, extent, affine, origin, the rest.

    image: (M, x, y, z) float16 on the extent, absent modalities included as zeros but not hashed;
    label: (x, y, z) uint8 or None; present: (M,) bool; affine: (4, 4) float64, stored voxel -> RAS+ mm; beside:
    what is no voxel, `digest_bytes` of store_descriptors and of store_connectomes, in this order.
    """
    state = xxhash.xxh3_128()
    state.update(np.asarray(present, dtype=np.uint8).tobytes())
    state.update(np.asarray(image.shape[1:], dtype="<i4").tobytes())
    state.update(np.asarray(affine, dtype="<f8").tobytes())
    state.update(np.asarray(origin, dtype="<i4").tobytes())
    for channel in np.flatnonzero(present):
        state.update(np.ascontiguousarray(image[channel], dtype="<f2").data)
    state.update(b"label" if label is not None else b"no label")
    if label is not None:
        state.update(np.ascontiguousarray(label, dtype=np.uint8).data)
    state.update(beside)
    return state.hexdigest()


class StoreWriter:
    """Writes cases into the rows that a plan gave them. Holds URLs only; arrays are opened in the process that writes.

    Use `create_or_open` to get one; workers build their own from the URL with `open_writer`.
    """

    def __init__(self, url: str, spec: PreprocessSpec) -> None:
        self.url = url
        self.spec = spec
        self._arrays: dict[str, Any] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "spec": self.spec, "_arrays": {}, "_pid": -1}

    def grow(self, dataset: str, rows: int, with_label: bool) -> None:
        """Make room for `rows` cases in a dataset. Only the flow that holds the lease may call this."""
        grow_dataset(self.url, dataset, self.spec, rows, with_label)
        if self.spec.connectome is not None:
            with rust_pipeline(), storage.explained("write", storage.join(self.url, dataset)):
                make_room(storage.zarr_store(self.url, "r+"), self.url, dataset, self.spec.connectome, rows)
        self._arrays.clear()

    def write_case(
        self,
        dataset: str,
        row: int,
        image: np.ndarray,
        label: np.ndarray | None,
        present: Sequence[bool] | None = None,
        connectome: Floats | None = None,
    ) -> None:
        """Write one case as one shard per array. image: (M, x, y, z) float16; label: (x, y, z) uint8 or None.

        present: which modalities to look at; None: all. connectome: (R, R), in stores whose spec has one. Each shard is
        one object that is forced to disk and then takes the place of whatever a killed process left there: readers and
        later attempts never see half of one. Raises StoreError when the case is larger than the grid, the row was not
        planned, or the connectome has another number of regions.
        """
        self._check_fits(dataset, row, image)
        channels = range(len(image)) if present is None else np.flatnonzero(present).tolist()
        self._write_shard(dataset, "image", row, image, [(channel,) for channel in channels])
        if label is not None:
            self._write_shard(dataset, "label", row, label, [()])
        if self.spec.connectome is not None:
            write_connectome(self.url, dataset, row, connectome, self.spec.connectome)

    def _write_shard(
        self, dataset: str, name: str, row: int, values: np.ndarray, leads: Sequence[tuple[int, ...]]
    ) -> None:
        encoder = self._encoder(dataset, name)
        target = storage.join(self._shard_url(dataset, name, row), *["0"] * len(encoder.counts))
        with step("encode"):
            body = encoder.encode(values, leads)
        with step("write"):
            if body:
                storage.write_bytes(target, body)
            else:
                storage.delete(target)

    def erase_case(self, dataset: str, row: int) -> None:
        """Delete the shards of a row; it then reads as zeros, and has no connectome."""
        for name in SHARD_ARRAYS:
            storage.delete(self._shard_url(dataset, name, row))

    def write_small(
        self, dataset: str, receipts: list[Receipt], names: dict[int, str], published: Collection[int] = ()
    ) -> None:
        """Write the per-case properties of stored rows, and the case names by row, in one go per array.

        published: rows that cases.parquet has as stored. Raises StoreError when a chunk of one that is not written now
        is lost. (The array `stored` knows less: a kill in between leaves it ahead of the others.)
        """
        with storage.explained("write", storage.join(self.url, dataset)):
            stored = {r.row: r.geometry for r in receipts if r.status == "stored" and r.geometry is not None}
            extents = {r.row: r.extent for r in receipts}
            present = {r.row: r.modalities for r in receipts}
            before = sorted(set(published) - set(stored))
            for name in SMALL_ARRAYS:
                if not stored:
                    break
                array = open_small(self.url, f"{dataset}/{name}")
                values = read_small(self.url, array, before)
                for row, geometry in stored.items():
                    values[row] = self._small_value(name, geometry, extents[row], present[row])
                array[:] = values
            cases = open_array(self.url, f"{dataset}/case", "r+")
            if stored:
                of_stored = [r for r in receipts if r.row in stored]
                write_descriptors(self.url, dataset, of_stored, int(cases.shape[0]))
            labels = np.asarray(cases[:], dtype=object)
            for row, case in names.items():
                labels[row] = case
            cases[:] = labels

    def mark_stored(self, dataset: str, rows: Collection[int]) -> None:
        """Write which rows of a dataset are stored; all others are not."""
        with storage.explained("write", storage.join(self.url, dataset)):
            array = open_array(self.url, f"{dataset}/stored", "r+")
            array[:] = np.isin(np.arange(array.shape[0]), list(rows))

    def clear_rows(self, dataset: str, rows: Collection[int]) -> None:
        """Empty the per-case properties and the names of erased rows."""
        with storage.explained("write", storage.join(self.url, dataset)):
            for name in (*SMALL_ARRAYS, "case"):
                array = open_array(self.url, f"{dataset}/{name}", "r+")
                values = np.asarray(array[:], dtype=object if name == "case" else None)
                # A plan may be longer than the arrays when its flow was killed before it grew them.
                values[[row for row in rows if row < len(values)]] = "" if name == "case" else 0
                array[:] = values
            clear_descriptors(self.url, dataset, rows)

    def publish(self, table: pa.Table, digest: str) -> None:
        """Replace cases.parquet, then set the finalised attribute: from here on readers see these rows."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(storage.join(self.url, CASES), sink.getvalue())
        stored = table.column("status").to_pylist().count("stored")
        finalised = {"digest": digest, "rows": table.num_rows, "stored": stored}
        _write_attributes(self.url, self.spec, finalised, read_attributes(self.url))

    def _small_value(self, name: str, geometry: CaseGeometry, extent: Shape3, modalities: tuple[str, ...]) -> Any:
        if name == "stored":
            return True
        if name == "present":
            return [m in modalities for m in self.spec.modalities]
        if name == "extent":
            return extent
        value = getattr(geometry, name)
        if not isinstance(value, dict):
            return value
        small = SMALL_ARRAYS[name]
        out = np.zeros((len(self.spec.modalities), *(n for _, n in small.axes[1:])))
        for modality, entry in value.items():
            out[self.spec.modalities.index(modality)] = entry
        return out

    def _check_fits(self, dataset: str, row: int, image: np.ndarray) -> None:
        channels, *extent = image.shape
        rows = self._array(dataset, "image").shape[0]
        if channels != len(self.spec.modalities) or any(e > g for e, g in zip(extent, self.spec.grid, strict=True)):
            raise StoreError(
                f"case of {channels} channels x {tuple(extent)} voxels does not fit {dataset}: "
                f"the spec allows {len(self.spec.modalities)} channels x {self.spec.grid}"
            )
        if not 0 <= row < rows:
            raise StoreError(f"row {row} of {dataset} was not planned: the array has {rows} rows; grow it first")

    def _array(self, dataset: str, name: str) -> Any:
        if self._pid != os.getpid():
            self._arrays, self._pid = {}, os.getpid()
        key = f"{dataset}/{name}"
        if key not in self._arrays:
            self._arrays[key] = open_array(self.url, key, "r+")
        return self._arrays[key]

    def _encoder(self, dataset: str, name: str) -> ShardEncoder:
        array = self._array(dataset, name)
        key = f"{dataset}/{name} encoder"
        if key not in self._arrays:
            self._arrays[key] = ShardEncoder(array)
        return self._arrays[key]

    def _shard_url(self, dataset: str, name: str, row: int) -> str:
        return storage.join(self.url, dataset, name, "c", str(row))


def create_or_open(url: str, spec: PreprocessSpec, more: Mapping[str, Any] | None = None) -> StoreWriter:
    """Return a writer for a store of this spec, creating the store when nothing is there; raises as `check_place`.

    more: further attributes of a new store, which it keeps.
    """
    if not check_place(url, spec):
        _write_attributes(url, spec, None, more)  # the whole group document in one write: there is no half-made store
    return StoreWriter(url, spec)


def check_place(url: str, spec: PreprocessSpec) -> bool:
    """Return whether a store of this spec is there already; writes nothing.

    Raises StoreError when the store has another spec (naming what differs), another schema, or is no store of ours, and
    for a file or a folder with other things in it.
    """
    if storage.exists(storage.join(url, "zarr.json")):
        check_spec(url, spec)
        return True
    if storage.is_local(url) and storage.local_path(url).is_file():
        raise StoreError(f"{url} is a file and no store; choose another place")
    if left := [name for name in storage.listdir(url) if not name.startswith(".")]:
        raise StoreError(f"{url} is not empty and is no store: it holds {left[:5]}; choose another place")
    return False


def open_writer(url: str) -> StoreWriter:
    """Return a writer for an existing store; raises StoreError when there is none."""
    return StoreWriter(url, PreprocessSpec.model_validate(read_attributes(url)["spec"]))


def check_spec(url: str, spec: PreprocessSpec) -> PreprocessSpec:
    """Return the store's spec; raises StoreError listing each field in which `spec` differs."""
    stored = PreprocessSpec.model_validate(read_attributes(url)["spec"])
    if stored.content_digest() != spec.content_digest():
        old, new = stored.model_dump(mode="json"), spec.model_dump(mode="json")
        changes = ", ".join(f"{key}: store {old[key]!r}, asked {new[key]!r}" for key in old if old[key] != new[key])
        raise StoreError(f"{url} was built with another preprocessing spec ({changes}); use that spec or a new store")
    return stored


def read_attributes(url: str) -> dict[str, Any]:
    """Return our attributes of the root group; raises StoreError for anything that is not a store of this schema."""
    found = read_attributes_of_any(url)
    refuse_schema(url, found.get("schema"))
    return found


def read_attributes_of_any(url: str) -> dict[str, Any]:
    """Return our attributes of the root group of any schema; raises StoreError for what is no store of ours."""
    try:
        metadata = storage.read_json(storage.join(url, "zarr.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{url} is not a store: it has no zarr.json; run `brainloom preprocess` to make one") from None
    except ValueError as error:
        raise StoreError(f"{url} is not a store: {error}") from error
    found = metadata.get("attributes", {}).get(ATTRIBUTE) if isinstance(metadata, dict) else None
    if not isinstance(found, dict) or "spec" not in found:
        raise StoreError(f"{url} is a Zarr group, but not a store of ours: attribute {ATTRIBUTE!r} is missing")
    return found


def _write_attributes(
    url: str, spec: PreprocessSpec, finalised: dict[str, Any] | None, more: Mapping[str, Any] | None = None
) -> None:
    body = spec.identity()
    ours = {"schema": SCHEMA, "spec": body, "spec_digest": digest_of(body), "finalised": finalised}
    write_attributes(url, {**(more or {}), **ours})


def write_attributes(url: str, attributes: dict[str, Any]) -> None:
    """Replace our attributes of the root group, and the metadata of all arrays in it when the store is finalised."""
    # One atomic replacement of the whole object; zarr's own update would read, change and write, and its own
    # consolidation would stumble over what lies beside the arrays.
    metadata: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: attributes}}
    if attributes["finalised"] is not None:
        inline = {"kind": "inline", "must_understand": False, "metadata": _published_metadata(url)}
        metadata["consolidated_metadata"] = inline
    storage.write_json(storage.join(url, "zarr.json"), metadata)


def _published_metadata(url: str) -> dict[str, Any]:
    """Return all metadata documents by path: with them xarray opens the store in one read, at its published length."""
    found = {}
    for dataset in dataset_names(url):
        paths = [dataset, *(f"{dataset}/{name}" for name in storage.listdir(storage.join(url, dataset)))]
        for path in paths:
            document = storage.join(url, path, "zarr.json")
            if storage.exists(document):
                found[path] = storage.read_json(document)
    return found
