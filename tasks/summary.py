"""From long-form scores to the lines of a table: estimate, interval, paired tests and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import Record
from tasks.benchmarks import Benchmark
from tasks.scores import ScoreError
from tasks.statistics import (
    REPLICATES,
    Floats,
    MetricFunction,
    bootstrap_interval,
    classification_metric,
    draw_subjects,
    holm,
    mean_metric,
    paired_test,
)

PRETRAINED = "pre-trained"
SCRATCH = "scratch"
MIXED = "pre-trained+mix"
"""Pre-trained, with learned templates mixed into the channels."""
MEAN = "mean"
"""Region name of the mean over regions."""


class Line(Record):
    """One number of a table. Numbers that do not exist are None, never NaN."""

    benchmark: str
    row: str
    metric: str
    region: str = ""
    kind: str = "ours"
    """`ours`, `baseline`, `ceiling`, `published` or `no data`."""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    seed_sd: float | None = None
    """Standard deviation between seeds of the metric over all subjects."""
    n: int = 0
    """Subjects."""
    seeds: int = 0
    undefined: int = 0
    """Cases (over all seeds) whose HD95 is undefined because a mask is empty."""
    difference: float | None = None
    """Pre-trained minus this row."""
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    """Corrected over all compared rows; of the primary metric alone, on which a benchmark is decided."""
    source: str = ""
    basis: str = ""
    note: str = ""


def summarise(
    scores: pd.DataFrame, benchmark: Benchmark, kinds: dict[str, str], seed: int = 0, replicates: int = REPLICATES
) -> list[Line]:
    """Return the lines of one benchmark: every row, metric and region, with the published rows at the end.

    `scores` are the long-form scores of this benchmark; `kinds` maps a row to `baseline` or `ceiling` (others: `ours`).
    Without scores the result is one `no data` line and the published ones. Raises ScoreError when rows were scored on
    different subjects, or when a score that must be finite is not.
    """
    published = _published(benchmark)
    if scores.empty:
        return [Line(benchmark=benchmark.name, row="no data", metric="", kind="no data"), *published]
    subjects = _common_subjects(scores)
    weights = draw_subjects(len(subjects), replicates, seed)
    lines: list[Line] = []
    for metric, region in _columns(benchmark):
        functions = {row: _functions(part, benchmark, metric, region, subjects) for row, part in _by_row(scores)}
        column = _lines_of_column(benchmark, metric, region, functions, weights, kinds)
        lines += _corrected(column) if (metric, region) == primary_metric(benchmark) else column
    counts = {row: _undefined(part) for row, part in _by_row(scores)}
    lines = [
        line.replace(undefined=counts[line.row].get(line.region, 0)) if line.metric == "hd95" else line
        for line in lines
    ]
    return [*lines, *published]


def _by_row(scores: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(row), part) for row, part in scores.groupby("row", sort=False)]


def _columns(benchmark: Benchmark) -> list[tuple[str, str]]:
    if benchmark.kind == "classification":
        return [(metric, "") for metric in benchmark.metrics]
    names = [region.name for region in benchmark.regions]
    names = [*names, MEAN] if len(names) > 1 else names
    return [(metric, name) for metric in benchmark.metrics for name in names]


def _common_subjects(scores: pd.DataFrame) -> list[tuple[str, str]]:
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


def _functions(
    part: pd.DataFrame, benchmark: Benchmark, metric: str, region: str, subjects: list[tuple[str, str]]
) -> _Functions:
    if benchmark.kind == "segmentation":
        values = _subject_values(part, metric, region, subjects)
        return _Functions(mean_metric(values), [mean_metric(one[None]) for one in values])
    subject, target, probabilities = _probabilities(part, benchmark, subjects)
    smallest = min(len(set(subject[own == k].tolist())) for own in target for k in range(len(benchmark.classes)))
    return _Functions(
        classification_metric(metric, subject, target, probabilities),
        [
            classification_metric(metric, subject, own[None], one[None])
            for own, one in zip(target, probabilities, strict=True)
        ],
        len(subjects) if metric == "accuracy" else smallest,
    )


def _subject_values(part: pd.DataFrame, metric: str, region: str, subjects: list[tuple[str, str]]) -> Floats:
    """Return the values (E, S): means over a subject's cases (and regions for `mean`), undefined ones left out."""
    chosen = part[part["metric"] == metric]
    if region != MEAN or MEAN in set(chosen["region"]):
        chosen = chosen[chosen["region"] == region]
    if metric != "hd95" and not np.isfinite(chosen["value"]).all():
        bad = chosen[~np.isfinite(chosen["value"])].iloc[0]
        raise ScoreError(f"row {bad['row']!r}, case {bad['case']}: {metric} is {bad['value']}; it must be finite")
    index = pd.MultiIndex.from_tuples(subjects)
    seeds = sorted(chosen["seed"].unique())
    return np.stack(
        [
            chosen[chosen["seed"] == seed].groupby(["dataset", "subject"])["value"].mean().reindex(index).to_numpy()
            for seed in seeds
        ]
    ).astype(np.float64)


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
            f"{benchmark.name}: NaN or missing probabilities in row {part['row'].iloc[0]!r}; predict again"
        )
    place = {pair: i for i, pair in enumerate(subjects)}
    subject = np.array([place[str(d), str(s)] for d, s, _ in wide.index], dtype=np.int64)
    target = np.array(
        [[benchmark.classes.index(name) for name in wide_targets[seed]] for seed in seeds], dtype=np.int64
    )
    return subject, target, stacked


