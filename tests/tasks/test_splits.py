"""Splits: by subject, stratified, seeded, stable when a cohort grows, noticed when changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import splits
from tasks.splits import (
    SplitError,
    check_split,
    ensure_split,
    make_split,
    read_record,
    read_split,
    split_digest,
    with_phenotypes,
    write_split,
)


def cohort(n: int, sessions: int = 1) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "dataset": "phantom",
                "subject": f"s{k:03d}",
                "session": f"{session}",
                "diagnosis": ("control", "patient")[k % 2],
                "site": "ABC"[k % 3],
            }
            for k in range(n)
            for session in range(sessions)
        ]
    )


def test_shares_hold_and_every_subject_has_one_role() -> None:
    split = make_split(cohort(100, sessions=2), seed=1)
    assert split["split"].value_counts().to_dict() == {"train": 70, "test": 20, "val": 10}
    assert not split.duplicated(["dataset", "subject"]).any()


def test_labels_and_sites_are_balanced_in_every_role() -> None:
    cases = cohort(120)
    split = make_split(cases, seed=3).merge(cases, on=["dataset", "subject"])
    for role, part in split.groupby("split"):
        assert abs((part["diagnosis"] == "patient").mean() - 0.5) < 0.05, role
        assert part["site"].value_counts(normalize=True).max() < 0.45, role


def test_the_seed_decides_and_row_order_does_not() -> None:
    cases = cohort(60)
    same = make_split(cases.sample(frac=1, random_state=5), seed=1)
    assert split_digest(make_split(cases, seed=1)) == split_digest(same)
    assert split_digest(make_split(cases, seed=2)) != split_digest(same)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(12, 80), more=st.integers(0, 40), seed=st.integers(0, 5))
def test_a_growing_cohort_moves_nobody(n: int, more: int, seed: int) -> None:
    before = make_split(cohort(n), seed)
    after = make_split(cohort(n + more), seed, existing=before)
    kept = before.merge(after, on=["dataset", "subject"])
    assert (kept["split_x"] == kept["split_y"]).all()
    assert len(after) == n + more
    assert abs((after["split"] == "test").sum() - 0.2 * len(after)) <= 2


def test_files_round_trip_with_their_digest(tmp_path: Path) -> None:
    split = make_split(cohort(40), seed=1)
    digest = write_split(split, tmp_path / "default.parquet", {"seed": 1})
    again, read = read_split(tmp_path / "default.parquet")
    assert read == digest == split_digest(again)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "default.parquet"
    split = make_split(cohort(40), seed=1)
    write_split(split, path)
    split.loc[0, "split"] = "test" if split.loc[0, "split"] != "test" else "train"
    split.to_parquet(path)
    with pytest.raises(SplitError, match="the table was changed after it was written"):
        read_split(path)


def test_ensure_split_writes_once_then_extends(tmp_path: Path) -> None:
    path = tmp_path / "splits" / "default.parquet"
    first, digest = ensure_split(path, cohort(40), seed=0)
    stamp = path.stat().st_mtime_ns
    assert ensure_split(path, cohort(30), seed=0)[1] == digest
    assert path.stat().st_mtime_ns == stamp
    grown, other = ensure_split(path, cohort(50), seed=0)
    assert other != digest
    assert len(grown) == 50
    assert len(first.merge(grown)) == 40


def test_a_kill_between_table_and_json_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "default.parquet"
    real, calls = splits.write_bytes, list[str]()

    def killed_at_the_second(url: str, data: bytes) -> None:
        calls.append(url)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        real(url, data)

    for n in (40, 50):  # made, then extended beside a json of the smaller split
        monkeypatch.setattr(splits, "write_bytes", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            ensure_split(path, cohort(n), seed=0)
        monkeypatch.setattr(splits, "write_bytes", real)
        split, digest = read_split(path)
        assert len(split) == n
        assert ensure_split(path, cohort(n), seed=0)[1] == digest
        assert json.loads(path.with_suffix(".json").read_text()) == read_record(path)
    path.with_suffix(".json").unlink()
    ensure_split(path, cohort(50), seed=0)
    assert json.loads(path.with_suffix(".json").read_text())["digest"] == digest


def test_a_change_that_keeps_the_metadata_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "default.parquet"
    write_split(make_split(cohort(40), seed=1), path)
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(SplitError, match="the table was changed after it was written"):
        read_split(path)


def test_a_table_without_metadata_needs_its_json(tmp_path: Path) -> None:
    path = tmp_path / "default.parquet"
    split = make_split(cohort(40), seed=1)
    digest = write_split(split, path)
    split.to_parquet(path)
    assert read_split(path)[1] == digest
    path.with_suffix(".json").unlink()
    with pytest.raises(SplitError, match=r"no digest, neither in its metadata nor in default\.json"):
        read_split(path)


def test_an_extension_keeps_seed_shares_and_strata(tmp_path: Path) -> None:
    path = tmp_path / "default.parquet"
    made: dict[str, Any] = {"seed": 3, "shares": (0.5, 0.25, 0.25), "stratify": ("site",)}
    first, _ = ensure_split(path, cohort(40), **made)
    grown, _ = ensure_split(path, cohort(80), seed=0)
    assert split_digest(grown) == split_digest(make_split(cohort(80), **made, existing=first))
    assert grown["split"].value_counts().to_dict() == {"train": 40, "val": 20, "test": 20}
    record = read_record(path)
    assert (record["seed"], record["shares"], record["stratify"]) == (3, [0.5, 0.25, 0.25], ["site"])


def test_bad_splits_are_refused() -> None:
    split = make_split(cohort(40), seed=1)
    twice = pd.concat([split, split.head(1).assign(split="test" if split.loc[0, "split"] == "train" else "train")])
    with pytest.raises(SplitError, match=r"subject 's000' of 'phantom' is in 2 roles; a subject has one role"):
        check_split(twice)
    with pytest.raises(SplitError, match=r"unknown roles in the split: \['holdout'\]; use train, val, test"):
        check_split(split.assign(split="holdout"))
    with pytest.raises(SplitError, match="no subject in role 'val': 2 subjects are too few"):
        make_split(cohort(2), seed=1)
    with pytest.raises(SplitError, match=r"must be at least 0 and sum to 1, got \(0.5, 0.5, 0.5\)"):
        make_split(cohort(20), seed=1, shares=(0.5, 0.5, 0.5))


def test_phenotypes_are_joined_by_session_then_by_subject() -> None:
    cases = pd.DataFrame({"dataset": "d", "subject": ["a", "a", "b"], "session": ["1", "2", "1"], "site": "case's own"})
    phenotypes = pd.DataFrame(
        {"dataset": "d", "subject": ["a", "a", "c"], "session": ["1", "9", "1"], "age": [50.0, 60.0, 70.0], "site": "x"}
    )
    joined = with_phenotypes(cases, phenotypes)
    assert joined["age"].tolist()[:2] == [50.0, 50.0]
    assert joined["age"].isna().tolist() == [False, False, True]
    assert set(joined["site"]) == {"case's own"}


def test_linked_subjects_share_a_role_through_others_too(tmp_path: Path) -> None:
    cases = cohort(40)
    names = [("phantom", f"s{k:03d}") for k in range(40)]
    chain = [(names[0], names[9]), (names[20], names[9]), (names[20], names[31]), (names[1], ("elsewhere", "x"))]
    for seed in range(8):
        split = make_split(cases, seed=seed, links=chain)
        roles = splits.roles(split)
        assert len({roles[names[k]] for k in (0, 9, 20, 31)}) == 1
    path = tmp_path / "split.parquet"
    first, _ = ensure_split(path, cases.iloc[:20], seed=1)
    role = splits.roles(first)
    grown, _ = ensure_split(path, cases, seed=1, links=[(names[3], names[25])])
    assert splits.roles(grown)[names[25]] == role[names[3]]
    assert all(splits.roles(grown)[name] == old for name, old in role.items())
    train, test = (next(name for name, r in role.items() if r == wanted) for wanted in ("train", "test"))
    one, other = sorted((train, test))
    with pytest.raises(
        SplitError, match=rf"{one[1]} \({role[one]}\) and phantom/{other[1]} \({role[other]}\) look like one person"
    ):
        ensure_split(path, cases, seed=1, links=[(test, train)])
