"""Confusion matrices of classifications: who was called what, seed by seed and summed, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from tasks.benchmarks import Benchmark
from tasks.figures import STYLE, png_of
from tasks.report import Picture, TableSection
from tasks.scores import ScoreError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Counts = npt.NDArray[np.int64]
"""(K, K): cases of the class of each line that were called the class of each column."""
SUM = "all"
"""In the column `seed`: the sum over seeds."""
SHOWN = 8
"""Rows that a picture shows; the file has all."""
CLASSES_MAX = 10
"""Of a picture whose numbers can be read."""
PANELS = 4
"""Matrices beside each other."""
LETTERS = 14
"""Of a title, to an inch of its panel."""


def confusion_counts(scores: pd.DataFrame, benchmark: Benchmark) -> pd.DataFrame:
    """Return the counts of every row and seed: row, seed (its number, or `all`), target, predicted, cases.

    `scores` are the long-form scores of one classification; cross-validated cases count once, over all folds. The
    predicted class is the most probable one, of equally probable ones the first in the benchmark's order, as for the
    accuracy. Every pair of classes has a line. Raises ScoreError for a missing or infinite probability.
    """
    names = list(benchmark.classes)
    part = scores[scores["metric"] == "probability"]
    keys = ["row", "seed", "dataset", "case", "target"]
    wide = part.pivot(index=keys, columns="region", values="value").reindex(columns=names)
    values = wide.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        bad = wide.index[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
        raise ScoreError(
            f"{benchmark.name}: row {bad[0]!r}, seed {bad[1]}, case {bad[3]}: a class has no finite probability; "
            "delete its file in the workspace's folder `scores` and run the flow again"
        )
    lines = wide.index.to_frame(index=False)[["row", "seed", "target"]]
    lines = lines.assign(predicted=[names[k] for k in values.argmax(axis=1)])
    found = []
    for row in part["row"].unique():
        own = lines[lines["row"] == row]
        seeds = {str(seed): own[own["seed"] == seed] for seed in sorted(own["seed"].unique())}
        found += [_counted(str(row), seed, some, names) for seed, some in {**seeds, SUM: own}.items()]
    return pd.concat(found, ignore_index=True)


def _counted(row: str, seed: str, lines: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    pairs = pd.MultiIndex.from_product([names, names], names=["target", "predicted"])
    cases = lines.groupby(["target", "predicted"]).size().reindex(pairs, fill_value=0)
    table = cases.rename("cases").reset_index()
    return table.assign(row=row, seed=seed)[["row", "seed", "target", "predicted", "cases"]]


def matrix_of(counts: pd.DataFrame, row: str, classes: Sequence[str], seed: str = SUM) -> Counts:
    """Return the matrix (K, K) of one row and seed: lines are true classes, columns predicted ones."""
    own = counts[(counts["row"] == row) & (counts["seed"] == seed)]
    wide = own.pivot(index="target", columns="predicted", values="cases")
    return wide.loc[list(classes), list(classes)].to_numpy(dtype=np.int64)


def with_confusion(section: TableSection, scores: pd.DataFrame) -> TableSection:
    """Return the section of a classification with its confusion matrices; of another kind, as it is."""
    benchmark = section.table.benchmark
    if benchmark.kind != "classification" or not section.table.has_scores:
        return section
    counts = confusion_counts(scores, benchmark)
    if len(benchmark.classes) > CLASSES_MAX:
        return replace(section, confusion=counts)
    rows = list(counts["row"].unique())
    matrices = {f"{row}{_seeds_text(counts, row)}": matrix_of(counts, row, benchmark.classes) for row in rows[:SHOWN]}
    png = confusion_figure(matrices, benchmark.classes, f"{benchmark.title}: who was called what")
    more = f"; {len(rows) - SHOWN} more rows are in the file" if len(rows) > SHOWN else ""
    words = (
        "Test cases by true class (lines) and most probable class (columns), summed over seeds; shade: share of the "
        f"true class{more}"
    )
    picture = Picture(png, f"confusion matrices of {benchmark.title}", words)
    return replace(section, pictures=[*section.pictures, picture], confusion=counts)


def _seeds_text(counts: pd.DataFrame, row: str) -> str:
    """Return what a row's title adds where not every row has one seed: sums of more of them are larger."""
    seeds = counts[counts["seed"] != SUM].groupby("row")["seed"].nunique()
    return "" if seeds.max() == 1 else f" ({seeds[row]} {'seed' if seeds[row] == 1 else 'seeds, summed'})"


def confusion_figure(matrices: Mapping[str, Counts], classes: Sequence[str], title: str) -> bytes:
    """Return the matrices (K, K) of some rows as a PNG; raises ValueError when there are none."""
    if not matrices:
        raise ValueError(f"confusion matrices {title!r}: no row to draw")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Without more padding the words below a panel touch the title of the next one.
    layout = ConstrainedLayoutEngine(h_pad=0.14)
    across, down = min(len(matrices), PANELS), -(-len(matrices) // PANELS)
    edge = 1.5 + 0.35 * len(classes)
    with rc_context(STYLE):
        figure = Figure(figsize=(edge * across + 1, (edge + 0.4) * down + 0.3), layout=layout)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.ravel()[len(matrices) :]:
            axes.set_axis_off()
        for axes, (name, counts) in zip(grid.ravel(), matrices.items(), strict=False):
            _draw(axes, counts, classes, fill(name, int(LETTERS * edge)))
        for axes in grid[:, 0]:
            axes.set_ylabel("true")
        return png_of(figure)


def _draw(axes: Axes, counts: Counts, classes: Sequence[str], name: str) -> None:
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(places, classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_title(name, fontsize=8.5, loc="left")
    for line in places:
        for column in places:
            shade = "white" if share[line, column] > 0.55 else "black"
            axes.text(column, line, str(counts[line, column]), ha="center", va="center", color=shade, fontsize=8)
