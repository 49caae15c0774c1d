"""Rows of several pre-trainings: the spread between them told from that between fine-tunings of one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from models.records import SelectedCase
from tasks.benchmarks import BENCHMARKS
from tasks.finetune import STARTS_APART
from tasks.rows import Row
from tasks.scores import RowKey, probability_scores
from tasks.seed_variance import nested_sd, seed_table
from tasks.summary import summarise

DIAGNOSIS = BENCHMARKS["phantom-diagnosis"]
N = 40


def test_the_components_are_those_that_were_drawn() -> None:
    rng = np.random.default_rng(3)
    values = 0.3 * rng.standard_normal((4000, 1)) + 0.1 * rng.standard_normal((4000, 3))
    between, within = nested_sd(values)
    assert between == pytest.approx(0.3, rel=0.05)
    assert within == pytest.approx(0.1, rel=0.05)


def test_what_cannot_be_told_apart_is_not() -> None:
    assert nested_sd(np.array([[1.0]])) == (None, None)
    assert nested_sd(np.array([[1.0, 3.0]])) == (None, pytest.approx(2**0.5))
    assert nested_sd(np.array([[1.0], [3.0]])) == (pytest.approx(2**0.5), None)
    assert nested_sd(np.array([[1.0, 9.0], [9.0, 1.0]]))[0] == 0.0, "the means do not differ"


def scores(starts: int, finetunings: int) -> pd.DataFrame:
    rng, truth = np.random.default_rng(1), np.arange(N) % 2
    cases = [
        SelectedCase(
            dataset="d", row=k, case=str(k), subject=str(k), digest="x", role="test", target=DIAGNOSIS.classes[k % 2]
        )
        for k in range(N)
    ]
    frames = []
    for row, count in (("mvp", starts), ("scratch", 1)):
        for start in range(count):
            for seed in range(finetunings):
                p = 1 / (1 + np.exp(-(start * (2 * truth - 1) + rng.normal(size=N))))
                key = RowKey(DIAGNOSIS.name, row, start * STARTS_APART + seed)
                frames.append(probability_scores(key, DIAGNOSIS, cases, np.column_stack([1 - p, p])))
    return pd.concat(frames, ignore_index=True)


def test_a_row_of_three_pretrainings_is_their_mean() -> None:
    frame = scores(3, 2)
    table = seed_table(frame, DIAGNOSIS, [Row("mvp"), Row("scratch")])
    mvp, scratch = table.lines
    assert (mvp.pretrainings, mvp.finetunings, scratch.pretrainings) == (3, 2, 1)
    assert mvp.between is not None
    assert mvp.within is not None
    assert mvp.between > mvp.within
    assert scratch.between is None
    (line,) = (
        one
        for one in summarise(frame, DIAGNOSIS, {}, replicates=200, first="mvp")[:20]
        if one.row == "mvp" and one.metric == "auroc"
    )
    assert (line.estimate, line.seeds) == (pytest.approx(mvp.mean), 6)
    text = table.to_markdown()
    assert "| mvp | 3 | 2 | " in text
    assert "| scratch | 1 | 2 | " in text
    assert "With one fine-tuning of each pre-training" not in text
    assert table.to_csv().splitlines()[0] == ("metric,region,row,pretrainings,finetunings,mean,low,high,between,within")
    alone = seed_table(scores(3, 1), DIAGNOSIS, [Row("mvp")])
    assert "With one fine-tuning of each pre-training both are one" in alone.to_markdown()
