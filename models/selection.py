"""The frozen cases of a training: reading, writing and checking selection.parquet.

A training names each case by row and digest, so a store that grows every night does not disturb it, and a case that
was retired or erased is noticed by name. Imports no torch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from models.records import SelectedCase, digest_of, without_unset

Role = Literal["train", "val", "test"]
COLUMNS: tuple[str, ...] = tuple(SelectedCase.model_fields)


class SelectionError(ValueError):
    """A selection is empty, ambiguous, or no longer what the store holds."""


class HasCases(Protocol):
    """What is needed of a store: its table of cases."""

    def cases(self) -> pa.Table:
        """Return cases.parquet with all statuses."""
        ...


def selection_digest(cases: Sequence[SelectedCase]) -> str:
    """Return the SHA-256 (hex) over the sorted lines of a selection; the order of the lines does not matter.

    An empty `person` and an unknown age do not count: selections from before there were any keep their digest.
    """
    lines = [without_unset(case.model_dump(mode="json"), {"person": "", "age": None}) for case in cases]
    return digest_of(sorted(lines, key=lambda c: (c["dataset"], c["row"])))


def write_selection(path: str | Path, cases: Sequence[SelectedCase]) -> str:
    """Write selection.parquet as a whole object and return its digest. Raises SelectionError for repeated rows."""
    lines = sorted(cases, key=lambda c: (c.dataset, c.row))
    seen: set[tuple[str, int]] = set()
    for case in lines:
        if (case.dataset, case.row) in seen:
            raise SelectionError(f"row {case.row} of dataset {case.dataset} is selected twice; each row may occur once")
        seen.add((case.dataset, case.row))
    columns: dict[str, Any] = {name: [getattr(case, name) for case in lines] for name in COLUMNS}
    columns["age"] = pa.array(columns["age"], pa.float64())  # also when no age is known
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(str(path), buffer.getvalue())
    return selection_digest(lines)


def read_selection(path: str | Path) -> list[SelectedCase]:
    """Return the lines of a selection.parquet, sorted by dataset and row."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(str(path))))
    return [SelectedCase.model_validate(line) for line in table.to_pylist()]


def of_role(cases: Sequence[SelectedCase], role: Role) -> list[SelectedCase]:
    """Return the lines of one role, in order."""
    return [case for case in cases if case.role == role]


def check_selection(cases: Sequence[SelectedCase], store: HasCases) -> None:
    """Refuse a selection whose cases the store no longer holds as they were.

    Raises SelectionError naming the first cases that were retired, erased or changed since the selection was frozen.
    """
    table = store.cases().select(["dataset", "row", "status", "digest"])
    held = {(line["dataset"], line["row"]): line for line in table.to_pylist()}
    wrong = [f"{case.dataset}/{case.case} (row {case.row}): {why}" for case in cases if (why := _why(case, held))]
    if wrong:
        shown = "; ".join(wrong[:5])
        raise SelectionError(
            f"{len(wrong)} of {len(cases)} selected cases are no longer in the store as selected: {shown}. "
            "A training must see the cases that it was started with; start a new training with a new selection"
        )


def _why(case: SelectedCase, held: dict[tuple[str, int], dict[str, str]]) -> str:
    line = held.get((case.dataset, case.row))
    if line is None:
        return "erased"
    if line["status"] != "stored":
        return str(line["status"])
    return "" if line["digest"] == case.digest else "its digest has changed"
