"""From long-form scores to the lines of a table: estimate, interval, paired tests, Holm's correction and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import Record
from tasks.benchmarks import Benchmark
from tasks.metrics_masks import UNDEFINED
from tasks.metrics_weighted import classification_metric, reliability
from tasks.scores import ScoreError
from tasks.statistics import (
    REPLICATES,
    Floats,
    Interval,
    MetricFunction,
    bootstrap_interval,
    draw_subjects,
    estimate_of,
    holm,
    mean_metric,
    paired_test,
    rank_rows,
)

PRETRAINED = "pre-trained"
SCRATCH = "scratch"
MIXED = "pre-trained+mix"
"""Pre-trained, with learned templates mixed into the channels."""
OTHERS = "others"
"""Kind of rows that somebody else predicted (tasks.others)."""
MEAN = "mean"
"""Region name of the mean over regions."""
BIASED = {"ece": "no interval: few cases make it too large, and drawing from them again still larger"}
"""Metrics without an interval, and why."""
UNBOUNDED = frozenset({"hd95", "hd95_pooled", "volume_error_ml", "volume_error", "false_lesions"})
"""Means of values from 0 without an upper bound: few subjects hide their tail (tasks.skewness)."""


class Line(Record):
    """One number of a table. Numbers that do not exist are None, never NaN."""

    benchmark: str
    row: str
    metric: str
    region: str = ""
    kind: str = "ours"
    """`ours`, `baseline`, `ceiling`, `others`, `published`, `absent` (no number; `note` says why) or `no data`."""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    seed_sd: float | None = None
    """Standard deviation between seeds of the metric over all subjects."""
    n: int = 0
    """Subjects."""
    seeds: int = 0
    """Trainings; 0 where they are not known."""
    undefined: int = 0
    """Cases (over all seeds) whose score is undefined because a mask is empty."""
    difference: float | None = None
    """The first row (of a single pre-training: the pre-trained one) minus this row."""
    difference_low: float | None = None
    difference_high: float | None = None
    effect: float | None = None
    """The difference in standard deviations of one subject (of a mean: Cohen's d_z)."""
    p: float | None = None
    p_holm: float | None = None
    """Corrected over all compared rows; of the primary metric alone, on which a benchmark is decided."""
    rank: float | None = None
    """Place among the rows of the table but ceilings, by the primary metric; 1 is the best."""
    rank_low: float | None = None
    rank_high: float | None = None
    """95 % of the bootstrap replicates lie between them."""
    first: float | None = None
    """Share of the replicates in which this row is the best."""
    source: str = ""
    basis: str = ""
    note: str = ""


def summarise(
    scores: pd.DataFrame,
    benchmark: Benchmark,
    kinds: dict[str, str],
    seed: int = 0,
    replicates: int = REPLICATES,
    first: str = PRETRAINED,
) -> list[Line]:
    """Return the lines of one benchmark: every row, metric and region, with the published rows at the end.

    `scores` are the long-form scores of this benchmark; `kinds` maps a row to `baseline`, `ceiling` or `others` (the
    rest: `ours`); `first` is the row that all the rest are compared with.
    Without scores the result is one `no data` line and the published ones. Raises ScoreError when rows were scored on
    different subjects, or when a score that must be finite is not.
    """
    published = published_lines(benchmark)
    if scores.empty:
        return [Line(benchmark=benchmark.name, row="no data", metric="", kind="no data"), *published]
    subjects = subjects_of(scores)
    weights = draw_subjects(len(subjects), replicates, seed)
    lines: list[Line] = []
    readers = {row: _reader(part, benchmark, subjects) for row, part in _by_row(scores)}
    for metric, region in _columns(benchmark):
        functions = {row: read(metric, region) for row, read in readers.items()}
        column = _lines_of_column(benchmark, metric, region, functions, weights, kinds, first)
        if (metric, region) == primary_metric(benchmark):
            column = _ranked(corrected(column), functions, weights)
        lines += column
    counts = {row: _undefined(part) for row, part in _by_row(scores)}
    lines = [line.replace(undefined=counts[line.row].get((line.metric, line.region), 0)) for line in lines]
    return [*lines, *published]


def _by_row(scores: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(row), part) for row, part in scores.groupby("row", sort=False)]


def _columns(benchmark: Benchmark) -> list[tuple[str, str]]:
    if benchmark.kind == "classification":
        return [(metric, "") for metric in benchmark.metrics]
    names = [region.name for region in benchmark.regions]
    names = [*names, MEAN] if len(names) > 1 else names
    return [(metric, name) for metric in benchmark.metrics for name in names]


