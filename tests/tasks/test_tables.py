"""Tables: the golden one, digests without dates, `no data`, published rows, escaping, and the summary beneath them."""

from __future__ import annotations

import csv
import io
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from models.records import SelectedCase
from tasks.baselines import MAJORITY
from tasks.benchmarks import BENCHMARKS, CLASSIFICATION_METRICS, LESION_METRICS, SEGMENTATION_METRICS, Benchmark
from tasks.metrics_masks import UNDEFINED
from tasks.scores import COLUMNS, RowKey, ScoreError, probability_scores
from tasks.summary import PRETRAINED, SCRATCH, reliability_curves, summarise
from tasks.tables import METRIC_NAMES, BenchmarkTable, artifact_rows, to_csv, to_latex, to_markdown

GOLDEN = Path(__file__).parents[1] / "golden" / "table.md"
DIAGNOSIS = BENCHMARKS["phantom-diagnosis"]
TUMOUR = BENCHMARKS["phantom-tumour"]
FURTHER = [metric for metric in TUMOUR.metrics if metric not in ("dice", "hd95")]


def people(n: int, targets: bool = True) -> list[SelectedCase]:
    return [
        SelectedCase(
            dataset="phantom-bids", row=k, case=f"sub-{k:02d}", subject=f"sub-{k:02d}", digest="d", role="test",
            target=("control", "patient")[k % 2] if targets else "",
        )
        for k in range(n)
    ]  # fmt: skip


def classified(n: int = 20, seeds: int = 2) -> pd.DataFrame:
    """Return scores of two rows of different quality and of the majority."""
    rng, cases, frames = np.random.default_rng(1), people(n), []
    truth = np.arange(n) % 2
    for row, shift in ((PRETRAINED, 2.0), (SCRATCH, 0.5)):
        for seed in range(seeds):
            p = 1 / (1 + np.exp(-(shift * (2 * truth - 1) / 2 + rng.normal(size=n))))
            key = RowKey(DIAGNOSIS.name, row, seed)
            frames.append(probability_scores(key, DIAGNOSIS, cases, np.column_stack([1 - p, p])))
    key = RowKey(DIAGNOSIS.name, MAJORITY, 0)
    frames.append(probability_scores(key, DIAGNOSIS, cases, np.full((n, 2), 0.5)))
    return pd.concat(frames, ignore_index=True)


def segmented(n: int = 8, seeds: int = 2) -> pd.DataFrame:
    rng, rows = np.random.default_rng(2), []
    for row, level in ((PRETRAINED, 0.8), (SCRATCH, 0.7)):
        for seed in range(seeds):
            for case in people(n, targets=False):
                for region in ("ET", "TC", "WT"):
                    empty = region == "ET" and case.row == 0
                    common = (DIAGNOSIS.name, row, seed, case.dataset, case.case, case.subject, region)
                    rows.append((*common, "dice", float(level + rng.normal(0, 0.05)), "", ""))
                    distance = np.nan if empty else float(5 + rng.normal())
                    rows.append((*common, "hd95", distance, "", "target empty" if empty else ""))
                    further = rng.uniform(0.2, 0.9, len(FURTHER))
                    for metric, value in zip(FURTHER, further, strict=True):
                        undefined = empty and metric in UNDEFINED
                        note = "target empty" if undefined else ""
                        rows.append((*common, metric, np.nan if undefined else float(value), "", note))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def table_of(scores: pd.DataFrame, benchmark: Benchmark, date: str = "") -> BenchmarkTable:
    lines = summarise(scores, benchmark, {MAJORITY: "baseline"}, replicates=500)
    return BenchmarkTable(
        benchmark=benchmark,
        lines=tuple(lines),
        budget="2 epochs of 50 training cases",
        provenance=(("store digest", "0123abcd"),),
        date=date,
    )


@cache
def diagnosis_table() -> BenchmarkTable:
    return table_of(classified(), DIAGNOSIS)


@cache
def tumour_table() -> BenchmarkTable:
    return table_of(segmented(), TUMOUR)


def test_golden_table() -> None:
    tables = (diagnosis_table(), tumour_table(), table_of(pd.DataFrame(), BENCHMARKS["adni"]))
    text = "\n".join(map(to_markdown, tables))
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_date_is_shown_and_is_not_in_the_digest() -> None:
    first, second = (table_of(classified(), DIAGNOSIS, date) for date in ("2026-01-01", "2026-02-02"))
    assert "Written on 2026-01-01." in to_markdown(first)
    assert first.digest == second.digest
    assert first.digest != table_of(classified(seeds=1), DIAGNOSIS).digest


