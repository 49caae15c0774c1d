"""From the long-form scores of probes to a table: fold by fold, seeds nested, tests corrected for shared folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from tasks.benchmarks import Benchmark
from tasks.fold_statistics import INTERVAL_METHOD, Floats, fold_interval, fold_test
from tasks.metrics_weighted import classification_metric
from tasks.probe_cohort import ProbeCohort
from tasks.statistics import one_subject_points
from tasks.summary import Line, corrected, primary_metric, published_lines
from tasks.tables import BenchmarkTable

COVERAGE = "In simulated cohorts of 57 to 238 subjects such intervals held the truth in 95 to 98 %"
"""Measured by studies/coverage_folds.py."""
NEIGHBOURS = ", k-NN"
"""End of the name of a row that is probed by nearest neighbours."""
Part = tuple[npt.NDArray[Any], Floats]
"""Targets (N,) of one seed on one fold, and its predictions: probabilities (N, K), or numbers (N,)."""


def fold_scores(scores: pd.DataFrame, benchmark: Benchmark, metric: str) -> Floats:
    """Return one metric of one row, (E, K): each seed on each fold; NaN where it is undefined."""
    return _metrics(fold_parts(scores, benchmark), benchmark, metric)


def fold_parts(scores: pd.DataFrame, benchmark: Benchmark) -> list[list[Part]]:
    """Return the targets and predictions of one row by seed and fold."""
    seeds, folds = sorted(scores["seed"].unique()), sorted(scores["fold"].unique())
    if benchmark.kind == "regression":
        table = scores.set_index(["seed", "fold"])[["target", "value"]].astype(np.float64)
    else:
        table = scores.pivot(index=["seed", "fold", "dataset", "case", "target"], columns="region", values="value")
        table = table[list(benchmark.classes)].reset_index(["target"]).sort_index()
        table["target"] = [benchmark.classes.index(name) for name in table["target"]]
    groups = dict(iter(table.groupby(level=["seed", "fold"])))
    return [[_part(groups[seed, fold]) for fold in folds] for seed in seeds]


def _part(table: pd.DataFrame) -> Part:
    values = table.drop(columns="target").to_numpy(dtype=np.float64)
    return table["target"].to_numpy(), values[:, 0] if values.shape[1] == 1 else values


def _metrics(parts: Sequence[Sequence[Part]], benchmark: Benchmark, metric: str) -> Floats:
    function = regression_metric if benchmark.kind == "regression" else class_metric
    return np.array([[function(metric, *part) for part in folds] for folds in parts])


def regression_metric(metric: str, target: Floats, predicted: Floats) -> float:
    """Return the mean absolute error, or Pearson's r (NaN for fewer than three cases, and where one is constant)."""
    if metric == "mae":
        return float(np.abs(target - predicted).mean())
    if len(target) < 3 or np.ptp(target) < 1e-12 or np.ptp(predicted) < 1e-9:
        return float("nan")
    return float(np.corrcoef(target, predicted)[0, 1])


def class_metric(metric: str, target: npt.NDArray[np.int64], probabilities: Floats) -> float:
    """Return a classification metric of one fold: class indices (N,), probabilities (N, K); NaN when undefined."""
    cases = np.arange(len(target))
    function = classification_metric(metric, cases, target[None], probabilities[None])
    return float(function(np.ones((1, len(target))))[0])


def summarise_probes(scores: pd.DataFrame, cohort: ProbeCohort, kinds: dict[str, str]) -> list[Line]:
    """Return the lines of one probe: every row and metric, then the published rows.

    The first row of `scores` is compared with every other one but ceilings; `kinds` maps a row to `baseline` or
    `ceiling` (others: `ours`). Without scores there is one `no data` line beside the published ones.
    """
    benchmark = cohort.benchmark
    if scores.empty:
        return [Line(benchmark=benchmark.name, row="no data", metric="", kind="no data"), *published_lines(benchmark)]
    rows = [_row(str(row), part, benchmark) for row, part in scores.groupby("row", sort=False)]
    pairs = {row.name: None if row is rows[0] else _compared(rows[0], row, benchmark) for row in rows}
    lines: list[Line] = []
    for metric in benchmark.metrics:
        column = [_line(cohort, metric, row, pairs[row.name], kinds) for row in rows]
        lines += corrected(column) if (metric, "") == primary_metric(benchmark) else column
    return [*lines, *published_lines(benchmark)]


@dataclass(frozen=True)
class _Row:
    """The predictions of one row."""

    name: str
    scores: pd.DataFrame
    parts: list[list[Part]]
    cases: frozenset[tuple[str, str]]


def _row(name: str, scores: pd.DataFrame, benchmark: Benchmark) -> _Row:
    return _Row(
        name, scores, fold_parts(scores, benchmark), frozenset(zip(scores["dataset"], scores["case"], strict=True))
    )


