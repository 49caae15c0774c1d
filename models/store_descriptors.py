"""Regional descriptors in a store: one small array per dataset, its coordinates, and how they enter a case digest.

    <dataset>/descriptors   (case, measure, region) float32, NaN where absent; attributes: atlas, basis, units
    <dataset>/measure       names with units, see models.anatomy.MEASURES
    <dataset>/region        names of the atlas

Made at finalise, when the first case with descriptors is published; a dataset has one atlas and one basis.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import zarr

from infra import storage
from models.anatomy import ATLASES, MEASURES, Floats
from models.records import DESCRIPTORS, DescriptorTable, Receipt
from models.store_layout import (
    CASE_CHUNK,
    StoreError,
    has_array,
    name_axis,
    open_array,
    open_small,
    rust_pipeline,
)

COUNT = "descriptor_values"
"""Key of a receipt's `qc`: how many values a case has. Without any the key is absent."""
Layout = tuple[str, str]
"""Atlas and basis."""


class Descriptors(NamedTuple):
    """The descriptors of a dataset."""

    values: Floats
    """(rows, measure, region): by row of the store; NaN where absent, and in rows that are not stored."""
    measures: tuple[str, ...]
    regions: tuple[str, ...]
    atlas: str
    basis: str


def descriptor_count(line: dict[str, Any]) -> int:
    """Return how many descriptor values a line of cases.parquet stands for."""
    return int(json.loads(line.get("qc") or "{}").get(COUNT, 0))


def layout_of(url: str, dataset: str) -> Layout | None:
    """Return atlas and basis of a dataset's descriptors; None when it has none yet."""
    found = _open(url, dataset)
    return None if found is None else found[1]


def _open(url: str, dataset: str) -> tuple[Any, Layout] | None:
    if not has_array(url, dataset, DESCRIPTORS):
        return None
    array = open_array(url, f"{dataset}/{DESCRIPTORS}")
    return array, (str(array.attrs["atlas"]), str(array.attrs["basis"]))


def digest_bytes(values: Floats | None, atlas: str, basis: str) -> bytes:
    """Return what descriptors (measure, region) add to a case digest: nothing when there are none."""
    if values is None or np.isnan(values).all():
        return b""
    # One NaN for all of them: their bits may differ.
    plain = np.where(np.isnan(values), np.float32(np.nan), values).astype("<f4")
    return f"descriptors {atlas} {basis} ".encode() + np.ascontiguousarray(plain).tobytes()


def table_bytes(table: DescriptorTable | None) -> bytes:
    """Return `digest_bytes` of the descriptors of one case."""
    return b"" if table is None else digest_bytes(table.array(), table.atlas, table.basis)


def raw_descriptors(url: str, dataset: str) -> Descriptors | None:
    """Return the descriptors of a dataset as its array has them, or None when it has none."""
    found = _open(url, dataset)
    if found is None:
        return None
    array, (atlas, basis) = found
    return Descriptors(np.asarray(array[:], np.float32), MEASURES, ATLASES[atlas], atlas, basis)  # type: ignore[index]


def read_descriptors(url: str, dataset: str, counts: Mapping[int, int]) -> Descriptors | None:
    """Return the descriptors of a dataset, or None when it has none.

    counts: values by stored row, as the table of cases says. Raises StoreError when those of a row are lost.
    """
    found = raw_descriptors(url, dataset)
    for row, count in counts.items():
        there = 0 if found is None or row >= len(found.values) else np.count_nonzero(~np.isnan(found.values[row]))
        if there != count:
            raise StoreError(
                f"the descriptors of {dataset} in {url} hold {there} values in row {row}, the table of cases says "
                f"{count}; run preprocess with repair: true"
            )
    return found


def write_descriptors(url: str, dataset: str, receipts: Sequence[Receipt], rows: int) -> None:
    """Write the descriptors of stored receipts of one dataset; makes or lengthens its array to `rows`.

    The receipts agree in atlas and basis with each other and with the array (tasks.shards sees to that).
    """
    table = next((receipt.descriptors for receipt in receipts if receipt.descriptors is not None), None)
    if not has_array(url, dataset, DESCRIPTORS):
        if table is None:
            return
        _create(url, dataset, table, rows)
    array = open_small(url, f"{dataset}/{DESCRIPTORS}")
    values = np.asarray(array[:], dtype=np.float32)
    for receipt in receipts:
        values[receipt.row] = np.nan if receipt.descriptors is None else receipt.descriptors.array()
    array[:] = values


def clear_descriptors(url: str, dataset: str, rows: Collection[int]) -> None:
    """Take away the descriptors of some rows."""
    if has_array(url, dataset, DESCRIPTORS):
        array = open_small(url, f"{dataset}/{DESCRIPTORS}")
        values = np.asarray(array[:], dtype=np.float32)
        values[[row for row in rows if row < len(values)]] = np.nan
        array[:] = values


def _create(url: str, dataset: str, table: DescriptorTable, rows: int) -> None:
    """Make the coordinates first: a kill before the array itself leaves nothing that counts."""
    store = storage.zarr_store(url, "r+")
    regions = ATLASES[table.atlas]
    with rust_pipeline():
        name_axis(store, url, dataset, "measure", MEASURES)
        name_axis(store, url, dataset, "region", regions)
        zarr.create_array(
            store,
            name=f"{dataset}/{DESCRIPTORS}",
            shape=(rows, len(MEASURES), len(regions)),
            chunks=(CASE_CHUNK, len(MEASURES), len(regions)),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=("case", "measure", "region"),
            attributes={"atlas": table.atlas, "basis": table.basis, "units": [_unit(name) for name in MEASURES]},
            zarr_format=3,
        )


def _unit(measure: str) -> str:
    return measure.rsplit("_", 1)[-1]
