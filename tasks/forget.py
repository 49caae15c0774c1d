"""Forgetting a subject: erase what the store keeps of it, and leave a tombstone so that no ingest brings it back.

Order: tombstone, published table, small arrays, shards, receipts, attempts, duplicates, plans, quality report,
tombstone done. A killed forget leaves a tombstone that is not done: the subject is neither read nor folded nor
preprocessed any more, and running it again completes it. Rows keep their numbers; their lines say `forgotten` and
nothing else.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from infra import storage
from models.records import PlannedCase, Record, Scan
from models.store_layout import BUILD, StoreError
from models.store_writer import open_writer
from tasks import duplicates, receipts, shards
from tasks import plan as plans
from tasks.lease import Lease
from tasks.qc_report import remove_qc
from tasks.shards import Row


class Tombstone(Record):
    """What remains of a forgotten subject. The id is kept as a hash only."""

    dataset: str
    subject_sha256: str
    rows: tuple[int, ...]
    when: str
    """UTC, to the second."""
    done: bool = False


@dataclass(frozen=True)
class Forgotten:
    """What a forget erased."""

    rows: tuple[int, ...]
    digest: str
    """Of the store afterwards; empty when it was never finalised."""
    linked: tuple[tuple[str, str], ...]
    """(dataset, subject) that look like the same person and are still there."""
    cases: tuple[str, ...] = ()
    """Names of its cases; none when it was forgotten before."""


def forget(url: str, dataset: str, subject: str) -> Forgotten:
    """Erase a subject from a store; may be called again. Raises StoreError when it is unknown, LeaseError when held."""
    writer = open_writer(url)
    with Lease(url, f"forget a subject of {dataset}") as lease:
        known = _read(url, dataset, subject)
        rows = sorted({*_rows_of(url, dataset, subject), *(known.rows if known else ())})
        if not rows:
            raise StoreError(
                f"{url} holds no subject {subject!r} of dataset {dataset!r}; name it as DATASET/SUBJECT, as in "
                "cases.parquet. To keep a subject out that was never ingested, remove it from the source"
            )
        linked = duplicates.linked_to(url, dataset, subject)
        cases = _cases_of(url, dataset, rows)
        stone = Tombstone(dataset=dataset, subject_sha256=_hash(dataset, subject), rows=tuple(rows), when=_now())
        _write(url, stone)
        lease.check()
        digest = shards.rewrite(url, {(dataset, row): shards.bare_line(dataset, row, "forgotten") for row in rows})
        writer.clear_rows(dataset, rows)
        for row in rows:
            writer.erase_case(dataset, row)
            storage.delete(receipts.receipt_url(url, dataset, row))
        receipts.clear_attempts_of(url, dataset, rows)
        duplicates.remove_subject(url, dataset, subject)
        _redact_plans(url, dataset, rows)
        remove_qc(url)
        _write(url, stone.replace(done=True))
    return Forgotten(tuple(rows), digest, tuple(linked), cases)


def lift(url: str, dataset: str, subject: str) -> None:
    """Remove a finished tombstone: the next ingest may bring the subject back.

    Raises StoreError when there is none, and for what is no store.
    """
    open_writer(url)
    stone = _read(url, dataset, subject)
    if stone is None or not stone.done:
        state = "was never forgotten" if stone is None else "is only half forgotten; run `store forget` again first"
        raise StoreError(f"{url}: subject {subject!r} of {dataset!r} {state}")
    # The rows stay forgotten: their lines in cases.parquet and in the plans say so by themselves.
    storage.delete(_url(url, dataset, _hash(dataset, subject)))


def is_forgotten(url: str, dataset: str, subject: str) -> bool:
    """Say whether a subject has a tombstone."""
    return _read(url, dataset, subject) is not None


def tombstones(url: str) -> list[Tombstone]:
    """Return the tombstones of a store, sorted by file name."""
    folder = storage.join(url, BUILD, "forgotten")
    return [_parse(storage.join(folder, name)) for name in storage.listdir(folder) if name.endswith(".json")]


def unfinished(url: str) -> list[str]:
    """Return `dataset rows ...` of every subject whose erasure was interrupted."""
    return [f"{s.dataset} rows {', '.join(map(str, s.rows))}" for s in tombstones(url) if not s.done]


def without_forgotten(url: str, scans: Sequence[Scan]) -> tuple[list[Scan], list[tuple[str, str]]]:
    """Return the scans of subjects that may be ingested, and (dataset, subject) of those that were forgotten."""
    hashes = {stone.subject_sha256 for stone in tombstones(url)}
    if not hashes:
        return list(scans), []
    pairs = {(scan.dataset, scan.subject) for scan in scans}
    refused = {pair for pair in pairs if _hash(*pair) in hashes}
    return [scan for scan in scans if (scan.dataset, scan.subject) not in refused], sorted(refused)


def _rows_of(url: str, dataset: str, subject: str) -> set[int]:
    """Return the rows of a subject: by cases.parquet, which follows corrections, else by the plans."""
    lines = shards.published(url, ("dataset", "row", "subject"))
    owners: dict[Row, str] = {(case.dataset, case.row): case.subject for case in plans.read_plans(url)}
    owners |= {row: line["subject"] for row, line in lines.items()}
    return {row for (of, row), owner in owners.items() if (of, owner) == (dataset, subject)}


def _cases_of(url: str, dataset: str, rows: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the cases of some rows, as far as the plans still tell them."""
    mine = [case.case for case in plans.read_plans(url) if case.dataset == dataset and case.row in rows]
    return tuple(name for name in dict.fromkeys(mine) if name)


def _redact_plans(url: str, dataset: str, rows: Sequence[int]) -> None:
    gone = {(dataset, row) for row in rows}
    for number in plans.plan_numbers(url):
        plans.rewrite_plan(url, number, lambda case: _redacted(case) if (case.dataset, case.row) in gone else case)


def _redacted(case: PlannedCase) -> PlannedCase:
    return PlannedCase(dataset=case.dataset, row=case.row, case="", subject="", files=())


def _hash(dataset: str, subject: str) -> str:
    return hashlib.sha256(f"{dataset}/{subject}".encode()).hexdigest()


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _url(url: str, dataset: str, subject_sha256: str) -> str:
    return storage.join(url, BUILD, "forgotten", f"{dataset}~{subject_sha256[:32]}.json")


def _read(url: str, dataset: str, subject: str) -> Tombstone | None:
    target = _url(url, dataset, _hash(dataset, subject))
    return _parse(target) if storage.exists(target) else None


def _parse(target: str) -> Tombstone:
    try:
        return Tombstone.model_validate_json(storage.read_bytes(target))
    except ValidationError as error:
        raise StoreError(f"{target} is no tombstone: {error}; restore it, or forget the subject again") from error


def _write(url: str, stone: Tombstone) -> None:
    storage.write_bytes(_url(url, stone.dataset, stone.subject_sha256), stone.model_dump_json().encode())
