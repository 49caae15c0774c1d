"""What fewer labels cost: a benchmark's rows trained again on a share of its training subjects.

Every row has as many optimiser steps as with all labels, so a smaller share means more epochs. Which subjects a share
holds is drawn anew for each seed, by class, and smaller shares are parts of larger ones. Validation and test subjects
stay as they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from models.records import Record
from tasks.benchmarks import Benchmark
from tasks.cohort import fewer_labels
from tasks.statistics import holm
from tasks.summary import PRETRAINED, SCRATCH, Line, primary_metric, summarise
from tasks.tables import FurtherTable, cell, heading, p_text

if TYPE_CHECKING:
    from tasks.evaluation import Cohort

LABELS = "-labels"
"""Stands between the name of a benchmark and the per cent of its labels."""


def of_share(benchmark: Benchmark, share: float) -> Benchmark:
    """Return the benchmark under the name of a share of its labels; published numbers are not beside it."""
    if share == 1:
        return benchmark
    percent = f"{100 * share:g}"
    title = f"{benchmark.title}, {percent} % of the labels"
    return benchmark.replace(name=f"{benchmark.name}{LABELS}{percent}", title=title, published=())


def share_cohort(cohort: Cohort, share: float) -> Cohort:
    """Return the cohort whose trainings see a share of the labels; the test subjects are the same."""
    return replace(cohort, benchmark=of_share(cohort.benchmark, share))


class LabelPoint(Record):
    """The primary score of one row at one share of the labels."""

    share: float
    subjects: int
    """Training subjects of the first seed."""
    line: Line


class LabelTable(FurtherTable):
    """A benchmark's primary score by share of the training labels."""

    metric: str
    region: str
    points: tuple[LabelPoint, ...]
    first: str = PRETRAINED
    """The row that the others are compared with."""

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        score = heading(self.metric, self.region)
        return ["labels", "training subjects", "row", score, f"{self.first} - row", "p (Holm)"]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells."""
        return [
            [
                f"{100 * point.share:g} %",
                str(point.subjects),
                point.line.row,
                cell(point.line),
                cell(_difference(point.line)),
                p_text(point.line.p_holm),
            ]
            for point in self.points
        ]

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        corrected = "the shares" if len(self.curves()) < 3 else "shares and rows"
        return [
            "Trained on a share of the training subjects, drawn by class and anew for each seed, smaller shares inside "
            "larger ones; every row with as many optimiser steps as with all labels. Validation and test subjects are "
            "the same for all.",
            "Brackets: 95 % bootstrap intervals over test subjects, seeds averaged; p: paired bootstrap, "
            f"Holm-corrected over {corrected}.",
        ]

    def curves(self) -> dict[str, list[tuple[float, Line]]]:
        """Return the points of each row by share."""
        rows = dict.fromkeys(point.line.row for point in self.points)
        return {row: [(point.share, point.line) for point in self.points if point.line.row == row] for row in rows}

    def to_csv(self) -> str:
        """Return a line a point in full precision."""
        names = ("estimate", "low", "high", "seed_sd", "difference", "difference_low", "difference_high", "p", "p_holm")
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["share", "subjects", "row", "metric", "region", "n", *names])
        for point in self.points:
            line = point.line
            common = [point.share, point.subjects, line.row, line.metric, line.region, line.n]
            writer.writerow([*common, *(getattr(line, name) for name in names)])
        return buffer.getvalue()


def _difference(line: Line) -> Line:
    """Return a line's difference to the first row as a line to be printed."""
    ends = {"low": line.difference_low, "high": line.difference_high}
    return line.replace(estimate=line.difference, seed_sd=None, **ends)


def label_table(
    cohort: Cohort, scores: Mapping[float, pd.DataFrame], replicates: int, rows: Sequence[str] = (PRETRAINED, SCRATCH)
) -> LabelTable:
    """Return the table of one benchmark; scores: long form by share; rows: those shown, the first compared with all."""
    benchmark = cohort.benchmark
    column, points = primary_metric(benchmark), []
    for share, frame in sorted(scores.items()):
        shown = frame[frame["row"].isin(rows)]
        lines = summarise(shown, of_share(benchmark, share), {}, replicates=replicates, first=rows[0])
        subjects = training_subjects(cohort, share)
        points += [
            LabelPoint(share=share, subjects=subjects, line=line)
            for line in lines
            if (line.metric, line.region) == column and line.kind == "ours"
        ]
    adjusted = holm([np.nan if point.line.p is None else point.line.p for point in points])
    found = [
        point.replace(line=point.line.replace(p_holm=None if np.isnan(p) else p))
        for point, p in zip(points, adjusted, strict=True)
    ]
    title = f"{benchmark.title} with fewer labels"
    return LabelTable(title=title, metric=column[0], region=column[1], points=tuple(found), first=rows[0])


def training_subjects(cohort: Cohort, share: float, seed: int = 0) -> int:
    """Return how many subjects a training of one seed sees at a share of the labels."""
    kept = fewer_labels(cohort.of_seed(seed).selected, share, seed)
    return len({(case.dataset, case.subject) for case in kept if case.role == "train"})


def check_shares(shares: Sequence[float]) -> None:
    """Raise ValueError unless shares lie between 0 and 1, both left out, each once."""
    if bad := [share for share in shares if not 0 < share < 1]:
        raise ValueError(f"label shares lie between 0 and 1, got {bad[0]:g}; all labels are always trained on")
    if len(set(shares)) < len(shares):
        raise ValueError(f"label shares are given once each, got {', '.join(f'{share:g}' for share in shares)}")
