"""The strip chart of a dataset: one line per measure with the distribution of its deviations and the cases outside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tasks.qc_outliers import OUTLIER_Z, Ranking

REACH = 8.0
"""Deviations at the ends of the chart; what lies farther out is drawn there."""
BINS = 64
WIDTH, HEIGHT = 640.0, 20.0
"""Of one line, in pixels."""
DOTS = 24
"""Outliers of a measure that are drawn, the farthest first."""


@dataclass(frozen=True)
class Dot:
    """One case outside."""

    x: float
    words: str


@dataclass(frozen=True)
class Strip:
    """One line of the chart; x in pixels from its left end, y from its top."""

    name: str
    outline: str
    """SVG path of the distribution."""
    dots: list[Dot]
    limits: list[float]
    """x of the limits beyond which a case stands out."""


def place(deviation: float) -> float:
    """Return x of a deviation."""
    return round((min(max(deviation, -REACH), REACH) + REACH) / (2 * REACH) * WIDTH, 1)


def strips(ranking: Ranking, dataset: str) -> list[Strip]:
    """Return the lines of a dataset for every measure that could be ranked, in the order of the measures."""
    cases = ranking.of(dataset)
    deviations = ranking.deviations.loc[cases.index]
    found = []
    for name in deviations.columns:
        z = deviations[name].to_numpy()
        if np.isfinite(z).any():
            found.append(_strip(ranking, name, z, cases["case"].tolist(), cases.index.to_numpy()))
    return found


def _strip(ranking: Ranking, name: str, z: np.ndarray, cases: list[str], index: np.ndarray) -> Strip:
    column = ranking.columns[name]
    sides = {"low": [-OUTLIER_Z], "high": [OUTLIER_Z], "either": [-OUTLIER_Z, OUTLIER_Z]}[column.measure.bad]
    outside = [n for n in np.argsort(-np.abs(np.nan_to_num(z))) if any(_beyond(z[n], side) for side in sides)]
    values = ranking.values[name]
    dots = [Dot(place(z[n]), f"{cases[n]}: {column.show(float(values[index[n]]))}") for n in outside[:DOTS]]
    return Strip(column.words, _outline(z[np.isfinite(z)]), dots, [place(side) for side in sides])


def _beyond(deviation: float, side: float) -> bool:
    return bool(deviation > side if side > 0 else deviation < side)


def _outline(z: np.ndarray) -> str:
    """Return the histogram as a closed path; heights go with the root of the counts, so that few cases are seen too."""
    counts, edges = np.histogram(np.clip(z, -REACH, REACH), bins=BINS, range=(-REACH, REACH))
    heights = np.sqrt(counts / counts.max()) * (HEIGHT - 4)
    used = np.flatnonzero(counts)
    points = [f"M{place(edges[used[0]])},{HEIGHT}"]
    for n in range(used[0], used[-1] + 1):
        points.append(f"V{HEIGHT - heights[n]:.1f}H{place(edges[n + 1])}")
    return "".join([*points, f"V{HEIGHT}Z"])