def test_every_table_says_what_a_reviewer_asks_for() -> None:
    text = to_markdown(diagnosis_table())
    for words in (
        "n = 20 test subjects; one subject is worth 5.00 points",
        "95 % BCa bootstrap over subjects",
        "Budget of every trained row: 2 epochs of 50 training cases.",
        "Basis of the protocol: confirmed.",
        "Holm-corrected",
        "standard deviation between seeds of AUROC: pre-trained",
        "store digest: `0123abcd`",
    ):
        assert words in text


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.published])
def test_absent_data_are_no_data_beside_published_rows(name: str) -> None:
    table = table_of(pd.DataFrame(), BENCHMARKS[name])
    text = to_markdown(table)
    assert "| no data |" in text
    row = BENCHMARKS[name].published[0]
    named = f"{row.method} (published, {row.basis}: {row.source})"
    assert named in text
    assert {named, "no data"} <= {cells["row"] for cells in artifact_rows(table)}
    assert f"(published: {row.source})" in to_latex(table)
    assert "Where the data are: " in text
    assert "shown, never tested against" in text
    assert "nan" not in text.lower().split()
    assert r"\midrule" in to_latex(table)


def test_conflicting_published_rows_stay_apart() -> None:
    text = to_markdown(table_of(pd.DataFrame(), BENCHMARKS["abide-i"]))
    assert "0.654" in text or "0.655" in text
    assert "0.697" in text


def test_undefined_hd95_is_counted_and_left_out() -> None:
    table = tumour_table()
    lines = {(line.row, line.metric, line.region): line for line in table.lines}
    assert lines[PRETRAINED, "hd95", "ET"].undefined == 2
    assert lines[PRETRAINED, "hd95", "WT"].undefined == 0
    text = to_markdown(table)
    names = "HD95, pooled HD95, relative volume error, lesion sensitivity"
    assert f"left out of means, counted over all seeds: {names}: pre-trained ET 2, scratch ET 2." in text
    assert "NSD: surfaces at most 3 mm apart agree." in text
    assert "true ones of at most 50 mm³ do not count" in text


def test_csv_has_full_precision_and_no_nan() -> None:
    table = tumour_table()
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(rows) == len(table.lines)
    assert float(rows[0]["estimate"]) == table.lines[0].estimate
    assert not any(value.lower() in {"nan", "inf", "none"} for row in rows for value in row.values())


def test_latex_is_escaped_and_has_booktabs_rules() -> None:
    text = to_latex(diagnosis_table())
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\end{tabular}") >= 2
    assert r"95 \% BCa" in text
    assert r"\caption{Phantom diagnosis.}\label{tab:phantom-diagnosis}" in text


def test_few_subjects_are_said_to_be_few() -> None:
    few = "4 subjects are too few: no p can be below 0.12"
    words = (
        "a 95 % bootstrap interval, which cannot reach beyond the subjects' own values, holds a mean in at most 88 %"
    )
    told = f"- {few}, and {words}."
    assert told in to_markdown(table_of(segmented(n=4), TUMOUR))
    assert "too few" not in to_markdown(tumour_table())


def test_artifact_rows_are_strings() -> None:
    rows = artifact_rows(diagnosis_table())
    assert rows[0]["row"] == PRETRAINED
    assert all(isinstance(value, str) for row in rows for value in row.values())
    wide = artifact_rows(tumour_table())[0]
    assert list(wide) == [
        "row", "n", "seeds", "mean Dice", "mean HD95 (mm)", "mean NSD", "mean lesion F1",
        "difference in mean Dice", "effect", "p (Holm), mean Dice",
    ]  # fmt: skip


def test_rows_scored_on_other_cases_are_refused() -> None:
    scores = classified()
    cut = scores[~((scores["row"] == SCRATCH) & (scores["case"] == "sub-03"))]
    with pytest.raises(ScoreError, match=r"were scored on different cases \(20 and 19, e.g. .*sub-03"):
        summarise(cut, DIAGNOSIS, {})


def test_nan_scores_are_refused_by_name() -> None:
    scores = segmented()
    scores.loc[(scores["metric"] == "dice") & (scores["case"] == "sub-02"), "value"] = np.nan
    with pytest.raises(ScoreError, match="row 'pre-trained', case sub-02: dice is nan; it must be finite"):
        summarise(scores, TUMOUR, {}, replicates=200)
    found = classified()
    found.loc[3, "value"] = np.nan
    with pytest.raises(ScoreError, match="NaN or missing probabilities in row 'pre-trained'"):
        summarise(found, DIAGNOSIS, {}, replicates=200)


