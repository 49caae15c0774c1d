"""The leaderboard: rows by their mean place over the benchmarks that all of them have, and how stable that is."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from models.records import Record, digest_of
from tasks.benchmarks import Benchmark
from tasks.splits import Subject
from tasks.statistics import REPLICATES, Floats, draw_subjects, places_of, ranks_of
from tasks.summary import OTHERS, primary_metric, row_metrics, subjects_of
from tasks.tables import FurtherTable, heading, others_name, others_told

NAME = "leaderboard"
"""Of its files beside the tables, and of its artifact."""
PLACE_MIN = 2
"""Benchmarks, rows, and subjects of a benchmark, without which there is nothing to order."""


class Standing(Record):
    """One row."""

    row: str
    place: float
    """Mean place over the benchmarks; 1 is the best."""
    low: float
    high: float
    """95 % of the replicates lie between them."""
    first: float
    """Share of the replicates in which its mean place is the best, ties shared."""
    places: tuple[float, ...]
    """On each benchmark."""


class Leaderboard(FurtherTable):
    """Mean places of rows over benchmarks, best first."""

    benchmarks: tuple[str, ...]
    """Title, metric and n of each."""
    lines: tuple[Standing, ...]
    others: tuple[str, ...] = ()
    """Rows that some of the benchmarks lack."""
    predicted: tuple[str, ...] = ()
    """Rows that are predictions of others."""

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        return ["row", "mean place", "95 %", "first", *self.benchmarks]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells."""
        return [
            [
                others_name(x.row) if x.row in self.predicted else x.row,
                f"{x.place:.2f}",
                f"{x.low:.2f} to {x.high:.2f}",
                f"{100 * x.first:.0f} %",
                *(f"{k:g}" for k in x.places),
            ]
            for x in self.lines
        ]

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        found = [
            f"Rows are ordered by their mean place over {len(self.benchmarks)} benchmarks, all of which count alike; "
            "ties share the mean of their places. Controls do not count.",
            "95 %: of the mean place over bootstrap replicates, in which test subjects of every benchmark are drawn "
            "(the same ones where benchmarks share their subjects); first: how often a row is the best.",
            "A place says who is ahead and not by how much: the differences and their tests stand in the tables.",
        ]
        found += [f"Not on every benchmark: {', '.join(self.others)}."] if self.others else []
        return [*found, *others_told(self.predicted)]

    def to_csv(self) -> str:
        """Return a line a row in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["row", "mean_place", "low", "high", "first", *self.benchmarks, "kind"])
        for x in self.lines:
            kind = OTHERS if x.row in self.predicted else ""
            writer.writerow([x.row, x.place, x.low, x.high, x.first, *x.places, kind])
        return buffer.getvalue()


def leaderboard(
    scores: pd.DataFrame, benchmarks: Sequence[Benchmark], kinds: Mapping[str, str], replicates: int = REPLICATES
) -> Leaderboard | None:
    """Return the leaderboard of fixed test sets from long-form scores; None without two rows that share two benchmarks.

    Benchmarks without scores or with one test subject do not count, nor do controls and ceilings (`kinds`: row ->
    `ceiling`, or `others`, which is marked). None where no order is defined: a row without the metric in any of the
    benchmarks. Every benchmark is ranked by its primary metric, of which more is better. Source: mean ranks over tasks
    with bootstrap samples of the test cases, Wiesenfarth et al., Scientific Reports 11 (2021) 2369 (challengeR).
    """
    found = {one: scores[scores["benchmark"] == one.name] for one in benchmarks if not one.control and len(scores)}
    found = {one: part for one, part in found.items() if _count(part) >= PLACE_MIN}
    named = [[row for row in part["row"].unique() if kinds.get(row) != "ceiling"] for part in found.values()]
    rows = [row for row in named[0] if all(row in some for some in named)] if named else []
    if min(len(rows), len(found)) < PLACE_MIN:
        return None
    each = [_places(part[part["row"].isin(rows)], one, rows, replicates) for one, part in found.items()]
    ranks = ranks_of(np.mean(each, axis=0))
    lines = [
        Standing(row=row, place=r.place, low=r.low, high=r.high, first=r.first, places=tuple(k[0, n] for k in each))
        for n, (row, r) in enumerate(zip(rows, ranks, strict=True))
        if np.isfinite(r.place)
    ]
    if not lines:
        return None
    return Leaderboard(
        title="Leaderboard",
        benchmarks=tuple(_column(one, part) for one, part in found.items()),
        lines=tuple(sorted(lines, key=lambda line: line.place)),
        others=tuple(dict.fromkeys(row for some in named for row in some if row not in rows)),
        predicted=tuple(dict.fromkeys(row for some in named for row in some if kinds.get(row) == OTHERS)),
    )


def _column(benchmark: Benchmark, scores: pd.DataFrame) -> str:
    return f"{benchmark.title}: {heading(*primary_metric(benchmark))} (n = {_count(scores)})"


def _count(scores: pd.DataFrame) -> int:
    """Return the number of subjects."""
    return len(scores.drop_duplicates(["dataset", "subject"]))


def _places(scores: pd.DataFrame, benchmark: Benchmark, rows: Sequence[str], replicates: int) -> Floats:
    """Return the places (1 + B, R) of rows on one benchmark."""
    subjects = subjects_of(scores)
    weights = draw_subjects(len(subjects), replicates, _seed(subjects))
    column = primary_metric(benchmark)
    metrics = [row_metrics(scores[scores["row"] == row], benchmark, subjects)(*column) for row in rows]
    return places_of(metrics, weights)


def _seed(subjects: Sequence[Subject]) -> int:
    """Return the seed of the draws: benchmarks of the same subjects share it, others are drawn by themselves."""
    return int(digest_of([list(pair) for pair in subjects])[:8], 16)
