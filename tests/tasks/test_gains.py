"""What each pre-training gives: against its own network from scratch and the best baseline, corrected over all."""

from __future__ import annotations

import csv
import io

import numpy as np
import pandas as pd
import pytest

from tasks import gains
from tasks.benchmarks import BENCHMARKS
from tasks.gains import GainTable, gain_table
from tasks.statistics import Interval, holm
from tasks.summary import summarise

BENCHMARK = BENCHMARKS["phantom-diagnosis"]
SHIFTS = {"A": 0.6, "B": 0.1, "scratch": 0.1, "scratch (unet3d)": 0.1, "majority": 0.0, "age+sex+volume": 0.2}
SCRATCH = {"A": "scratch", "B": "scratch (unet3d)"}


def scores() -> pd.DataFrame:
    rng, lines = np.random.default_rng(3), []
    for row, shift in SHIFTS.items():
        for k in range(40):
            target = BENCHMARK.classes[k % 2]
            p = float(np.clip(0.5 + (k % 2 - 0.5) * shift + 0.25 * rng.standard_normal(), 0.01, 0.99))
            common = {"benchmark": BENCHMARK.name, "row": row, "seed": 0, "dataset": "d", "case": f"{k}"}
            common |= {"subject": f"{k}", "metric": "probability", "target": target, "note": ""}
            lines += [{**common, "region": c, "value": v} for c, v in zip(BENCHMARK.classes, (1 - p, p), strict=True)]
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def found() -> GainTable:
    return gain_table(scores(), BENCHMARK, SCRATCH, ["majority", "age+sex+volume", "template overlap"], 400)


def test_every_run_meets_its_own_network_and_the_best_baseline(found: GainTable) -> None:
    assert [(one.run, one.scratch.row, one.baseline.row) for one in found.lines if one.baseline] == [
        ("A", "scratch", "age+sex+volume"),
        ("B", "scratch (unet3d)", "age+sex+volume"),
    ]
    first, second = found.lines
    assert first.scratch.estimate is not None
    assert first.scratch.estimate > 0.1
    assert first.scratch.p_holm is not None
    assert second.scratch.p_holm is not None
    assert first.scratch.p_holm < 0.05 < second.scratch.p_holm
    assert found.tests == 6


def test_differences_are_those_of_the_main_table_and_holm_counts_what_is_not_shown(found: GainTable) -> None:
    lines = {
        line.row: line
        for line in summarise(scores(), BENCHMARK, {}, replicates=400, first="A")
        if line.metric == "auroc"
    }
    gain = found.lines[0].scratch
    assert gain.estimate == pytest.approx(lines["scratch"].difference)
    assert gain.p == pytest.approx(lines["scratch"].p)
    assert lines["A"].p is None
    shown = [line.p for one in found.lines for line in (one.scratch, one.baseline) if line]
    assert gain.p_holm is not None
    assert gain.p_holm >= holm([p for p in shown if p is not None])[0]


def test_the_table_is_printed_and_written(found: GainTable) -> None:
    text = found.to_markdown()
    assert text.startswith("### Phantom diagnosis: what each pre-training gives")
    assert "| pre-training | from scratch | gain | p (Holm) | best baseline | gain over it | p (Holm) |" in text
    assert "Holm-corrected over 6 tests" in text
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(line["run"], line["against"]) for line in lines[:2]] == [("A", "scratch"), ("A", "age+sex+volume")]
    assert float(lines[0]["estimate"]) == found.lines[0].scratch.estimate


def test_only_tests_with_a_p_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Interval(0.1, np.nan, np.nan, 40, "no spread between subjects: no interval")
    found = iter([(nothing, float("nan"))])
    real = gains.paired_test
    monkeypatch.setattr(gains, "paired_test", lambda *given: next(found, None) or real(*given))
    table = gain_table(scores(), BENCHMARK, SCRATCH, [], 200)
    assert table.tests == 1
    assert "Holm-corrected over 1 tests" in table.to_markdown()


def test_few_subjects_are_said_to_be_few() -> None:
    some = scores()
    table = gain_table(some[some["case"].isin(["0", "1", "2", "3"])], BENCHMARK, SCRATCH, [], 200)
    assert "4 subjects are too few: no p can be below 0.12" in table.to_markdown()


def test_without_a_baseline_there_is_a_dash() -> None:
    alone = gain_table(scores(), BENCHMARK, SCRATCH, [], 200)
    assert alone.body[0][4:] == ["–", "–", "–"]
    assert alone.tests == 2
