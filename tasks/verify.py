"""Is a store what its tables say? Every problem as one sentence with the case, the rule and the values.

Fast: metadata, tables, receipts and the presence of shards. Deep: every voxel is decoded, by zarr and not by our own
reader, and every case digest is computed again; a flipped bit anywhere in a shard is found that way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from infra import storage
from models.records import Receipt
from models.store import Store, StoredCase, StoredDataset, case_digest, has_label_shard, open_store, store_digest
from models.store_connectomes import CONNECTOME, has_connectome
from models.store_descriptors import Descriptors, descriptor_count, digest_bytes, raw_descriptors
from models.store_layout import SMALL_ARRAYS, has_array, open_array, shard_shape
from models.store_writer import read_attributes
from tasks import plan as plans
from tasks import receipts
from tasks.forget import unfinished
from tasks.shards import GONE, Row

Line = dict[str, Any]

SHARDS: dict[str, tuple[int, Callable[[Line], bool]]] = {
    "image": (4, lambda line: bool(line["modalities"])),
    "label": (3, has_label_shard),
    CONNECTOME: (2, has_connectome),
}
"""By array: the axes after `case`, and whether a stored line has an object there."""


class Problem(NamedTuple):
    """What is wrong, and in which stored row, if it is one."""

    text: str
    stored_row: Row | None = None


def verify(url: str, deep: bool = False) -> list[str]:
    """Return what is wrong with a store, one sentence each; empty means sound. Raises StoreError for no store."""
    return [problem.text for problem in _problems(url, deep)]


def damaged_rows(url: str) -> set[Row]:
    """Return the stored rows in which a deep `verify` finds anything wrong; reads every voxel of the store."""
    return {problem.stored_row for problem in _problems(url, deep=True) if problem.stored_row is not None}


def _problems(url: str, deep: bool) -> Iterator[Problem]:
    store = open_store(url)
    finalised = read_attributes(url)["finalised"]
    if finalised["digest"] != (now := store_digest(url)):
        yield Problem(f"store digest: it is {now}, but {finalised['digest']} was finalised; run preprocess again")
    for name in unfinished(url):
        yield Problem(f"{name}: forgetting was interrupted; run `store forget` again")
    lines: list[Line] = store.cases().drop_columns(["fingerprint"]).to_pylist()
    for name in sorted({line["dataset"] for line in lines} - set(store.datasets)):
        yield Problem(f"{name}: the dataset is gone from the store")
    yield from _planned(url, {(line["dataset"], line["row"]) for line in lines})
    for name in store.datasets:
        yield from _of_dataset(store, name, [line for line in lines if line["dataset"] == name], deep)


def _planned(url: str, lines: Collection[Row]) -> Iterator[Problem]:
    """Rows that were planned and never published, unless the case has a newer row or its subject was forgotten."""
    newest = {plans.key_of(case): case for case in sorted(plans.read_plans(url), key=lambda case: case.row)}
    gone = receipts.forgotten_rows(url)
    for case in newest.values():
        if (case.dataset, case.row) not in lines and (case.dataset, case.row) not in gone:
            where = f"{case.dataset}/{case.case} (row {case.row})"
            yield Problem(f"{where}: it was planned and is neither stored nor in quarantine; preprocess again")


def _of_dataset(store: Store, name: str, lines: Sequence[Line], deep: bool) -> Iterator[Problem]:
    yield from map(Problem, _structure(store, name, lines))
    stored = [line for line in lines if line["status"] == "stored"]
    for case, count in Counter(line["case"] for line in stored).items():
        if count > 1:
            yield Problem(f"{name}/{case}: one row: it is stored in {count} rows")
    yield from _receipts(store.url, name, lines)
    yield from _shards(store.url, name, lines)
    data = store.dataset(name)
    yield from _names_and_flags(data, lines)
    small, problems = _small_arrays(data)
    yield from map(Problem, problems)
    table, problems = _descriptors(store.url, name)
    yield from map(Problem, problems)
    for line in stored:
        for problem in _guarded(lambda line=line: _of_case(store, data, line, small, table, deep)):  # type: ignore[misc]
            yield _in_row(line, problem)


def _in_row(line: Line, what: str) -> Problem:
    text = f"{line['dataset']}/{line['case'] or '-'} (row {line['row']}): {what}"
    return Problem(text, (line["dataset"], line["row"]) if line["status"] == "stored" else None)


def _guarded(check: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Yield what a check finds; whatever a damaged file makes it raise is a finding too, and the last one."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - decoders raise what they like
        yield f"cannot be decoded: {error}"


def _structure(store: Store, name: str, lines: Sequence[Line]) -> Iterator[str]:
    """Arrays that are absent, too short or of another layout than the spec asks for."""
    rows = max((line["row"] + 1 for line in lines), default=0)
    grid, count = store.spec.grid, len(store.spec.modalities)
    voxels = {"image": (count, *grid)} | ({"label": grid} if any(line["has_label"] for line in lines) else {})
    small = {key: tuple(n or count for _, n in kind.axes) for key, kind in SMALL_ARRAYS.items()}
    spec = store.spec.connectome
    matrix = {CONNECTOME: (len(spec.regions),) * 2} if spec is not None else {}
    for key, shape in {**voxels, **matrix, **small, "case": ()}.items():
        if not has_array(store.url, name, key):
            yield f"{name}: structure: the array {key} is missing"
            continue
        array = open_array(store.url, f"{name}/{key}")
        if array.shape[1:] != shape or array.shape[0] < rows:
            yield f"{name}: structure: {key} has shape {array.shape}, spec and cases.parquet ask for {(rows, *shape)}"
        shard = (1, *shape[: len(shape) - 3], *shard_shape(store.spec))
        if key in voxels and array.shards != shard:
            yield f"{name}: structure: {key} has shards of {array.shards}, one per case is {shard}"


def _small_arrays(data: StoredDataset) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the per-case arrays by name, and why others cannot be read; absent ones `_structure` has told."""
    found, problems = {}, []
    for key in SMALL_ARRAYS:
        if not has_array(data.url, data.name, key):
            continue
        try:
            found[key] = data.small(key)
        except Exception as error:  # noqa: BLE001 - decoders raise what they like
            problems.append(f"{data.name}: structure: {key} cannot be read: {error}")
    return found, problems


