"""Forgetting a subject: erase what the store keeps of it, and leave a tombstone so that no ingest brings it back.

Order: tombstone, published table, small arrays, shards, receipts, attempts, duplicates, plans, quality report, what is
elsewhere, tombstone done. A killed forget leaves a tombstone that is not done: the subject is neither read nor folded
nor preprocessed any more, and running it again completes it. Rows keep their numbers; their lines say `forgotten` and
nothing else.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from infra import storage
from models.records import PlannedCase, Record, Scan
from models.store_layout import BUILD, StoreError
from models.store_writer import open_writer
from tasks import duplicates, receipts, shards
from tasks import plan as plans
from tasks.forget_reach import Person, subject_sha256
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
    cases: tuple[str, ...] = ()
    """Names of its cases, by which other places are searched; none once it is done."""
    digests: tuple[str, ...] = ()
    """Of its cases, likewise."""


@dataclass(frozen=True)
class Forgotten:
    """What a forget erased."""

    rows: tuple[int, ...]
    digest: str
    """Of the store afterwards; empty when it was never finalised."""
    linked: tuple[tuple[str, str], ...]
    """(dataset, subject) that look like the same person and are still there."""
    person: Person
    """With the names and digests of its cases; without when it was forgotten before."""


def forget(
    url: str, dataset: str, subject: str, elsewhere: Callable[[Forgotten], None] = lambda done: None
) -> Forgotten:
    """Erase a subject from a store; may be called again. Raises StoreError when it is unknown, LeaseError when held.

    `elsewhere` is called when the store is clean and before the tombstone is done, so that a kill while other places
    are searched is noticed as well, and the next forget knows what to search them for. What it raises is raised.
    """
    writer = open_writer(url)
    with Lease(url, f"forget a subject of {dataset}") as lease:
        rows = sorted(rows_of(url, dataset, subject))
        if not rows:
            raise StoreError(
                f"{url} holds no subject {subject!r} of dataset {dataset!r}; name it as DATASET/SUBJECT, as in "
                "cases.parquet. To keep a subject out that was never ingested, remove it from the source"
            )
        linked = duplicates.linked_to(url, dataset, subject)
        person = find_person(url, dataset, subject)
        stone = Tombstone(
            dataset=dataset,
            subject_sha256=subject_sha256(dataset, subject),
            rows=tuple(rows),
            when=_now(),
            cases=person.cases,
            digests=person.digests,
        )
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
        done = Forgotten(tuple(rows), digest, tuple(linked), person)
        elsewhere(done)
        _write(url, stone.replace(done=True, cases=(), digests=()))
    return done


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
    storage.delete(_url(url, dataset, subject_sha256(dataset, subject)))


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
    refused = {pair for pair in pairs if subject_sha256(*pair) in hashes}
    return [scan for scan in scans if (scan.dataset, scan.subject) not in refused], sorted(refused)


def find_person(url: str, dataset: str, subject: str) -> Person:
    """Return a subject with the names and digests of its cases, as far as store and tombstone still tell them."""
    known, rows = _read(url, dataset, subject), rows_of(url, dataset, subject)
    cases = dict.fromkeys([*(known.cases if known else ()), *_cases_of(url, dataset, rows)])
    lines = shards.published(url, ("dataset", "row", "digest"))
    mine = [line["digest"] for (of, row), line in lines.items() if of == dataset and row in rows]
    digests = dict.fromkeys([*(known.digests if known else ()), *filter(None, mine)])
    return Person(dataset, subject, tuple(cases), tuple(digests))


def rows_of(url: str, dataset: str, subject: str) -> set[int]:
    """Return the rows of a subject: by its tombstone, by cases.parquet, which follows corrections, and by the plans."""
    known = _read(url, dataset, subject)
    lines = shards.published(url, ("dataset", "row", "subject"))
    owners: dict[Row, str] = {(case.dataset, case.row): case.subject for case in plans.read_plans(url)}
    owners |= {row: line["subject"] for row, line in lines.items()}
    mine = {row for (of, row), owner in owners.items() if (of, owner) == (dataset, subject)}
    return mine | set(known.rows if known else ())


def _cases_of(url: str, dataset: str, rows: Collection[int]) -> tuple[str, ...]:
    """Return the names of the cases of some rows, as far as the plans still tell them."""
    mine = [case.case for case in plans.read_plans(url) if case.dataset == dataset and case.row in rows]
    return tuple(name for name in dict.fromkeys(mine) if name)


def _redact_plans(url: str, dataset: str, rows: Sequence[int]) -> None:
    gone = {(dataset, row) for row in rows}
    for number in plans.plan_numbers(url):
        plans.rewrite_plan(url, number, lambda case: _redacted(case) if (case.dataset, case.row) in gone else case)


def _redacted(case: PlannedCase) -> PlannedCase:
    return PlannedCase(dataset=case.dataset, row=case.row, case="", subject="", files=())


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _url(url: str, dataset: str, subject_sha256: str) -> str:
    return storage.join(url, BUILD, "forgotten", f"{dataset}~{subject_sha256[:32]}.json")


def _read(url: str, dataset: str, subject: str) -> Tombstone | None:
    target = _url(url, dataset, subject_sha256(dataset, subject))
    return _parse(target) if storage.exists(target) else None


def _parse(target: str) -> Tombstone:
    try:
        return Tombstone.model_validate_json(storage.read_bytes(target))
    except ValidationError as error:
        raise StoreError(f"{target} is no tombstone: {error}; restore it, or forget the subject again") from error


def _write(url: str, stone: Tombstone) -> None:
    storage.write_bytes(_url(url, stone.dataset, stone.subject_sha256), stone.model_dump_json().encode())
