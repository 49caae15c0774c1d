"""Which cases stand out, how far, and why in words: robust deviations within a dataset and modality.

deviation = (value - median) / (scale * small(n)). scale is the largest of

- 1.4826 times the median absolute deviation;
- the spread of what is left after a tenth of the values (at least one) is dropped at each end, as a Gaussian's standard
  deviation: what more than a tenth of a dataset does, such as a second scanner, is no outlier;
- the measure's floor: a difference too small to matter never stands out.

small(n) = 1 + 1.5/n + 320/n^3 makes up for a scale that is itself estimated from n values: with it, a Gaussian measure
exceeds OUTLIER_Z about as rarely in a dataset of 8 as in one of 1000 (fitted to a simulation that
tests/tasks/test_qc_outliers.py repeats).
Source of the score and its limit: Iglewicz and Hoaglin (1993), How to Detect and Handle Outliers, modified z-scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.special import ndtri

from models.records import LABEL
from models.store_connectomes import CONNECTOME
from tasks.qc_measures import Column, Measured

OUTLIER_Z = 3.5
FACT_Z = 5.0
"""What is no number (a missing modality, a flag) and rare in the dataset is ranked as if it deviated this far."""
COMMON = 0.9
"""Share of a dataset's cases that must have a modality, or be without a flag, for the rest to stand out."""
MIN_CASES = 8
"""Fewer values say too little about what is usual."""
MAD_TO_SD = 1.4826
USUAL = 2.0
"""Deviations around the median that are called usual."""


@dataclass(frozen=True)
class Ranking:
    """All stored cases, within each dataset those that stand out most first."""

    cases: pd.DataFrame
    """As in Measured, and: score (largest deviation on a bad side, NaN where nothing could be ranked), reasons (list of
    sentences, the strongest first), missing (list of what is usual in the dataset and not there)."""
    values: pd.DataFrame
    deviations: pd.DataFrame
    """Signed, by column as in the values; NaN where there are too few values to rank."""
    columns: dict[str, Column]
    unranked: dict[str, str] = field(default_factory=dict)
    """By dataset: a sentence that says what could not be ranked and why."""

    def of(self, dataset: str) -> pd.DataFrame:
        """Return the cases of one dataset, in order."""
        return self.cases[self.cases["dataset"] == dataset]

    @property
    def datasets(self) -> list[str]:
        """Names, sorted."""
        return sorted(self.cases["dataset"].unique())

    @property
    def outliers(self) -> pd.DataFrame:
        """The cases that stand out, of all datasets, the strangest first."""
        found = self.cases[self.cases["score"] > OUTLIER_Z]
        return found.sort_values(["score", "dataset", "case"], ascending=[False, True, True], kind="stable")


def small_sample(count: int) -> float:
    """Return by how much a deviation shrinks because the scale was estimated from few values."""
    return 1 + 1.5 / count + 320 / count**3


def robust_scale(values: np.ndarray, floor: float) -> float:
    """Return the scale of 1-D finite values, at least MIN_CASES of them, in their units."""
    ordered = np.sort(values)
    count = len(ordered)
    drop = max(1, int((1 - COMMON) * count + 1e-9))
    # Blom's (1958) approximation of a Gaussian's expected order statistic.
    expected = float(ndtri((count - drop - 0.375) / (count + 0.25)))
    spread = float(ordered[-drop - 1] - ordered[drop]) / (2 * expected)
    return max(MAD_TO_SD * float(np.median(np.abs(ordered - np.median(ordered)))), spread, floor)


def rank(measured: Measured) -> Ranking:
    """Return the cases ranked within their datasets."""
    parts, deviations, unranked = [], [], {}
    for dataset, index in measured.cases.groupby("dataset").groups.items():
        part, signed = _rank_dataset(measured.cases.loc[index], measured.values.loc[index], measured.columns)
        parts.append(part.sort_values(["score", "case"], ascending=[False, True], na_position="last", kind="stable"))
        deviations.append(signed)
        if sentence := _unranked(str(dataset), len(index), measured.values.loc[index], measured.columns):
            unranked[str(dataset)] = sentence
    cases = pd.concat(parts) if parts else measured.cases.assign(score=[], reasons=[], missing=[])
    signed = pd.concat(deviations) if deviations else measured.values
    return Ranking(cases, measured.values, signed, measured.columns, unranked)


