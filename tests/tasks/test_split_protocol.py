"""What benchmarks want of a split: classes in every role, shares of their own, and nothing that nobody asked for."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tasks.benchmarks import BENCHMARKS
from tasks.split_protocol import shares_by_dataset, target_strata, with_strata
from tasks.splits import (
    OWN_SHARES,
    SHARES,
    STRATIFY,
    ensure_split,
    make_split,
    read_record,
    split_digest,
    workspace_split,
)


def brats2018() -> pd.DataFrame:
    """Return 210 HGG and 75 LGG of three sites, in no order."""
    grades = ["HGG"] * 210 + ["LGG"] * 75
    rows = {"dataset": "brats2018", "subject": [f"b{k * 37 % 285:03d}" for k in range(285)], "has_label": True}
    return pd.DataFrame({**rows, "grade": grades, "site": ["ABC"[k * k % 3] for k in range(285)]})


def others() -> pd.DataFrame:
    """Return ISLES and ABIDE I, whose diagnosis is a code of its own column."""
    isles = pd.DataFrame({"dataset": "isles22", "subject": [f"i{k:03d}" for k in range(238)], "has_label": True})
    abide = pd.DataFrame({"dataset": "abide-i", "subject": [f"a{k:03d}" for k in range(101)], "has_label": False})
    return pd.concat([isles, abide.assign(DX_GROUP=["12"[k % 5 == 0] for k in range(101)])], ignore_index=True)


def test_classes_are_in_every_role_in_their_share_whatever_the_seed() -> None:
    cases = pd.concat([others(), brats2018()], ignore_index=True)
    strata = with_strata(STRATIFY, target_strata({"brats2018"}))
    assert strata == [*STRATIFY[:-1], "grade", "site"]
    for seed in range(6):
        split = make_split(cases, seed, stratify=strata).merge(brats2018(), on=["dataset", "subject"])
        low = split[split["grade"] == "LGG"]["split"].value_counts()
        assert abs(low["test"] - 15) <= 1, seed
        assert abs(low["val"] - 7.5) <= 1, seed


def test_a_workspace_is_split_as_its_benchmarks_say(tmp_path: Path) -> None:
    people = pd.concat([others(), brats2018()], ignore_index=True).assign(status="stored")
    split, _ = workspace_split(tmp_path, "default", str(tmp_path / "store.zarr"), people)
    counts = split.value_counts(["dataset", "split"])
    assert [counts["isles22", role] for role in ("train", "val", "test")] == [178, 24, 36]
    assert abs(counts["brats2018", "test"] - 57) <= 1
    codes = split.merge(others(), on=["dataset", "subject"]).query("dataset == 'abide-i'")
    assert abs(((codes["DX_GROUP"] == "2") & (codes["split"] == "test")).sum() - 4) <= 1
    record = read_record(tmp_path / "splits" / "default.parquet")
    assert record["stratify"] == [*STRATIFY[:-1], "grade", "site"]
    assert record[OWN_SHARES] == {"isles22": [0.75, 0.1, 0.15]}


def test_shares_that_a_workspace_asks_for_hold_for_every_dataset(tmp_path: Path) -> None:
    path = tmp_path / "split.parquet"
    split, _ = ensure_split(path, others(), 0, (0.4, 0.2, 0.4), shares_of=shares_by_dataset({"isles22"}))
    isles = split[split["dataset"] == "isles22"]["split"].value_counts()
    assert abs(isles["test"] - 95) <= 2
    assert OWN_SHARES not in read_record(path)


def test_an_older_split_learns_the_strata_of_data_that_come_later(tmp_path: Path) -> None:
    path = tmp_path / "split.parquet"
    first, _ = ensure_split(path, others(), seed=0)
    cases = pd.concat([others(), brats2018()], ignore_index=True)
    grown, _ = ensure_split(path, cases, seed=0, targets=target_strata({"brats2018"}))
    assert len(first.merge(grown)) == len(first)
    low = grown.merge(brats2018().query("grade == 'LGG'"), on=["dataset", "subject"])
    assert abs((low["split"] == "test").sum() - 15) <= 1
    assert read_record(path)["stratify"] == [*STRATIFY[:-1], "grade", "site"]


@pytest.mark.parametrize("dataset", sorted({name for one in BENCHMARKS.values() for name in one.datasets}))
def test_strata_of_phantoms_and_shares_of_most_are_the_usual_ones(dataset: str) -> None:
    assert with_strata(STRATIFY, target_strata({dataset})) == (
        [*STRATIFY[:-1], "grade", "site"] if dataset == "brats2018" else list(STRATIFY)
    )
    assert shares_by_dataset({dataset}) == ({"isles22": (0.75, 0.1, 0.15)} if dataset == "isles22" else {})
    assert all(one.split.shares == SHARES for one in BENCHMARKS.values() if one.name != "isles22")


def test_a_split_without_wishes_is_what_it_was() -> None:
    """The demo's numbers stand in the README: its split must not move."""
    cases = pd.DataFrame({"dataset": "phantom-bids", "subject": [f"s{k:03d}" for k in range(60)]})
    cases = cases.assign(diagnosis=["control", "patient"] * 30, site=["A", "B", "C"] * 20)
    assert split_digest(make_split(cases, 0, (0.55, 0.1, 0.35)))[:12] == "3461593047e7"
