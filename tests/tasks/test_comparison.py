"""Two sets of scores side by side: what changed, what did not, and what cannot be compared."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from brainloom.cli import app
from tasks.comparison import Change, ComparisonError, compare_scores, find_registered, read_scores

CLASSES = ("control", "patient")


def dice_scores(shift: float = 0.0, subjects: int = 30, row: str = "pre-trained", name: str = "phantom-tumour"):
    """Dice of one region-rich row: 0.5 and a spread between subjects, `shift` better."""
    rng = np.random.default_rng(1)
    lines = []
    for k in range(subjects):
        values = np.clip(0.5 + 0.1 * rng.standard_normal(3) + shift * rng.uniform(0.5, 1.5), 0, 1)
        for region, value in zip(("ET", "TC", "WT"), values, strict=True):
            common = {"benchmark": name, "row": row, "seed": 0, "dataset": "d", "case": f"c{k}", "subject": f"s{k}"}
            lines.append({**common, "region": region, "metric": "dice", "value": value, "target": "", "note": ""})
    return pd.DataFrame(lines)


def probe_scores(error: float, seed: int = 0, folds: int = 5):
    """Ages predicted with an error of so many years, ten subjects a fold."""
    rng = np.random.default_rng(seed)
    lines = []
    for k in range(10 * folds):
        age = 20.0 + k
        common = {"benchmark": "phantom-anat-age", "row": "AnatCL", "seed": 0, "dataset": "d", "case": f"c{k}"}
        common |= {"subject": f"s{k}", "region": "", "metric": "prediction", "target": str(age), "note": ""}
        lines.append({**common, "value": age + error * rng.choice([-1, 1]) * rng.uniform(0.9, 1.1), "fold": k % folds})
    return pd.DataFrame(lines)


def test_a_gain_a_loss_and_nothing():
    same = dice_scores(row="scratch")
    before = pd.concat([dice_scores(), same, dice_scores(0.2, row="majority")])
    after = pd.concat([dice_scores(0.1), same, dice_scores(row="majority")])
    found = compare_scores(before, after, replicates=400)
    assert [(change.row, change.metric, change.region) for change in found.changes] == [
        ("pre-trained", "dice", "mean"),
        ("scratch", "dice", "mean"),
        ("majority", "dice", "mean"),
    ]
    assert [change.verdict for change in found.changes] == ["better", "equal", "worse"]
    gain = found.changes[0]
    assert gain.difference == pytest.approx(0.1, abs=0.02)
    assert gain.p_holm == pytest.approx(3 * gain.p)
    assert "| phantom-tumour | pre-trained | mean Dice | 30 | " in found.to_markdown()


def test_what_is_no_table_of_scores_is_named(tmp_path):
    path = tmp_path / "scores.parquet"
    dice_scores().drop(columns=["row", "seed"]).to_parquet(path)
    with pytest.raises(ComparisonError, match=r"scores\.parquet is no table of scores: it has no column 'row', 'seed'"):
        read_scores(tmp_path)
    path.write_text("garbage, and more of it")
    with pytest.raises(ComparisonError, match=r"scores\.parquet is no readable Parquet file: "):
        read_scores(path)


def test_other_test_subjects_are_left_out():
    found = compare_scores(dice_scores(subjects=20), dice_scores(0.1, subjects=30), replicates=400).changes[0]
    assert (found.n, found.note) == (20, "other test subjects are left out")
    assert found.difference == pytest.approx(0.1, abs=0.02)


def test_rows_that_only_one_has_are_named():
    before, after = dice_scores(), pd.concat([dice_scores(), dice_scores(row="new")])
    found = compare_scores(pd.concat([before, dice_scores(row="old")]), after, replicates=400)
    assert (found.only_before, found.only_after) == (("phantom-tumour: old",), ("phantom-tumour: new",))
    assert "- only after: phantom-tumour: new" in found.to_markdown()
    with pytest.raises(ComparisonError, match="no row in common: before phantom-tumour: pre-trained; after x: r"):
        compare_scores(before, dice_scores(row="r", name="x"))


def test_cross_validated_rows_are_compared_fold_by_fold_and_less_error_is_better():
    (found,) = compare_scores(probe_scores(6.0), probe_scores(3.0, seed=1)).changes
    assert (found.metric, found.n, found.verdict) == ("mae", 50, "better")
    assert found.difference == pytest.approx(-3.0, abs=0.3)
    (other,) = compare_scores(probe_scores(6.0), probe_scores(3.0, folds=10)).changes
    assert (other.verdict, other.note) == ("not comparable", "other folds or subjects")
    (mixed,) = compare_scores(probe_scores(6.0), probe_scores(3.0).drop(columns="fold")).changes
    assert (mixed.verdict, mixed.note) == ("not comparable", "other protocol")


def test_what_is_not_registered_is_not_judged():
    (found,) = compare_scores(dice_scores(name="mine"), dice_scores(name="mine")).changes
    assert (found.verdict, found.note) == ("not comparable", "not registered here")
    named = [find_registered(name) for name in ("phantom-tumour-native", "phantom-diagnosis-labels20", "openbhb-age")]
    assert [one.name for one in named if one] == ["phantom-tumour-native", "phantom-diagnosis-labels20", "openbhb-age"]


def test_a_small_difference_is_no_evidence():
    change = Change(benchmark="b", row="r", metric="auroc", difference=0.01, p_holm=0.6)
    assert change.verdict == "no evidence of a change"


def test_the_command_reads_workspaces_and_says_what_is_missing(tmp_path):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        dice_scores(shift).to_parquet(tmp_path / name / "scores.parquet")
    (tmp_path / "b" / "probes").mkdir()
    probe_scores(3.0).to_parquet(tmp_path / "b" / "probes" / "scores.parquet")
    assert set(read_scores(tmp_path / "b")["benchmark"]) == {"phantom-tumour", "phantom-anat-age"}
    out = tmp_path / "changes.md"
    found = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "only after: phantom-anat-age: AnatCL" in out.read_text()
    assert "| better |" in found.output
    with pytest.raises(ComparisonError, match=r"nowhere holds no scores: name a scores\.parquet, or a workspace with"):
        read_scores(tmp_path / "nowhere")