def test_a_single_test_subject_gives_numbers_without_intervals() -> None:
    lines = summarise(segmented(n=1), TUMOUR, {}, replicates=200)
    dice = next(line for line in lines if line.metric == "dice")
    assert dice.n == 1
    assert dice.low is None
    assert dice.note == "one test subject: no interval"


def test_each_seed_is_scored_against_its_own_targets() -> None:
    """A negative control shuffles the test labels too, anew for each seed."""
    scores = classified(seeds=2)
    swapped = scores["seed"] == 1
    scores.loc[swapped, "target"] = scores.loc[swapped, "target"].map(lambda t: DIAGNOSIS.classes[t == "control"])
    both = next(line for line in summarise(scores, DIAGNOSIS, {}, replicates=200) if line.metric == "auroc")
    alone = []
    for _, part in scores.groupby("seed"):
        line = next(line for line in summarise(part, DIAGNOSIS, {}, replicates=200) if line.metric == "auroc")
        positive = part[(part["row"] == PRETRAINED) & (part["region"] == "patient")]
        assert line.estimate == pytest.approx(roc_auc_score(positive["target"] == "patient", positive["value"]))
        alone.append(line.estimate)
    assert both.estimate == pytest.approx(np.mean(alone))
    assert alone[0] > 0.5 > alone[1]


def test_a_class_absent_from_the_test_set_gives_no_auroc() -> None:
    scores = classified()
    lines = summarise(scores[scores["target"] == "control"], DIAGNOSIS, {}, replicates=200)
    auroc = next(line for line in lines if line.metric == "auroc")
    assert auroc.estimate is None
    assert auroc.note.startswith("undefined: a class or every value is absent")


def test_the_better_row_is_found_and_holm_covers_all_rows() -> None:
    lines = {(x.row, x.metric): x for x in summarise(classified(n=60), DIAGNOSIS, {MAJORITY: "baseline"})}
    scratch = lines[SCRATCH, "auroc"]
    assert scratch.difference is not None
    assert scratch.difference > 0
    assert scratch.p is not None
    assert scratch.p_holm is not None
    assert scratch.p <= scratch.p_holm <= 1
    assert lines[PRETRAINED, "auroc"].p is None


def test_difference_effect_and_ranks_are_shown() -> None:
    table = table_of(classified(n=60), DIAGNOSIS)
    lines = {(line.row, line.metric): line for line in table.lines}
    best, other = lines[PRETRAINED, "auroc"], lines[SCRATCH, "auroc"]
    assert (best.rank, other.rank) == (1, 2)
    assert best.first is not None
    assert best.first > 0.9
    assert other.effect is not None
    assert 0 < other.effect < 2
    assert lines[SCRATCH, "f1"].rank is None, "of the primary metric alone"
    text = to_markdown(table)
    assert "| difference in AUROC | effect | p (Holm), AUROC |" in text
    assert "Rank by AUROC, its 95 % over drawn subjects, and how often it is first: pre-trained 1 [1, 1] (" in text


def test_a_ceiling_has_no_rank_and_a_single_row_neither() -> None:
    scores = classified()
    lines = summarise(scores, DIAGNOSIS, {MAJORITY: "ceiling"}, replicates=200)
    assert {line.row for line in lines if line.rank} == {PRETRAINED, SCRATCH}
    alone = summarise(scores[scores["row"] == SCRATCH], DIAGNOSIS, {}, replicates=200)
    assert not [line for line in alone if line.rank]


def test_the_calibration_error_has_no_interval_and_no_test() -> None:
    lines = summarise(classified(), DIAGNOSIS, {}, replicates=200)
    error = next(line for line in lines if line.metric == "ece" and line.row == SCRATCH)
    assert (error.low, error.difference, error.p) == (None, None, None)
    assert error.note.startswith("no interval: few cases make it too large")


def test_reliability_curves_of_every_row_and_seed() -> None:
    curves = reliability_curves(classified(), DIAGNOSIS)
    assert list(curves.columns[:4]) == ["row", "seed", "low", "high"]
    assert (curves.groupby(["row", "seed"])["n"].sum() == 20).all()
    assert len(curves.groupby(["row", "seed"])) == 2 + 2 + 1


def test_a_metric_without_scores_is_an_error_by_name() -> None:
    scores = segmented()
    with pytest.raises(ScoreError, match="row 'pre-trained' has no score of nsd; score it again"):
        summarise(scores[scores["metric"] != "nsd"], TUMOUR, {}, replicates=200)


@pytest.mark.parametrize("metric", [*SEGMENTATION_METRICS, *LESION_METRICS, *CLASSIFICATION_METRICS])
def test_every_metric_has_a_printed_name_and_is_documented(metric: str) -> None:
    assert metric in METRIC_NAMES
    assert f"`{metric}`" in (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
