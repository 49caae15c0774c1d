"""From the long-form scores of probes to a table: fold by fold, seeds nested, tests corrected for shared folds."""

from __future__ import annotations

from collections.abc import Sequence
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


def fold_scores(scores: pd.DataFrame, benchmark: Benchmark, metric: str) -> Floats:
    """Return one metric of one row, (E, K): each seed on each fold; NaN where it is undefined."""
    seeds = sorted(scores["seed"].unique())
    folds = sorted(scores["fold"].unique())
    groups = scores.groupby(["seed", "fold"])
    return np.array([[_metric(groups.get_group((seed, fold)), benchmark, metric) for fold in folds] for seed in seeds])


def _metric(part: pd.DataFrame, benchmark: Benchmark, metric: str) -> float:
    if benchmark.kind == "regression":
        target, value = (part[name].to_numpy(dtype=np.float64) for name in ("target", "value"))
        return regression_metric(metric, target, value)
    wide = part.pivot(index=["dataset", "case"], columns="region", values="value")[list(benchmark.classes)]
    targets = part.drop_duplicates(["dataset", "case"]).set_index(["dataset", "case"])["target"].reindex(wide.index)
    indices = np.array([benchmark.classes.index(name) for name in targets], dtype=np.int64)
    return class_metric(metric, indices, wide.to_numpy())


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
    rows = {str(row): part for row, part in scores.groupby("row", sort=False)}
    lines: list[Line] = []
    for metric in benchmark.metrics:
        values = {row: fold_scores(part, benchmark, metric) for row, part in rows.items()}
        reference = next(iter(values.values()))
        column = [_line(cohort, metric, row, own, reference, kinds) for row, own in values.items()]
        lines += corrected(column) if (metric, "") == primary_metric(benchmark) else column
    return [*lines, *published_lines(benchmark)]


def _line(cohort: ProbeCohort, metric: str, row: str, values: Floats, reference: Floats, kinds: dict[str, str]) -> Line:
    n, share = len(cohort.cases), cohort.test_share
    interval = fold_interval(values, share, n)
    numbers = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    if len(values) > 1:
        numbers["seed_sd"] = float(np.std(values.mean(axis=1), ddof=1))
    kind = kinds.get(row, "ours")
    if values is not reference and kind != "ceiling":
        gap, p = fold_test(reference, values, share, n)
        numbers |= {"difference": gap.estimate, "difference_low": gap.low, "difference_high": gap.high, "p": p}
    finite: dict[str, Any] = {name: value for name, value in numbers.items() if np.isfinite(value)}
    return Line(
        benchmark=cohort.benchmark.name, row=row, metric=metric, kind=kind, n=n, seeds=len(values),
        basis=cohort.benchmark.basis, note=interval.note, **finite,
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
    lines = summarise_probes(scores, cohort, kinds)
    published = [line for line in lines if line.kind == "published"]
    computed = [line for line in lines if line.kind != "published"]
    return BenchmarkTable(
        benchmark=cohort.benchmark,
        lines=(*computed, *(absent if len(scores) else ()), *published),
        provenance=tuple(provenance),
        date=date,
        notes=(*(_statements(cohort, scores) if len(scores) else ()), *cohort.notes, *notes),
    )


def _statements(cohort: ProbeCohort, scores: pd.DataFrame) -> list[str]:
    benchmark, n = cohort.benchmark, len(cohort.cases)
    folds = int(cohort.fold.max()) + 1
    first = str(scores["row"].iloc[0])
    counts = pd.Series([case.target for case in cohort.cases]).value_counts()
    classes = ", ".join(f"{counts[name]} {name}" for name in benchmark.classes)
    worth = f"; one subject is worth {one_subject_points(n):.2f} points of an accuracy" if benchmark.classes else ""
    model = "ridge" if benchmark.kind == "regression" else "logistic regression"
    return [
        f"n = {n} subjects, each tested once{f' ({classes})' if classes else ''}{worth}.",
        f"Linear probe ({model}, strength by inner cross-validation) of frozen features in {folds} folds by subject, "
        "stratified by target and site; one case a subject.",
        f"Brackets: {INTERVAL_METHOD}; they can reach beyond what the metric can be.",
        f"p: {first} against the row, t-test over folds with the same correction, Holm-corrected over all such rows.",
    ]