def _descriptors(url: str, name: str) -> tuple[Descriptors | None, list[str]]:
    """Return the descriptors as they are, to be checked row by row, and why they cannot be read."""
    try:
        return raw_descriptors(url, name), []
    except Exception as error:  # noqa: BLE001 - decoders raise what they like
        what = f"{name}: structure: descriptors cannot be read: {error}"
        return None, [f"{what}; delete the folder {name}/descriptors/c and run preprocess with repair: true"]


def _receipts(url: str, name: str, lines: Sequence[Line]) -> Iterator[Problem]:
    """Rows whose receipt is absent, unreadable, or says something else than cases.parquet; receipts of erased rows."""
    there = receipts.receipt_rows(url, [name])
    for line in lines:
        if line["status"] in GONE and (name, line["row"]) in there:
            still = f"it is still there although the row is {line['status']}"
            yield _in_row(line, f"receipt: {still}; run `brainloom store compact`")
    told = [line for line in lines if line["status"] in ("stored", "quarantined", "retired")]
    with ThreadPoolExecutor(receipts.READERS) as pool:
        found = pool.map(lambda line: _receipt_of(url, line), told)
        for line, receipt in zip(told, found, strict=True):
            if isinstance(receipt, str):
                yield _in_row(line, f"receipt: {receipt}")
                continue
            status = receipt.status if line["status"] != "retired" else "retired"
            said = (receipt.case, status, receipt.digest, list(receipt.extent), receipt.has_label)
            held = (line["case"], line["status"], line["digest"], line["extent"], line["has_label"])
            if said != held:
                yield _in_row(line, f"receipt: it says {said}, cases.parquet says {held}")


def _receipt_of(url: str, line: Line) -> Receipt | str:
    try:
        raw = storage.read_bytes(receipts.receipt_url(url, line["dataset"], line["row"]))
        return Receipt.model_validate_json(raw)
    except FileNotFoundError:
        return "it is missing"
    except ValueError as error:
        return f"it cannot be read: {str(error).splitlines()[0]}"


