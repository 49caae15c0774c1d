from __future__ import annotations

import math

import pandas as pd
import pytest

from models.records import Scan
from tasks.phenotype_join import join_phenotypes
from tasks.phenotypes import normalise, read_participants


def table(dataset: str = "d", **columns: list[str]) -> pd.DataFrame:
    return normalise(pd.DataFrame(columns, dtype=object), dataset)


def scans(*subjects: str, dataset: str = "d") -> list[Scan]:
    return [Scan(dataset=dataset, subject=name, case=name, modality="t1", path="/x") for name in subjects]


def test_rows_of_several_tables_become_one() -> None:
    first = table(id=["a", "b"], age=["61", "33"], sex=["f", ""])
    second = table(id=["b", "a", "a"], iq=["99", "101", "101"], sex=["male", "", "F"])
    joined, issues = join_phenotypes([first, second], scans("a", "b"))
    assert joined[["subject", "age", "sex", "iq"]].to_numpy().tolist() == [
        ["a", 61.0, "F", 101.0],
        ["b", 33.0, "M", 99.0],
    ]
    assert issues == []


def test_values_that_disagree_are_left_empty_and_reported() -> None:
    both = [table(id=["a", "b"], age=["61", "33"], dx=["ad", "hc"]), table(id=["a"], age=["62"], dx=["hc"], w=["x"])]
    joined, issues = join_phenotypes(both, scans("a", "b"))
    row = joined.iloc[0]
    assert math.isnan(row["age"])
    assert (row["diagnosis"], row["w"]) == ("", "x")
    assert [(issue.problem, issue.detail) for issue in issues] == [
        ("conflict", "age of a: 61.0, 62.0; left empty"),
        ("conflict", "diagnosis of a: ad, hc; left empty"),
    ]


def test_sessions_take_what_they_lack_from_their_subject() -> None:
    people = table(id=["a", "b"], sex=["F", "M"], age=["60", "30"])
    visits = table(id=["a", "a"], session=["1", "2"], age=["61", ""])
    joined, issues = join_phenotypes([people, visits], scans("a", "b"))
    assert issues == []
    assert joined[["subject", "session", "age", "sex"]].to_numpy().tolist() == [
        ["a", "", 60.0, "F"],
        ["a", "1", 61.0, "F"],
        ["a", "2", 60.0, "F"],
        ["b", "", 30.0, "M"],
    ]


def test_strangers_on_both_sides_are_reported_where_there_is_a_table() -> None:
    _, issues = join_phenotypes(
        [table(id=["a", "ghost"], age=["1", "2"])], [*scans("a", "b"), *scans("z", dataset="e")]
    )
    assert [(issue.dataset, issue.subject, issue.problem) for issue in issues] == [
        ("d", "b", "no phenotypes"),
        ("d", "ghost", "unknown subject"),
    ]


def test_no_tables() -> None:
    joined, issues = join_phenotypes([], scans("a"))
    assert (len(joined), issues) == (0, [])


def test_columns_may_be_named_and_subjects_prefixed(tmp_path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("ID,Visit,Age at scan,group,id\n01,,61,x,9\nsub-02,v1,62,y,8\n")
    columns = {"subject": "ID", "session": "Visit", "age": "Age at scan", "group_code": "group"}
    found = read_participants(str(path), "d", columns, "sub-")
    assert found[["subject", "session", "age", "group_code"]].to_numpy().tolist() == [
        ["sub-01", "", 61.0, "x"],
        ["sub-02", "v1", 62.0, "y"],
    ]
    assert set(found["diagnosis"]) == {""}
    with pytest.raises(ValueError, match=r"p\.csv has no column 'nope'; its columns: ID, Visit"):
        read_participants(str(path), "d", {"subject": "nope"})


def test_a_second_column_of_ids_keeps_another_name() -> None:
    found = table(participant_id=["a"], subject=["other"])
    assert found.loc[0, ["subject", "subject_as_written"]].tolist() == ["a", "other"]
