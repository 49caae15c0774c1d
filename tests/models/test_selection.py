"""Frozen selections: one digest for one content, and cases that are gone are named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.records import SelectedCase, digest_of
from models.selection import (
    SelectionError,
    check_selection,
    of_role,
    read_selection,
    selection_digest,
    write_selection,
)


def case(row: int, role: str = "train", digest: str = "d") -> SelectedCase:
    values = {"dataset": "ixi", "row": row, "case": f"c{row}", "subject": f"s{row}", "digest": digest, "role": role}
    return SelectedCase.model_validate(values)


class Held:
    def __init__(self, *lines: tuple[int, str, str]) -> None:
        self.lines = lines

    def cases(self) -> pa.Table:
        return pa.Table.from_pylist(
            [{"dataset": "ixi", "row": row, "status": status, "digest": digest} for row, status, digest in self.lines]
        )


def test_a_selection_is_read_back_and_its_digest_knows_no_order(tmp_path: Path) -> None:
    cases = [case(2), case(1, "val"), case(3, "test")]
    digest = write_selection(tmp_path / "selection.parquet", cases)
    assert read_selection(tmp_path / "selection.parquet") == [cases[1], cases[0], cases[2]]
    assert digest == selection_digest(cases) == selection_digest(cases[::-1])
    assert digest != selection_digest([case(2), case(1), case(3, "test")])
    assert [c.row for c in of_role(cases, "val")] == [1]


def test_people_are_kept_and_selections_from_before_keep_their_digest(tmp_path: Path) -> None:
    plain, known = case(1), case(1).replace(person="brats/7")
    old = [plain.model_dump(mode="json", exclude={"person", "age"})]
    assert selection_digest([plain]) == digest_of(old) != selection_digest([known])
    write_selection(tmp_path / "new.parquet", [known])
    assert read_selection(tmp_path / "new.parquet") == [known]
    pq.write_table(pa.Table.from_pylist(old), tmp_path / "old.parquet")
    assert read_selection(tmp_path / "old.parquet") == [plain]


def test_a_row_selected_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="row 1 of dataset ixi is selected twice"):
        write_selection(tmp_path / "selection.parquet", [case(1), case(1)])


def test_an_unchanged_store_and_one_that_grew_are_accepted() -> None:
    check_selection([case(1)], Held((1, "stored", "d"), (2, "stored", "e")))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ((1, "retired", "d"), r"ixi/c1 \(row 1\): retired"),
        ((1, "stored", "other"), r"ixi/c1 \(row 1\): its digest has changed"),
        ((7, "stored", "d"), r"ixi/c1 \(row 1\): erased"),
    ],
)
def test_a_case_that_is_gone_is_refused_by_name(line: tuple[int, str, str], reason: str) -> None:
    with pytest.raises(SelectionError, match=f"1 of 2 selected cases are no longer .*: {reason}"):
        check_selection([case(1), case(2)], Held(line, (2, "stored", "d")))