def _shards(url: str, name: str, lines: Sequence[Line]) -> Iterator[Problem]:
    """Shards that are missing, and shards of rows that were erased."""
    for key, (zeros, is_due) in SHARDS.items():
        objects = storage.find_or_empty(storage.join(url, name, key, "c"))  # an empty folder is no shard
        rows = {path.partition("/")[0] for path in objects}
        places = "/".join("0" * zeros)
        for line in lines:
            there = f"{line['row']}/{places}" in objects
            if line["status"] == "stored" and not there and is_due(line):
                yield _in_row(line, f"the shard of {key} is missing; run preprocess with repair: true")
            if line["status"] in GONE and str(line["row"]) in rows:
                yield _in_row(line, f"the shard of {key} is still there although the row is {line['status']}")


def _names_and_flags(data: StoredDataset, lines: Sequence[Line]) -> Iterator[Problem]:
    """What readers without our code see: the coordinate `case`, and which rows count."""
    if not all(has_array(data.url, data.name, key) for key in ("case", "stored")):
        return
    names, flags = (open_array(data.url, f"{data.name}/{key}")[:] for key in ("case", "stored"))
    for line in lines:
        row, stored = line["row"], line["status"] == "stored"
        if row < len(names) and line["status"] not in GONE and str(names[row]) != line["case"]:
            yield _in_row(line, f"case: the coordinate says {str(names[row])!r}")
        if row < len(flags) and bool(flags[row]) != stored:
            yield _in_row(line, f"stored: the array says {bool(flags[row])}, cases.parquet says {line['status']}")


def _of_case(
    store: Store,
    data: StoredDataset,
    line: Line,
    small: Mapping[str, np.ndarray],
    table: Descriptors | None,
    deep: bool,
) -> Iterator[str]:
    row, modalities, extent = line["row"], list(line["modalities"]), tuple(line["extent"])
    if "present" in small:
        told = [m for m, there in zip(store.spec.modalities, small["present"][row], strict=True) if there]
        if told != modalities or not (modalities or has_connectome(line)):
            yield f"present: the array says {told}, cases.parquet says {modalities}"
    if "extent" in small:
        held, grid = tuple(small["extent"][row].tolist()), store.spec.grid
        least = 1 if modalities else 0
        if held != extent or not all(least <= n <= g for n, g in zip(extent, grid, strict=True)):
            yield f"extent: the array says {held}, cases.parquet says {list(extent)}, the grid is {grid}"
    case = data.case_info(row)
    if not np.isfinite(case.affine).all() or abs(np.linalg.det(case.affine)) < 1e-9:
        yield f"affine: it cannot be inverted: {case.affine.tolist()}"
    descriptors = None if table is None else table.values[row]
    there = 0 if descriptors is None else int(np.count_nonzero(~np.isnan(descriptors)))
    if there != (count := descriptor_count(line)):
        yield f"descriptors: the array holds {there} values, cases.parquet says {count}"
    if deep:
        beside = b"" if table is None else digest_bytes(descriptors, table.atlas, table.basis)
        yield from _voxels(data, case, beside + data.connectome_bytes(row))


def _voxels(data: StoredDataset, case: StoredCase, beside: bytes) -> Iterator[str]:
    image = np.asarray(data.image[case.row])
    label = np.asarray(data.label[case.row]) if case.has_label and data.label is not None else None
    x, y, z = case.extent
    inside = image[:, :x, :y, :z]
    cut = None if label is None else label[:x, :y, :z]
    found = case_digest(inside, cut, np.array(case.present), case.affine, case.origin, beside)
    if found != case.digest:
        yield f"digest of the voxels is {found}, receipt says {case.digest}"
    outside = np.count_nonzero(image) - np.count_nonzero(inside[list(np.flatnonzero(case.present))])
    if label is not None and cut is not None:
        outside += np.count_nonzero(label) - np.count_nonzero(cut)
    if outside:
        yield f"voxels: {outside} are not zero outside the extent {case.extent} or in absent modalities"