def subjects_of(scores: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the (dataset, subject) pairs; every row and seed must have been scored on the same cases."""
    found: dict[tuple[str, int], frozenset[tuple[str, str, str]]] = {}
    for key, part in scores.groupby(["row", "seed"]):
        row, seed = cast("tuple[str, int]", key)
        found[str(row), int(seed)] = frozenset(
            zip(part["dataset"].astype(str), part["subject"].astype(str), part["case"].astype(str), strict=True)
        )
    (first_key, first), *others = found.items()
    for other_key, cases in others:
        if odd := first ^ cases:
            raise ScoreError(
                f"rows {first_key} and {other_key} were scored on different cases ({len(first)} and {len(cases)}, e.g. "
                f"{sorted(odd)[0]}); a comparison needs the same test set: score both again"
            )
    return sorted({(dataset, subject) for dataset, subject, _ in first})


@dataclass(frozen=True)
class _Functions:
    """A metric of one row over subjects: seeds together, and one by one."""

    together: MetricFunction
    each: list[MetricFunction]
    at_bounds: int = 0
    """Subjects that an exact bound counts: those of the smallest class; 0 where there is none."""


def row_metrics(
    part: pd.DataFrame, benchmark: Benchmark, subjects: list[tuple[str, str]]
) -> Callable[[str, str], MetricFunction]:
    """Return (metric, region) -> the metric of one row over subjects, seeds averaged; part: the scores of these."""
    read = _reader(part, benchmark, subjects)
    return lambda metric, region: read(metric, region).together


Reader = Callable[[str, str], _Functions]
"""Metric and region -> what a row scores."""


def _reader(part: pd.DataFrame, benchmark: Benchmark, subjects: list[tuple[str, str]]) -> Reader:
    """Return how the scores of one row are read; what all its metrics share is gathered once."""
    if benchmark.kind == "segmentation":
        values = _subject_values(part, subjects)
        return lambda metric, region: _of_values(values(metric, region))
    subject, target, probabilities = _probabilities(part, benchmark, subjects)
    smallest = min(len(set(subject[own == k].tolist())) for own in target for k in range(len(benchmark.classes)))

    def read(metric: str, _: str) -> _Functions:
        each = [
            classification_metric(metric, subject, own[None], one[None])
            for own, one in zip(target, probabilities, strict=True)
        ]
        together = classification_metric(metric, subject, target, probabilities)
        return _Functions(together, each, len(subjects) if metric == "accuracy" else smallest)

    return read


def _of_values(values: Floats) -> _Functions:
    return _Functions(mean_metric(values), [mean_metric(one[None]) for one in values])


def _subject_values(part: pd.DataFrame, subjects: list[tuple[str, str]]) -> Callable[[str, str], Floats]:
    """Return metric and region -> values (E, S): means over a subject's cases (and regions for `mean`).

    Undefined values are left out; NaN where nothing is left.
    """
    bad = part[~np.isfinite(part["value"]) & ~part["metric"].isin(UNDEFINED)]
    if len(bad):
        first = bad.iloc[0]
        raise ScoreError(
            f"row {first['row']!r}, case {first['case']}: {first['metric']} is {first['value']}; it must be finite"
        )
    seeds = sorted(part["seed"].unique())
    index = pd.MultiIndex.from_tuples([(seed, *pair) for seed in seeds for pair in subjects])
    keys = ["seed", "dataset", "subject", "metric"]
    whole = part.groupby(keys)["value"].mean().unstack("metric").reindex(index)
    by_region = part.groupby([*keys, "region"])["value"].mean().unstack(["metric", "region"]).reindex(index)

    def read(metric: str, region: str) -> Floats:
        if metric not in whole:
            raise ScoreError(f"row {part['row'].iloc[0]!r} has no score of {metric}; score it again")
        column = whole[metric] if region == MEAN else by_region[metric, region]
        return column.to_numpy(dtype=np.float64).reshape(len(seeds), len(subjects))

    return read


def _probabilities(
    part: pd.DataFrame, benchmark: Benchmark, subjects: list[tuple[str, str]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """Return the subject index (N,), target index (E, N) and probabilities (E, N, K) of a row's cases.

    Seeds have targets of their own where a negative control shuffles them.
    """
    part = part[part["metric"] == "probability"]
    wide = part.pivot(index=["dataset", "subject", "case"], columns=["seed", "region"], values="value").sort_index()
    targets = part.drop_duplicates(["dataset", "subject", "case", "seed"])
    wide_targets = targets.pivot(index=["dataset", "subject", "case"], columns="seed", values="target").sort_index()
    seeds = sorted(part["seed"].unique())
    stacked = np.stack([wide[seed].reindex(columns=list(benchmark.classes)).to_numpy() for seed in seeds])
    if not np.isfinite(stacked).all():
        raise ScoreError(
            f"{benchmark.name}: NaN or missing probabilities in row {part['row'].iloc[0]!r}; delete its files in the "
            "workspace's folder `scores` and run the flow again"
        )
    place = {pair: i for i, pair in enumerate(subjects)}
    subject = np.array([place[str(d), str(s)] for d, s, _ in wide.index], dtype=np.int64)
    target = np.array(
        [[benchmark.classes.index(name) for name in wide_targets[seed]] for seed in seeds], dtype=np.int64
    )
    return subject, target, stacked


def reliability_curves(scores: pd.DataFrame, benchmark: Benchmark) -> pd.DataFrame:
    """Return the reliability curve of every row and seed of a classification: row, seed and `reliability`'s columns."""
    subjects = subjects_of(scores)
    found = []
    for row, part in _by_row(scores):
        _, target, probabilities = _probabilities(part, benchmark, subjects)
        for seed, own, one in zip(sorted(part["seed"].unique()), target, probabilities, strict=True):
            found.append(reliability(own, one).assign(row=row, seed=int(seed)))
    curves = pd.concat(found, ignore_index=True)
    return curves[["row", "seed", *(name for name in curves.columns if name not in ("row", "seed"))]]


def _lines_of_column(
    benchmark: Benchmark,
    metric: str,
    region: str,
    functions: dict[str, _Functions],
    weights: Floats,
    kinds: dict[str, str],
    first: str,
) -> list[Line]:
    lines, n = [], weights.shape[1]
    ours = functions.get(first)
    drawn = {} if metric in BIASED else {row: function.together(weights) for row, function in functions.items()}
    for row, function in functions.items():
        if metric in BIASED:
            interval = Interval(estimate_of(function.together, n), np.nan, np.nan, n, BIASED[metric])
        else:
            interval = _interval(metric, function, weights, drawn[row])
        alone = [estimate_of(one, n) for one in function.each]
        values = {
            "estimate": interval.estimate, "low": interval.low, "high": interval.high,
            "seed_sd": float(np.std(alone, ddof=1)) if len(alone) > 1 else np.nan,
        }  # fmt: skip
        kind = kinds.get(row, "ours")
        if ours is not None and row != first and kind != "ceiling" and metric not in BIASED:
            gap, p = paired_test(
                ours.together, function.together, weights, drawn[first] - drawn[row], metric in UNBOUNDED
            )
            values |= {"difference": gap.estimate, "difference_low": gap.low, "difference_high": gap.high, "p": p}
            values["effect"] = gap.standardised
        finite = {name: value for name, value in values.items() if np.isfinite(value)}
        lines.append(
            Line(
                benchmark=benchmark.name, row=row, metric=metric, region=region, kind=kind,
                n=interval.n, seeds=0 if kind == OTHERS else len(alone), basis=benchmark.basis, note=interval.note,
                **finite,
            )
        )  # fmt: skip
    return lines


def _interval(metric: str, function: _Functions, weights: Floats, drawn: Floats) -> Interval:
    unbounded = metric in UNBOUNDED
    found = bootstrap_interval(
        function.together, weights, at_bounds=function.at_bounds, replicates=drawn, unbounded=unbounded
    )
    return replace(found, low=float(np.maximum(found.low, 0))) if unbounded else found


def corrected(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with Holm's correction over all of them that have a p."""
    # Once a table: statsmodels collects all garbage of the process in every call, 0.15 s beside Prefect and torch.
    adjusted = holm([np.nan if line.p is None else line.p for line in lines])
    return [
        line if np.isnan(value) else line.replace(p_holm=value) for line, value in zip(lines, adjusted, strict=True)
    ]


def _ranked(column: list[Line], functions: dict[str, _Functions], weights: Floats) -> list[Line]:
    """Return the lines of the primary metric with the ranks of all rows but ceilings; of one row there is none."""
    rows = [line.row for line in column if line.kind != "ceiling"]
    if len(rows) < 2:
        return column
    ranks = dict(zip(rows, rank_rows([functions[row].together for row in rows], weights), strict=True))
    return [
        line.replace(rank=rank.place, rank_low=rank.low, rank_high=rank.high, first=rank.first)
        if (rank := ranks.get(line.row)) and np.isfinite(rank.place)
        else line
        for line in column
    ]


def _undefined(part: pd.DataFrame) -> dict[tuple[str, str], int]:
    """Return how many scores are undefined, by metric and region; a mean over regions counts all of them."""
    missing = part[part["metric"].isin(UNDEFINED) & ~np.isfinite(part["value"])]
    by_region = {
        (str(metric), str(region)): len(some) for (metric, region), some in missing.groupby(["metric", "region"])
    }
    totals = {(str(metric), MEAN): len(some) for metric, some in missing.groupby("metric")}
    return {**totals, **by_region}


def published_lines(benchmark: Benchmark) -> list[Line]:
    """Return a line for every published number of a benchmark."""
    return [
        Line(
            benchmark=benchmark.name, row=entry.method, metric=entry.metric, region=entry.region, kind="published",
            estimate=entry.value, n=benchmark.test_subjects or 0, source=entry.source, basis=entry.basis,
        )
        for entry in benchmark.published
    ]  # fmt: skip


def primary_metric(benchmark: Benchmark) -> tuple[str, str]:
    """Return the metric and region on which a benchmark is decided: mean Dice, AUROC; of probes, prompts the first."""
    if benchmark.protocol != "fine-tune":
        return (benchmark.metrics[0], "")
    if benchmark.kind == "classification":
        return ("auroc", "")
    names: Sequence[str] = [region.name for region in benchmark.regions]
    return ("dice", MEAN if len(names) > 1 else names[0])
