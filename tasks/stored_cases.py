"""Finding cases of a store by name, and saying why one cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models.store import Store, StoreError, read_lines
from tasks.forget import is_forgotten

ADVICE = {
    "quarantined": "repair its files and build the catalog again, or preprocess with retry_quarantined",
    "retired": "the case changed and its newer row is not stored; preprocess again",
    "dropped": "its voxels were erased by `store compact`; preprocess the case again",
}
"""What to do, by status."""
COLUMNS = ["dataset", "case", "row", "status", "reason", "detail"]

Lines = Mapping[str, Sequence[dict[str, Any]]]
"""Lines of cases.parquet by `dataset/case`, by row; a case has several when its files changed."""


def stored_rows(store: Store, names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return dataset and row of stored cases by `dataset/case`.

    Raises StoreError: with status and reason for a case that is there and not stored, with an example for no case.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(read_lines(store.url).select(COLUMNS).to_pylist(), key=lambda line: line["row"]):
        lines.setdefault(f"{line['dataset']}/{line['case']}", []).append(line)
    return {name: _stored(store, lines, name) for name in names}


def _stored(store: Store, lines: Lines, name: str) -> tuple[str, int]:
    mine = [line for line in lines.get(name, ()) if line["status"] != "forgotten"]
    for line in mine:
        if line["status"] == "stored":
            return line["dataset"], line["row"]
    if mine:
        last = mine[-1]
        why = f": {last['reason']} ({last['detail']})" if last["reason"] else ""
        raise StoreError(f"{name} of {store.url} is {last['status']}{why}; {ADVICE[last['status']]}")
    dataset, _, case = name.partition("/")
    if any(is_forgotten(store.url, dataset, subject) for subject in _subjects(case)):
        raise StoreError(
            f"{name} of {store.url} is forgotten: its subject was erased; `store forget --lift` lets the next ingest "
            "bring it back"
        )
    example = next((name for name, some in lines.items() if any(x["status"] == "stored" for x in some)), "none")
    raise StoreError(f"no stored case {name!r} in {store.url}; for example {example!r}")


def _subjects(case: str) -> list[str]:
    """Return the subjects that a case name may belong to: a case is `<subject>` or `<subject>_<session>`."""
    pieces = case.split("_")
    return ["_".join(pieces[:count]) for count in range(len(pieces), 0, -1)]