def _compared(first: _Row, other: _Row, benchmark: Benchmark) -> tuple[_Row, _Row]:
    """Return both rows on the cases that both have."""
    if first.cases == other.cases:
        return first, other
    common = first.cases & other.cases

    def restricted(row: _Row) -> _Row:
        pairs = zip(row.scores["dataset"], row.scores["case"], strict=True)
        return _row(row.name, row.scores[[pair in common for pair in pairs]], benchmark)

    return restricted(first), restricted(other)


def _line(
    cohort: ProbeCohort, metric: str, row: _Row, compared: tuple[_Row, _Row] | None, kinds: dict[str, str]
) -> Line:
    values = _metrics(row.parts, cohort.benchmark, metric)
    n, share = len(row.cases), cohort.test_share
    interval = fold_interval(values, share, n)
    numbers = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    if len(values) > 1:
        numbers["seed_sd"] = float(np.std(values.mean(axis=1), ddof=1))
    kind, notes = kinds.get(row.name, "ours"), [interval.note] if interval.note else []
    if compared is not None and kind != "ceiling":
        reference, own = (_metrics(one.parts, cohort.benchmark, metric) for one in compared)
        common = len(compared[0].cases)
        gap, p = fold_test(reference, own, share, common)
        numbers |= {"difference": gap.estimate, "difference_low": gap.low, "difference_high": gap.high, "p": p}
        if compared[1] is not row and (metric, "") == primary_metric(cohort.benchmark):
            notes.append(f"compared with the first row on the {common} subjects that both have")
    finite: dict[str, Any] = {name: value for name, value in numbers.items() if np.isfinite(value)}
    return Line(
        benchmark=cohort.benchmark.name, row=row.name, metric=metric, kind=kind, n=n, seeds=len(values),
        basis=cohort.benchmark.basis, note="; ".join(notes), **finite,
    )  # fmt: skip


def probe_table(
    cohort: ProbeCohort,
    scores: pd.DataFrame,
    kinds: dict[str, str],
    absent: Sequence[Line],
    notes: Sequence[str],
    provenance: Sequence[tuple[str, str]],
    date: str,
) -> BenchmarkTable:
    """Return the table of a probe; without scores it says `no data` beside the published rows."""
    statements = _statements(cohort, scores) if len(scores) else []
    return make_table(cohort, scores, kinds, absent, [*statements, *cohort.notes, *notes], provenance, date)


def make_table(
    cohort: ProbeCohort,
    scores: pd.DataFrame,
    kinds: dict[str, str],
    absent: Sequence[Line],
    notes: Sequence[str],
    provenance: Sequence[tuple[str, str]],
    date: str,
) -> BenchmarkTable:
    """Return the table of cross-validated rows with the sentences under it; `absent` rows stand before published."""
    lines = summarise_probes(scores, cohort, kinds)
    published = [line for line in lines if line.kind == "published"]
    computed = [line for line in lines if line.kind != "published"]
    return BenchmarkTable(
        benchmark=cohort.benchmark,
        lines=(*computed, *(absent if len(scores) else ()), *published),
        provenance=tuple(provenance),
        date=date,
        notes=tuple(notes),
    )


def _modality_statements(cohort: ProbeCohort) -> list[str]:
    """Return what is done with several modalities, and how many cases lack which."""
    names, present = cohort.benchmark.modalities, cohort.present
    if len(names) < 2:
        return []
    words = f"An encoder of one channel embeds {', '.join(names)} one by one; the embeddings stand side by side."
    lacking = [f"{name} {count}" for name, count in zip(names, (~present).sum(axis=0), strict=True) if count]
    if not lacking:
        return [words]
    return [
        f"{words} Cases without a modality: {', '.join(lacking)} of {len(present)}; its features are then the medians "
        "of the training folds, beside a column of 0 and 1 that says so."
    ]


def _statements(cohort: ProbeCohort, scores: pd.DataFrame) -> list[str]:
    benchmark, n = cohort.benchmark, len(cohort.cases)
    folds = int(cohort.fold.max()) + 1
    first = str(scores["row"].iloc[0])
    counts = pd.Series([case.target for case in cohort.cases]).value_counts()
    classes = ", ".join(f"{counts[name]} {name}" for name in benchmark.classes)
    worth = f"; one subject is worth {one_subject_points(n):.2f} points of an accuracy" if benchmark.classes else ""
    model = "ridge" if benchmark.kind == "regression" else "logistic regression"
    neighbours = " (rows of k-NN: by the nearest training cases, their number chosen likewise)"
    of_neighbours = neighbours if scores["row"].astype(str).str.endswith(NEIGHBOURS).any() else ""
    return [
        f"n = {n} subjects, each tested once{f' ({classes})' if classes else ''}{worth}.",
        f"Linear probe ({model}, strength by inner cross-validation){of_neighbours} of frozen features in {folds} "
        "folds by subject, stratified by target and site; one case a subject.",
        *_modality_statements(cohort),
        f"Brackets: {INTERVAL_METHOD}; they can reach beyond what the metric can be. {COVERAGE}.",
        f"p: {first} against the row, t-test over folds with the same correction, Holm-corrected over all such rows.",
    ]
