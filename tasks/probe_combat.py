"""The table of probes after ComBat: beside the ordinary numbers, out of every ranking and test."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from models.records import Record
from tasks.combat import SITE_MIN, fitted_sites
from tasks.fold_statistics import INTERVAL_METHOD, Floats, fold_interval, fold_test
from tasks.probe_cohort import ProbeCohort
from tasks.probe_scans import acquisition_of, kept_covariates
from tasks.probe_summary import fold_scores
from tasks.probes import held_out
from tasks.probing import DESCRIPTORS, EncoderRow, FeatureRow
from tasks.statistics import Interval
from tasks.summary import Line
from tasks.tables import FurtherTable, cell, heading

COMBAT = ", ComBat"
"""End of the name under which a row is scored after ComBat."""


class Harmonised(Record):
    """One metric of one row without ComBat and after it."""

    without: Line
    after: Line
    change: Line
    """After minus without, on the same folds."""


class CombatTable(FurtherTable):
    """Every metric of every row of image features, without ComBat and after it."""

    lines: tuple[Harmonised, ...]
    words: tuple[str, ...]
    """On sites, covariates and chance."""
    target: str = ""
    """Of the probe. The site itself is what ComBat is told."""

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        return ["row", "n", "metric", "without ComBat", "after ComBat", "change"]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells."""
        return [
            [one.without.row, str(one.without.n), heading(one.without.metric, ""), *map(cell, _three(one))]
            for one in self.lines
        ]

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        return [
            "Shown beside the table above and mixed into nothing: these numbers have no rank, no p, and no part in its "
            "correction or in a leaderboard.",
            "ComBat (Johnson 2007, Fortin 2018; parametric empirical Bayes) brings the frozen features of all sites to "
            "one location and scale. Its parameters are fitted on the training folds alone and applied to the test "
            "fold; it has to know where a test subject was scanned"
            + ("." if self.target == "site" else ", and never sees a target."),
            *self.words,
            f"Brackets: {INTERVAL_METHOD}. Change: after minus without, on the same folds, not corrected for how many "
            "rows there are.",
        ]

    def to_csv(self) -> str:
        """Return a line a row and metric, in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        parts = [f"{which}_{end}" for which in Harmonised.model_fields for end in ("estimate", "low", "high")]
        writer.writerow(["row", "metric", "n", *parts])
        for one in self.lines:
            numbers = [value for line in _three(one) for value in (line.estimate, line.low, line.high)]
            writer.writerow([one.without.row, one.without.metric, one.without.n, *numbers])
        return buffer.getvalue()


def _three(one: Harmonised) -> tuple[Line, Line, Line]:
    return one.without, one.after, one.change


class Twins(NamedTuple):
    """The rows whose features are harmonised, under names of their own."""

    encoders: list[EncoderRow]
    features: list[FeatureRow]


def combat_twins(rows: Sequence[EncoderRow], simple: Sequence[FeatureRow]) -> Twins:
    """Return a twin of every row that is probed after ComBat: all encoders, and raw descriptors."""
    descriptors = [row for row in simple if row.features is not None and row.name.startswith(DESCRIPTORS)]
    return Twins(
        [replace(row, name=f"{row.name}{COMBAT}", combat=True) for row in rows],
        [replace(row, name=f"{row.name}{COMBAT}", combat=True) for row in descriptors],
    )


def without_combat(cohort: ProbeCohort) -> str:
    """Return why a cohort cannot be harmonised: fewer than two sites to fit in some fold; empty when it can."""
    sites = acquisition_of(cohort).sites
    if len(known := sorted(set(sites) - {""})) < 2:
        return f"No table after ComBat: it needs two sites, known here is {known[0] if known else 'none'}."
    for fold, (train, _) in enumerate(held_out(cohort.fold)):
        if len(there := fitted_sites([sites[case] for case in train])) < 2:
            return (
                f"No table after ComBat: it needs two sites with {SITE_MIN} training subjects each; without fold "
                f"{fold} there is {there[0] if there else 'none'}."
            )
    return ""


def combat_table(cohort: ProbeCohort, scores: pd.DataFrame, after: pd.DataFrame) -> CombatTable:
    """Return the table of a cohort from its scores and from those of its twins (`combat_twins`)."""
    found = []
    for name, part in after.groupby("row", sort=False):
        row = str(name).removesuffix(COMBAT)
        own = scores[scores["row"] == row]
        for metric in cohort.benchmark.metrics:
            pair = [fold_scores(one, cohort.benchmark, metric) for one in (own, part)]
            found.append(_harmonised(cohort, row, metric, *pair))
    title = f"{cohort.benchmark.title}: after ComBat"
    return CombatTable(title=title, lines=tuple(found), words=tuple(_words(cohort)), target=cohort.benchmark.target)


def _harmonised(cohort: ProbeCohort, row: str, metric: str, without: Floats, after: Floats) -> Harmonised:
    share, n = cohort.test_share, len(cohort.cases)

    def line(interval: Interval) -> Line:
        numbers = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
        finite = {name: value for name, value in numbers.items() if np.isfinite(value)}
        return Line(benchmark=cohort.benchmark.name, row=row, metric=metric, n=n, note=interval.note, **finite)

    change, _ = fold_test(after, without, share, n)
    ends = [line(fold_interval(values, share, n)) for values in (without, after)]
    return Harmonised(without=ends[0], after=ends[1], change=line(change))


def _words(cohort: ProbeCohort) -> list[str]:
    sites, names = acquisition_of(cohort).sites, list(kept_covariates(cohort))
    known = set(sites) - {""}
    alone = 0
    for train, test in held_out(cohort.fold):
        fitted = fitted_sites([sites[case] for case in train])
        alone += sum(sites[case] not in fitted for case in test)
    kept = f"Kept in the features: {' and '.join(names)}, where known, else their mean" if names else "Nothing is kept"
    words = [
        f"Sites: {len(known)}. {kept}; the target is no covariate, so where it differs between sites ComBat takes part "
        "of it away.",
    ]
    if alone:
        words.append(
            f"Left as they are: {alone} of {len(sites)} test subjects, whose site is not known or has fewer than "
            f"{SITE_MIN} training subjects."
        )
    if cohort.benchmark.target == "site":
        words.append(
            f"The lower, the less of the sites is left; chance is {1 / len(cohort.benchmark.classes):.3f}. Training "
            "sites are made alike exactly, test folds are not, so a linear probe can fall below chance."
        )
    return words
