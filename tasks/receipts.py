"""Receipts say that a case is safely in the store, or why it is not; attempts say that a worker began one.

Both are whole small objects, created by one writer each, so they need no lock on disk or on S3.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from infra import storage
from models.records import PlannedCase, Receipt
from models.store_layout import BUILD
from tasks.hidden_paths import told

MAX_ATTEMPTS = 2
"""Under one lease: a case that was begun twice and has no receipt killed its worker twice."""
MAX_INTERRUPTED = 8
"""Over all leases: attempts that ended with the death of the whole flow say little about the case."""
READERS = 16
"""Receipts that are read at once: on S3 each costs a round trip."""


def receipt_url(url: str, dataset: str, row: int) -> str:
    """Return where the receipt of a row lies."""
    return storage.join(url, BUILD, "receipts", dataset, f"{row:08d}.json")


def write_receipt(url: str, receipt: Receipt) -> None:
    """Write the receipt of a row; the case counts from here on."""
    storage.write_bytes(receipt_url(url, receipt.dataset, receipt.row), receipt.model_dump_json().encode())


def read_receipt(url: str, planned: PlannedCase, spec_digest: str) -> Receipt | None:
    """Return the receipt of a planned row if it was made from the same source files with the same spec."""
    try:
        receipt = Receipt.model_validate_json(storage.read_bytes(receipt_url(url, planned.dataset, planned.row)))
    except (FileNotFoundError, ValidationError):
        return None
    files, wanted = ([file.identity for file in case.files] for case in (receipt, planned))
    same = files == wanted and receipt.spec_digest == spec_digest and receipt.case == planned.case
    return receipt if same else None


def receipt_rows(url: str, datasets: Iterable[str]) -> set[tuple[str, int]]:
    """Return dataset and row of every receipt in a store, from listings alone."""
    found = set()
    for dataset in set(datasets):
        for name in storage.listdir(storage.join(url, BUILD, "receipts", dataset)):
            stem = name.removesuffix(".json")
            if name.endswith(".json") and stem.isdigit():
                found.add((dataset, int(stem)))
    return found


def useless_rows(url: str, planned: Iterable[PlannedCase], spec_digest: str) -> set[tuple[str, int]]:
    """Return those of some rows with receipts whose receipt does not count: `read_receipt` gives None for it."""
    cases = list(planned)
    with ThreadPoolExecutor(READERS, thread_name_prefix="receipts") as pool:
        found = pool.map(lambda case: read_receipt(url, case, spec_digest) is None, cases)
        return {(case.dataset, case.row) for case, useless in zip(cases, found, strict=True) if useless}


def delete_receipt(url: str, planned: PlannedCase) -> None:
    """Forget what happened to a row, so that it is tried again."""
    storage.delete(receipt_url(url, planned.dataset, planned.row))


def claim_attempt(url: str, token: str, planned: PlannedCase) -> bool:
    """Leave a marker before a case is begun; False when it was begun MAX_ATTEMPTS times under this lease."""
    for number in range(1, MAX_ATTEMPTS + 1):
        target = storage.join(url, BUILD, "attempts", token, f"{planned.dataset}~{planned.row}~{number}.json")
        nonce = json.dumps({"case": planned.case, "nonce": uuid.uuid4().hex}).encode()
        # A creation whose answer was lost is reported as refused; the nonce tells.
        # Markers tell of workers that died; a power cut ends the flow with them.
        if storage.create_exclusive(target, nonce, durable=False) or storage.read_bytes(target) == nonce:
            return True
    return False


def attempt_token(token: str, away: int) -> str:
    """Return what names the attempts under a lease's token after the storage was away so often.

    Attempts before do not count: a case is not at fault when its worker lived and could not write.
    """
    return f"{token}~{away}"


def begun(url: str, token: str) -> int:
    """Return how many attempts were claimed under a lease, whatever was away meanwhile."""
    folder = storage.join(url, BUILD, "attempts")
    mine = [name for name in storage.listdir(folder) if name.partition("~")[0] == token]
    return sum(len(storage.listdir(storage.join(folder, name))) for name in mine)


def interrupted(url: str) -> Counter[tuple[str, int]]:
    """Return under how many earlier leases, which published nothing after, each row was begun."""
    leases: dict[str, set[tuple[str, int]]] = defaultdict(set)
    folder = storage.join(url, BUILD, "attempts")
    for token in storage.listdir(folder):
        for name in storage.listdir(storage.join(folder, token)):
            dataset, _, rest = name.partition("~")
            leases[token.partition("~")[0]].add((dataset, int(rest.partition("~")[0])))
    return Counter(row for rows in leases.values() for row in rows)


def clear_attempts(url: str) -> None:
    """Delete all attempt markers; called when nothing is left to do."""
    storage.delete(storage.join(url, BUILD, "attempts"))


def clear_attempts_of(url: str, dataset: str, rows: Iterable[int]) -> None:
    """Delete the attempt markers of some rows: they name the case."""
    folder, wanted = storage.join(url, BUILD, "attempts"), set(rows)
    for token in storage.listdir(folder):
        for name in storage.listdir(storage.join(folder, token)):
            of, _, rest = name.partition("~")
            if of == dataset and int(rest.partition("~")[0]) in wanted:
                storage.delete(storage.join(folder, token, name))


def forgotten_rows(url: str) -> set[tuple[str, int]]:
    """Return the rows of all tombstones (tasks.forget): their receipts no longer count, also while erasure is on."""
    folder = storage.join(url, BUILD, "forgotten")
    stones = [storage.read_json(storage.join(folder, name)) for name in storage.listdir(folder)]
    return {(stone["dataset"], row) for stone in stones for row in stone["rows"]}


def empty_receipt(planned: PlannedCase, spec_digest: str, reason: str, detail: str) -> Receipt:
    """Return the receipt of a quarantined case."""
    return Receipt(
        **planned.written().model_dump(),
        spec_digest=spec_digest,
        status="quarantined",
        reason=reason,
        detail=told(detail, planned.files),
    )
