"""Compacting a store: erase the voxels of retired rows.

Rows keep their numbers, so selections of trainings stay valid: a training on current rows does not notice, one that
names a retired row is refused by name before and after alike. The table is published first, then shards and receipts
are erased: killed in between, the store is sound and the next compact erases what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra import storage
from models.store_layout import SHARD_ARRAYS
from models.store_writer import open_writer
from tasks import plan as plans
from tasks import receipts, shards
from tasks.lease import Lease
from tasks.shards import Row


@dataclass(frozen=True)
class Compacted:
    """What a compact erased."""

    rows: int
    """Retired rows that were dropped now."""
    freed_bytes: int
    digest: str
    """Of the store: the same before and after."""


def compact(url: str) -> Compacted:
    """Drop the retired rows of a finalised store. Raises LeaseError when a flow writes it."""
    writer = open_writer(url)
    with Lease(url, "compact") as lease:
        lines = shards.published(url, ("dataset", "row", "case", "status"))
        retired = {row: line["case"] for row, line in lines.items() if line["status"] == "retired"}
        lease.check()
        digest = shards.rewrite(
            url, {row: shards.bare_line(*row, "dropped", case=case) for row, case in retired.items()}
        )
        freed = 0
        for dataset, row in _erasable(url, {row: line["status"] for row, line in lines.items()}):
            freed += _size(url, dataset, row)
            writer.erase_case(dataset, row)
            storage.delete(receipts.receipt_url(url, dataset, row))
        for dataset in {dataset for dataset, _ in retired}:
            writer.clear_rows(dataset, [row for of, row in retired if of == dataset])
    return Compacted(len(retired), freed, digest)


def _erasable(url: str, statuses: dict[Row, str]) -> list[Row]:
    """Return retired and dropped rows, and superseded ones that were never published, which still have a shard."""
    newest = {(case.dataset, case.case): case.row for case in plans.read_plans(url)}
    gone = {row for row, status in statuses.items() if status in ("retired", "dropped", "forgotten")}
    for case in plans.read_plans(url):
        row = (case.dataset, case.row)
        if row not in statuses and newest[case.dataset, case.case] != case.row:
            gone.add(row)
    there = {
        (dataset, int(name))
        for dataset in {dataset for dataset, _ in gone}
        for array in SHARD_ARRAYS
        for name in storage.listdir(storage.join(url, dataset, array, "c"))
        if name.isdigit()
    }
    return sorted(gone & (there | receipts.receipt_rows(url, {dataset for dataset, _ in gone})))


def _size(url: str, dataset: str, row: int) -> int:
    """Return the bytes of a row's shards."""
    total = 0
    for array in SHARD_ARRAYS:
        fs, path = storage.filesystem(storage.join(url, dataset, array, "c", str(row)))
        if fs.exists(path):
            total += int(fs.du(path))
    return total
