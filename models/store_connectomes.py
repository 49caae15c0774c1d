"""Connectomes in a store: one object per case, written by the worker that has the case's row.

    <dataset>/connectome            (case, roi_from, roi_to) float32; attributes: atlas, kind, fisher_z
    <dataset>/roi_from, roi_to      names of the regions, in the order of the spec

A matrix is symmetric with a diagonal of 0; the rows and columns of missing regions are NaN, and so is everything of a
case without a connectome, of which nothing is stored. The chunks are plain float32: correlations hardly compress.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import zarr

from infra import storage
from models.anatomy import Floats
from models.connectomes import ConnectomeSpec
from models.store_layout import StoreError, has_array, name_axis

CONNECTOME = "connectome"
AXES = ("roi_from", "roi_to")
FRAMES = "connectome_frames"
"""Key of a receipt's `qc`: how many frames its connectome was made of. Without one the key is absent."""


def has_connectome(line: dict[str, Any]) -> bool:
    """Say whether a line of cases.parquet stands for a case with a connectome."""
    return FRAMES in json.loads(line.get("qc") or "{}")


def make_room(store: Any, url: str, dataset: str, spec: ConnectomeSpec, rows: int) -> None:
    """Create the array of a dataset, or lengthen it to `rows`; coordinates first, so that a kill leaves them whole."""
    for axis in AXES:
        name_axis(store, url, dataset, axis, spec.regions)
    if has_array(url, dataset, CONNECTOME):
        array = zarr.open_array(store, path=f"{dataset}/{CONNECTOME}", mode="r+", zarr_format=3)
        if array.shape[0] < rows:
            array.resize((rows, *array.shape[1:]))
        return
    count = len(spec.regions)
    zarr.create_array(
        store,
        name=f"{dataset}/{CONNECTOME}",
        shape=(rows, count, count),
        chunks=(1, count, count),
        dtype="float32",
        compressors=None,
        fill_value=np.nan,
        dimension_names=("case", *AXES),
        attributes={"atlas": spec.atlas, "kind": spec.kind, "fisher_z": spec.fisher_z},
        zarr_format=3,
    )


def connectome_url(url: str, dataset: str, row: int) -> str:
    """Return where the matrix of a row lies."""
    return storage.join(url, dataset, CONNECTOME, "c", str(row), "0", "0")


def write_connectome(url: str, dataset: str, row: int, matrix_RR: Floats | None, spec: ConnectomeSpec) -> None:
    """Replace the matrix of a row by another one, or by nothing, as one whole object.

    Raises StoreError for a matrix of another number of regions.
    """
    target = connectome_url(url, dataset, row)
    if matrix_RR is None:
        storage.delete(target)
        return
    count = len(spec.regions)
    if matrix_RR.shape != (count, count):
        raise StoreError(f"connectome of shape {matrix_RR.shape}: atlas {spec.atlas!r} has {count} regions")
    storage.write_bytes(target, plain_bytes(matrix_RR))


def read_connectome(url: str, dataset: str, row: int, spec: ConnectomeSpec) -> Floats | None:
    """Return the matrix (R, R) of a row, None when there is none; raises StoreError for a damaged one."""
    target = connectome_url(url, dataset, row)
    try:
        raw = storage.read_bytes(target)
    except FileNotFoundError:
        return None
    count = len(spec.regions)
    if len(raw) != 4 * count * count:
        raise StoreError(
            f"{target} is damaged: it has {len(raw)} bytes, a matrix of {count} regions has {4 * count * count}; run "
            "preprocess with repair: true"
        )
    return np.frombuffer(raw, "<f4").reshape(count, count).astype(np.float32)


def erase_connectome(url: str, dataset: str, row: int) -> None:
    """Delete the matrix of a row."""
    storage.delete(storage.join(url, dataset, CONNECTOME, "c", str(row)))


def digest_bytes(matrix_RR: Floats | None, spec: ConnectomeSpec | None) -> bytes:
    """Return what a connectome adds to a case digest: nothing when there is none."""
    if matrix_RR is None or spec is None:
        return b""
    return f"connectome {spec.atlas} {spec.kind} {spec.fisher_z} ".encode() + plain_bytes(matrix_RR)


def plain_bytes(matrix_RR: Floats) -> bytes:
    """Return a matrix as it is stored; one NaN stands for all of them, and no zero is negative."""
    plain = np.where(np.isnan(matrix_RR), np.float32(np.nan), matrix_RR + np.float32(0))
    return np.ascontiguousarray(plain, dtype="<f4").tobytes()