def _lines_of_column(
    benchmark: Benchmark,
    metric: str,
    region: str,
    functions: dict[str, _Functions],
    weights: Floats,
    kinds: dict[str, str],
) -> list[Line]:
    lines = []
    ours = functions.get(PRETRAINED)
    for row, function in functions.items():
        interval = bootstrap_interval(function.together, weights, at_bounds=function.at_bounds)
        alone = [float(one(np.ones((1, weights.shape[1])))[0]) for one in function.each]
        values = {
            "estimate": interval.estimate, "low": interval.low, "high": interval.high,
            "seed_sd": float(np.std(alone, ddof=1)) if len(alone) > 1 else np.nan,
        }  # fmt: skip
        kind = kinds.get(row, "ours")
        if ours is not None and row != PRETRAINED and kind != "ceiling":
            gap, p = paired_test(ours.together, function.together, weights)
            values |= {"difference": gap.estimate, "difference_low": gap.low, "difference_high": gap.high, "p": p}
        finite = {name: value for name, value in values.items() if np.isfinite(value)}
        lines.append(
            Line(
                benchmark=benchmark.name, row=row, metric=metric, region=region, kind=kind,
                n=interval.n, seeds=len(alone), basis=benchmark.basis, note=interval.note, **finite,
            )
        )  # fmt: skip
    return lines


def _corrected(lines: list[Line]) -> list[Line]:
    # Once a table: statsmodels collects all garbage of the process in every call, 0.15 s beside Prefect and torch.
    adjusted = holm([np.nan if line.p is None else line.p for line in lines])
    return [
        line if np.isnan(value) else line.replace(p_holm=value) for line, value in zip(lines, adjusted, strict=True)
    ]


def _undefined(part: pd.DataFrame) -> dict[str, int]:
    missing = part[(part["metric"] == "hd95") & ~np.isfinite(part["value"])]
    counts = {str(region): int(count) for region, count in missing["region"].value_counts().items()}
    return {MEAN: sum(counts.values()), **counts}


def _published(benchmark: Benchmark) -> list[Line]:
    return [
        Line(
            benchmark=benchmark.name, row=entry.method, metric=entry.metric, region=entry.region, kind="published",
            estimate=entry.value, n=benchmark.test_subjects or 0, source=entry.source, basis=entry.basis,
        )
        for entry in benchmark.published
    ]  # fmt: skip


def primary_metric(benchmark: Benchmark) -> tuple[str, str]:
    """Return the metric and region by which rows are drawn in the forest plot: mean Dice, or AUROC."""
    if benchmark.kind == "classification":
        return ("auroc", "")
    names: Sequence[str] = [region.name for region in benchmark.regions]
    return ("dice", MEAN if len(names) > 1 else names[0])