def _rank_dataset(
    cases: pd.DataFrame, values: pd.DataFrame, columns: dict[str, Column]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the cases with score, reasons and missing, and the signed deviations."""
    signed, bad, usual = _deviations(values, columns)
    facts, missing = _rare_facts(cases), _missing(cases)
    used = [columns[name] for name in values.columns]
    numbers = values.to_numpy()
    scores, reasons = [], []
    for place, (_, case) in enumerate(cases.iterrows()):
        found = [
            (bad[place, n], _sentence(used[n], case, numbers[place, n], signed[place, n], usual[n]))
            for n in np.flatnonzero(bad[place] > OUTLIER_Z)
        ]
        found += [(FACT_Z, f"no {name}, which nearly all others have") for name in missing[place]]
        found += [(FACT_Z, f"{words} (rare in the dataset)") for words in facts[place]]
        found.sort(key=lambda reason: -reason[0])
        deviations = bad[place][np.isfinite(bad[place])]
        scores.append(max([*deviations, *(z for z, _ in found)], default=np.nan))
        reasons.append([words for _, words in found])
    ranked = cases.assign(
        score=scores,
        reasons=pd.Series(reasons, index=cases.index, dtype=object),
        missing=pd.Series(missing, index=cases.index, dtype=object),
    )
    return ranked, pd.DataFrame(signed, index=values.index, columns=values.columns)


def _deviations(
    values: pd.DataFrame, columns: dict[str, Column]
) -> tuple[np.ndarray, np.ndarray, list[tuple[float, float]]]:
    """Return signed deviations and those to the bad side, (cases, measures), and the usual values of each measure."""
    signed = np.full(values.shape, np.nan)
    bad = np.full(values.shape, np.nan)
    usual = []
    for n, name in enumerate(values.columns):
        measure = columns[name].measure
        x = values[name].to_numpy()
        x = np.log(x) if measure.by_ratio else x
        count = int(np.isfinite(x).sum())
        if count < MIN_CASES:
            usual.append((np.nan, np.nan))
            continue
        median = float(np.nanmedian(x))
        scale = robust_scale(x[np.isfinite(x)], measure.floor)
        signed[:, n] = (x - median) / (scale * small_sample(count))
        bad[:, n] = {"low": -signed[:, n], "high": signed[:, n], "either": np.abs(signed[:, n])}[measure.bad]
        ends = (median - USUAL * scale, median + USUAL * scale)
        usual.append((float(np.exp(ends[0])), float(np.exp(ends[1]))) if measure.by_ratio else ends)
    return signed, bad, usual


def _sentence(column: Column, case: pd.Series, value: float, z: float, usual: tuple[float, float]) -> str:
    words = column.words
    if column.measure.name == "flat_end":
        words += f" ({case['faces'].get(column.modality, '')} face)"
    far = f"{abs(z):.1f}" if abs(z) < 100 else "more than 100"
    side = "above" if z > 0 else "below"
    low, high = (column.show(max(end, 0) if value >= 0 and column.measure.name != "offset" else end) for end in usual)
    return f"{words} is {far} robust deviations {side} the dataset: {column.show(value)}, usually {low} to {high}"


def _missing(cases: pd.DataFrame) -> list[list[str]]:
    """Return for each case what nearly all cases of its dataset have and it has not."""
    there = [
        {*modalities, *([LABEL] if has_label else []), *([CONNECTOME] if has_connectome else [])}
        for modalities, has_label, has_connectome in zip(
            cases["modalities"], cases["has_label"], cases["has_connectome"], strict=True
        )
    ]
    if len(cases) < MIN_CASES:
        return [[] for _ in there]
    names = sorted(set().union(*there))
    usual = [name for name in names if sum(name not in one for one in there) <= _few(len(there))]
    return [[name for name in usual if name not in one] for one in there]


def _rare_facts(cases: pd.DataFrame) -> list[list[str]]:
    """Return for each case the words of its facts that few cases of the dataset share."""
    facts: Sequence[dict[str, str]] = list(cases["facts"])
    counts = Counter(kind for one in facts for kind in one)
    rare = {kind for kind, count in counts.items() if count <= _few(len(facts)) and len(facts) >= MIN_CASES}
    return [[words for kind, words in one.items() if kind in rare] for one in facts]


def _few(count: int) -> float:
    return max(1.0, (1 - COMMON) * count)


def _unranked(dataset: str, count: int, values: pd.DataFrame, columns: dict[str, Column]) -> str:
    if count < MIN_CASES:
        return f"{dataset} has {count} cases: too few to say what is usual ({MIN_CASES} are needed), so none is ranked."
    measured = {name: int(values[name].notna().sum()) for name in values.columns}
    few = sorted({columns[name].modality for name, n in measured.items() if 0 < n < MIN_CASES} - {""})
    if few:
        return f"{dataset}: too few cases have {', '.join(few)} to rank them by it ({MIN_CASES} are needed)."
    return ""
