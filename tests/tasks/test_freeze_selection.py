"""Which cases a training sees: by status, split, dataset and target."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from models.selection import SelectionError, read_selection, selection_digest
from tasks.selection import freeze_selection, select_cases


def lines(*rows: tuple[str, int, str, str]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"dataset": d, "row": r, "case": f"{s}_x", "subject": s, "status": status, "digest": f"d{r}"}
            for d, r, s, status in rows
        ]
    )


CASES = lines(
    ("ixi", 0, "s0", "retired"),
    ("ixi", 1, "s0", "stored"),
    ("ixi", 2, "s1", "stored"),
    ("ixi", 3, "s2", "quarantined"),
    ("brats", 0, "s0", "stored"),
    ("brats", 1, "s9", "stored"),
)
SPLIT = pd.DataFrame(
    [("ixi", "s0", "train"), ("ixi", "s1", "test"), ("brats", "s0", "val"), ("ixi", "s2", "train")],
    columns=["dataset", "subject", "split"],
)


def chosen(**options: object) -> set[tuple[str, int, str]]:
    return {(case.dataset, case.row, case.role) for case in select_cases(CASES, **options)}


def test_only_stored_cases_are_selected_and_all_train_without_a_split() -> None:
    assert chosen() == {("ixi", 1, "train"), ("ixi", 2, "train"), ("brats", 0, "train"), ("brats", 1, "train")}


def test_roles_come_from_the_split_by_dataset_and_subject() -> None:
    assert chosen(split=SPLIT) == {("ixi", 1, "train"), ("ixi", 2, "test"), ("brats", 0, "val")}


def test_test_subjects_are_left_out_of_a_pre_training() -> None:
    assert chosen(split=SPLIT, drop_test=True) == {("ixi", 1, "train"), ("brats", 0, "val")}


def test_datasets_and_targets_filter() -> None:
    assert chosen(datasets=["ixi"]) == {("ixi", 1, "train"), ("ixi", 2, "train")}
    with_target = select_cases(CASES, targets={("ixi", "s1_x"): "patient"})
    assert [(case.row, case.target) for case in with_target] == [(2, "patient")]


def test_linked_subjects_are_one_person_over_datasets() -> None:
    links = [(("ixi", "s1"), ("brats", "s9")), (("brats", "s9"), ("gone", "s"))]
    found = {(case.dataset, case.subject): case.person for case in select_cases(CASES, links=links)}
    assert found[("ixi", "s1")] == found[("brats", "s9")] != ""
    assert not any(name in found[("ixi", "s1")] for name in ("ixi", "brats", "s9")), "no id of another subject"
    assert found[("ixi", "s0")] == found[("brats", "s0")] == ""


def test_the_frozen_file_has_the_digest(tmp_path: Path) -> None:
    digest = freeze_selection(tmp_path / "selection.parquet", CASES, SPLIT)
    assert selection_digest(read_selection(tmp_path / "selection.parquet")) == digest


def test_impossible_selections_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"datasets \['oasis'\] are not in the store, which has: brats, ixi"):
        select_cases(CASES, datasets=["oasis"])
    with pytest.raises(SelectionError, match="no training case is left of 6 rows of the store"):
        select_cases(CASES, SPLIT, datasets=["brats"])
    wrong = pd.DataFrame([("ixi", "s0", "dev")], columns=["dataset", "subject", "split"])
    with pytest.raises(SelectionError, match="subject s0 of ixi has split 'dev'; known: train, val, test"):
        select_cases(CASES, wrong)
    both = pd.concat([SPLIT, pd.DataFrame([("ixi", "s0", "test")], columns=SPLIT.columns)])
    with pytest.raises(SelectionError, match="subject s0 of ixi is both train and test; a subject has one role"):
        select_cases(CASES, both)
