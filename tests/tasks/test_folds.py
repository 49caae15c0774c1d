"""Folds: by subject, stratified, seeded, stable when a cohort grows, noticed when changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks import folds
from tasks.folds import FoldError, ensure_folds, fold_of, folds_digest, make_folds, read_folds


def people(n: int, sessions: int = 1) -> pd.DataFrame:
    lines = [
        {
            "dataset": "phantom",
            "subject": f"s{k:03d}",
            "session": f"{session}",
            "status": "stored",
            "diagnosis": "patient" if k % 7 == 0 else "control",
            "site": "ABC"[k % 3],
            "age": float(20 + k),
        }
        for k in range(n)
        for session in range(sessions)
    ]
    return pd.DataFrame(lines)


@pytest.fixture(autouse=True)
def no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "person_links", lambda workspace, url: [])


def ensure(workspace: Path, cases: pd.DataFrame, **more: object) -> pd.DataFrame:
    return ensure_folds(workspace, "default", "store.zarr", cases, **more)  # type: ignore[arg-type]


def test_every_subject_has_one_fold_and_every_class_is_in_every_fold() -> None:
    cases = people(100, sessions=2)
    found = make_folds(cases, strata=("diagnosis", "site")).merge(cases.drop_duplicates("subject"))
    assert len(found) == 100
    counts = found.groupby("fold")["diagnosis"].value_counts().unstack()
    assert (counts["patient"].max() - counts["patient"].min(), counts.sum(axis=1).unique().tolist()) == (0, [20])
    assert found.groupby(["fold", "site"]).size().min() >= 5


def test_a_class_with_as_many_subjects_as_folds_is_in_each() -> None:
    cases = people(60)
    cases["diagnosis"] = ["rare"] * 5 + ["control"] * 55
    for seed in range(5):
        found = make_folds(cases, seed=seed, strata=("diagnosis",)).merge(cases)
        assert sorted(found[found["diagnosis"] == "rare"]["fold"]) == [0, 1, 2, 3, 4]


def test_numbers_are_stratified_by_quantiles_and_gaps_are_a_stratum() -> None:
    cases = people(100)
    cases.loc[:9, "age"] = np.nan
    found = make_folds(cases, strata=("age",)).merge(cases)
    means = found.groupby("fold")["age"].mean()
    assert means.max() - means.min() < 5
    assert found[found["age"].isna()].groupby("fold").size().tolist() == [2] * 5


def test_the_seed_decides_and_row_order_does_not() -> None:
    cases = people(40)
    first = make_folds(cases, seed=1)
    assert make_folds(cases.sample(frac=1, random_state=0), seed=1).equals(first)
    assert not make_folds(cases, seed=2).equals(first)


def test_linked_subjects_share_a_fold() -> None:
    links = [(("phantom", "s000"), ("phantom", "s031")), (("phantom", "s031"), ("phantom", "s017"))]
    for seed in range(5):
        found = fold_of(make_folds(people(40), seed=seed, links=links))
        assert len({found["phantom", name] for name in ("s000", "s017", "s031")}) == 1


def test_folds_are_kept_and_a_grown_cohort_moves_nobody(tmp_path: Path) -> None:
    first = ensure(tmp_path, people(30), seed=3)
    path = tmp_path / "splits" / "default.folds.parquet"
    _, record = read_folds(path)
    assert record["subjects"] == {str(k): 6 for k in range(5)}
    assert ensure(tmp_path, people(20)).equals(first)
    grown = ensure(tmp_path, people(47), seed=99)
    assert fold_of(first).items() <= fold_of(grown).items()
    assert set(np.bincount(grown["fold"])) <= {9, 10}
    assert read_folds(path)[1]["seed"] == 3
    assert record["digest"] == folds_digest(first)


def test_only_stored_cases_count(tmp_path: Path) -> None:
    cases = people(30)
    cases.loc[:4, "status"] = "quarantined"
    assert len(ensure(tmp_path, cases)) == 25


def test_fewer_subjects_than_folds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FoldError, match=r"4 subjects are fewer than 5 folds; ask for fewer folds or add subjects"):
        ensure(tmp_path, people(4, sessions=3))
    with pytest.raises(FoldError, match="needs two or more folds, got 1"):
        make_folds(people(4), count=1)


def test_another_count_a_changed_table_and_a_subject_in_two_folds_are_refused(tmp_path: Path) -> None:
    made = ensure(tmp_path, people(30))
    path = tmp_path / "splits" / "default.folds.parquet"
    with pytest.raises(FoldError, match=r"default\.folds\.parquet holds 5 folds, asked for are 3; ask for 5, or use"):
        ensure(tmp_path, people(30), count=3)
    changed = made.assign(fold=lambda table: table["fold"].where(table.index != 0, (table["fold"] + 1) % 5))
    changed.to_parquet(path)
    with pytest.raises(FoldError, match=r"the table was changed after it was written; restore it"):
        ensure(tmp_path, people(30))
    with pytest.raises(FoldError, match="subject 's000' of 'phantom' is in two folds"):
        fold_of(pd.concat([made, changed]))


def test_links_found_later_are_refused_where_folds_keep_them_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fold_of(ensure(tmp_path, people(30)))
    one, other = ("phantom", "s000"), next(pair for pair, fold in made.items() if fold != made["phantom", "s000"])
    monkeypatch.setattr(folds, "person_links", lambda workspace, url: [(one, other)])
    with pytest.raises(
        FoldError, match=r"phantom/s000 \(fold \d\) and phantom/s0\d\d \(fold \d\) look like one person"
    ):
        ensure(tmp_path, people(30))


def test_subjects_linked_through_somebody_without_a_fold_are_refused_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fold_of(ensure(tmp_path, people(30)))
    one, other = ("phantom", "s000"), next(pair for pair, fold in made.items() if fold != made["phantom", "s000"])
    between = ("elsewhere", "x")
    monkeypatch.setattr(folds, "person_links", lambda workspace, url: [(other, between), (between, one)])
    with pytest.raises(FoldError, match=rf"phantom/s000 \(fold \d\) and phantom/{other[1]} \(fold \d\) look like one"):
        ensure(tmp_path, people(30))
