"""Rows of several pre-trainings of one kind: how far their scores differ between pre-trainings and fine-tunings.

Every pre-training of a row is fine-tuned from the same number of seeds, and the row's score is the mean over all of
them. Fine-tunings are nested in pre-trainings, so that their variances are told apart by a nested analysis of variance;
neither is the variance between subjects, over which the intervals of the main table go.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np
import pandas as pd

from models.records import Record
from tasks.benchmarks import Benchmark
from tasks.finetune import STARTS_APART
from tasks.rows import Row
from tasks.statistics import Floats, estimate_of
from tasks.summary import primary_metric, row_metrics, subjects_of
from tasks.tables import FurtherTable, heading


class Spread(Record):
    """A row's primary score over its pre-trainings and fine-tunings, over all subjects."""

    row: str
    pretrainings: int
    """Starts of the row; 1 for a single pre-training, and from scratch."""
    finetunings: int
    """Of each start."""
    mean: float
    low: float
    high: float
    """The smallest and the largest of the starts, each averaged over its fine-tunings."""
    between: float | None = None
    """Standard deviation between pre-trainings, without what fine-tunings add; None: a single one."""
    within: float | None = None
    """Standard deviation between fine-tunings of one start; None: a single one of each."""


def nested_sd(values: Floats) -> tuple[float | None, float | None]:
    """Return the standard deviations between groups and within them, of values (groups, members) as balanced as that.

    Method of moments: within^2 is the mean variance of the groups, between^2 the variance of their means less
    within^2 / members, at least 0. With one member each the first holds both. None where there is one group, or one
    member. Source: Searle, Casella, McCulloch, Variance Components (1992), section 3.5.
    """
    groups, members = values.shape
    within = float(values.var(axis=1, ddof=1).mean()) if members > 1 else None
    if groups < 2:
        return None, None if within is None else within**0.5
    between = float(values.mean(axis=1).var(ddof=1)) - (within or 0.0) / members
    return max(0.0, between) ** 0.5, None if within is None else within**0.5


class SeedTable(FurtherTable):
    """The rows of one benchmark by how far their trainings differ."""

    metric: str
    region: str
    lines: tuple[Spread, ...]

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        score = heading(self.metric, self.region)
        starts = "means of the pre-trainings"
        return ["row", "pre-trainings", "fine-tunings of each", score, starts, "SD between", "SD within"]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells."""
        return [
            [
                one.row,
                str(one.pretrainings),
                str(one.finetunings),
                f"{one.mean:.3f}",
                f"{one.low:.3f} to {one.high:.3f}" if one.pretrainings > 1 else "–",
                _number(one.between),
                _number(one.within),
            ]
            for one in self.lines
        ]

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        confounded = any(one.between is not None and one.finetunings == 1 for one in self.lines)
        return [
            "A row of several pre-trainings is the mean over all of them, each fine-tuned from the same seeds.",
            "SD between: standard deviation between pre-trainings, without what fine-tunings add; SD within: between "
            "fine-tunings of one pre-training (nested analysis of variance, over all test subjects).",
            *(
                ["With one fine-tuning of each pre-training both are one: SD between holds the two."]
                if confounded
                else []
            ),
            "Neither is part of the intervals of the main table, which go over test subjects: they hold for these "
            "trainings.",
        ]

    def to_csv(self) -> str:
        """Return a line a row in full precision."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["metric", "region", *Spread.model_fields], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"metric": self.metric, "region": self.region, **one.model_dump()} for one in self.lines)
        return buffer.getvalue()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def seed_table(scores: pd.DataFrame, benchmark: Benchmark, rows: Sequence[Row]) -> SeedTable:
    """Return the table of the trained rows of one benchmark, from its long-form scores without leaks."""
    metric, region = primary_metric(benchmark)
    subjects = subjects_of(scores)
    title = f"{benchmark.title}: how far pre-trainings and fine-tunings differ"
    lines = tuple(_spread(scores[scores["row"] == row.name], benchmark, subjects, row) for row in rows)
    return SeedTable(title=title, metric=metric, region=region, lines=lines)


def _spread(part: pd.DataFrame, benchmark: Benchmark, subjects: list[tuple[str, str]], row: Row) -> Spread:
    found: dict[int, list[float]] = {}
    for seed, own in part.groupby("seed", sort=True):
        metric = row_metrics(own, benchmark, subjects)(*primary_metric(benchmark))
        found.setdefault(int(str(seed)) // STARTS_APART, []).append(estimate_of(metric, len(subjects)))
    values = np.array(list(found.values()), dtype=np.float64)
    means = values.mean(axis=1)
    between, within = nested_sd(values)
    return Spread(
        row=row.name,
        pretrainings=len(values),
        finetunings=values.shape[1],
        mean=float(means.mean()),
        low=float(means.min()),
        high=float(means.max()),
        between=between,
        within=within,
    )
