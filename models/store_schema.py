"""The number of a store's layout: what this version reads, and the steps that bring an older store to it.

A step changes a store of schema N in place so that it is one of schema N + 1. It may be done again after a kill, for
the number is written last; until then every reader refuses the store. Steps read documents and arrays by their paths
and never through today's readers: those change with the layout, a step does not. Voxels and digests stay.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr

from infra import storage
from models.store_layout import CASES, SCHEMA, StoreError, dataset_names, has_array, rust_pipeline

Step = Callable[[str], None]


def refuse_schema(url: str, found: Any) -> None:
    """Raise StoreError unless a store has the schema that this version reads, saying what to do about it."""
    if found == SCHEMA and not isinstance(found, bool):
        return
    what = f"{url} has store schema {found!r}; this version reads schema {SCHEMA}"
    if not isinstance(found, int) or isinstance(found, bool):
        raise StoreError(f"{what}, and a schema is a whole number: restore zarr.json from a backup")
    if found > SCHEMA:
        raise StoreError(f"{what}: a newer brainloom wrote it; install that version, or preprocess into a new store")
    if missing := [number for number in range(found, SCHEMA) if number not in STEPS]:
        raise StoreError(f"{what} and knows no way from schema {missing[0]} to {missing[0] + 1}; preprocess again")
    raise StoreError(f"{what}: run `brainloom store upgrade {url}`, which changes no voxel and no digest")


def add_stored(url: str) -> None:
    """Schema 0 to 1: give each dataset the array `stored` (case) bool, which says which rows count, by cases.parquet.

    A store that was never finalised gets arrays of False, as the writer makes them.
    """
    table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(url, CASES)))) if _published(url) else None
    lines = table.select(["dataset", "row", "status"]).to_pylist() if table is not None else []
    for dataset in dataset_names(url):
        rows = [line["row"] for line in lines if (line["dataset"], line["status"]) == (dataset, "stored")]
        store = storage.zarr_store(url, "r+")
        with rust_pipeline(), storage.explained("write", storage.join(url, dataset)):
            length = int(zarr.open_array(store, path=f"{dataset}/image", mode="r", zarr_format=3).shape[0])
            if has_array(url, dataset, "stored"):
                array = zarr.open_array(store, path=f"{dataset}/stored", mode="r+", zarr_format=3)
            else:
                array = zarr.create_array(
                    store,
                    name=f"{dataset}/stored",
                    shape=(length,),
                    chunks=(1024,),
                    dtype="bool",
                    fill_value=False,
                    dimension_names=("case",),
                    zarr_format=3,
                )
            array[:] = np.isin(np.arange(length), rows)


STEPS: dict[int, Step] = {0: add_stored}
"""Schema that a step starts from -> the step to the next one."""


def _published(url: str) -> bool:
    return storage.exists(storage.join(url, CASES))
