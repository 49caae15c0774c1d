"""What each pre-training gives: against its own network from scratch, and against the best baseline, paired by subject.

The main table compares everything with its first row. Where there are several pre-trainings, this one asks the same
question of each of them, so that a better network is not taken for a better pre-training.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from models.records import Record
from tasks.benchmarks import Benchmark
from tasks.statistics import P_METHOD, REPLICATES, Interval, draw_subjects, estimate_of, few_subjects, paired_test
from tasks.summary import Line, corrected, primary_metric, row_metrics, subjects_of
from tasks.tables import FurtherTable, cell, heading, p_text


class Gain(Record):
    """One pre-training against training from scratch and against the best baseline, by the primary metric."""

    run: str
    scratch: Line
    """`row`: from scratch; `estimate` and ends: the run minus that row."""
    baseline: Line | None = None
    """The same against the best of the baselines."""


class GainTable(FurtherTable):
    """The gains of all pre-trainings of one benchmark."""

    metric: str
    region: str
    lines: tuple[Gain, ...]
    tests: int
    """That have a p: over these Holm's correction goes."""

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        return ["pre-training", "from scratch", "gain", "p (Holm)", "best baseline", "gain over it", "p (Holm)"]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells."""
        return [[one.run, *_cells(one.scratch), *_cells(one.baseline)] for one in self.lines]

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        return [
            f"Gain: difference in {heading(self.metric, self.region)}, pre-training minus the other row, which has the "
            "same network, budget, seeds and cases where it is from scratch.",
            "Best baseline: that of the highest score on these test subjects, of simple baselines and networks from "
            "scratch that no pre-training here has.",
            f"Brackets: 95 % bootstrap intervals over subjects, seeds averaged; p: paired bootstrap{P_METHOD}, "
            f"Holm-corrected over {self.tests} tests: every pre-training against its scratch row and against every "
            "baseline.",
            *([f"{few[0].upper()}{few[1:]}."] if (few := few_subjects(self.lines[0].scratch.n)) else []),
        ]

    def to_csv(self) -> str:
        """Return a line a test that is shown, in full precision."""
        names = ("estimate", "low", "high", "p", "p_holm")
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["run", "against", "kind", "metric", "region", "n", *names])
        for one in self.lines:
            for line in (one.scratch, one.baseline):
                if line is not None:
                    common = [one.run, line.row, line.kind, line.metric, line.region, line.n]
                    writer.writerow([*common, *(getattr(line, name) for name in names)])
        return buffer.getvalue()


def _cells(line: Line | None) -> list[str]:
    return ["–", "–", "–"] if line is None else [line.row, cell(line), p_text(line.p_holm)]


def gain_table(
    scores: pd.DataFrame,
    benchmark: Benchmark,
    scratch: Mapping[str, str],
    baselines: Sequence[str],
    replicates: int = REPLICATES,
) -> GainTable:
    """Return the gains of one benchmark from its long-form scores.

    scratch: run -> its row from scratch; baselines: rows that none of the runs has as its scratch row.
    """
    column, subjects = primary_metric(benchmark), subjects_of(scores)
    weights = draw_subjects(len(subjects), replicates, 0)
    there = [row for row in dict.fromkeys([*scratch, *scratch.values(), *baselines]) if (scores["row"] == row).any()]
    metrics = {row: row_metrics(scores[scores["row"] == row], benchmark, subjects)(*column) for row in there}
    drawn = {row: metric(weights) for row, metric in metrics.items()}
    others = {run: [scratch[run], *(row for row in baselines if row in there)] for run in scratch}
    found: list[Line] = []
    for run, rows in others.items():
        for row in rows:
            gap, p = paired_test(metrics[run], metrics[row], weights, drawn[run] - drawn[row])
            found.append(_line(benchmark, row, row == scratch[run], gap, p))
    tested = iter(corrected(found))
    by_run = {run: {row: next(tested) for row in rows} for run, rows in others.items()}
    best = max(
        (row for row in baselines if row in there), default="", key=lambda row: estimate_of(metrics[row], len(subjects))
    )
    gains = tuple(Gain(run=run, scratch=by_run[run][scratch[run]], baseline=by_run[run].get(best)) for run in scratch)
    tests = sum(line.p is not None for line in found)
    title = f"{benchmark.title}: what each pre-training gives"
    return GainTable(title=title, metric=column[0], region=column[1], lines=gains, tests=tests)


def _line(benchmark: Benchmark, row: str, scratch: bool, gap: Interval, p: float) -> Line:
    metric, region = primary_metric(benchmark)
    numbers = {"estimate": gap.estimate, "low": gap.low, "high": gap.high, "p": p}
    return Line(
        benchmark=benchmark.name, row=row, metric=metric, region=region, n=gap.n,
        kind="ours" if scratch else "baseline",
        **{name: value for name, value in numbers.items() if np.isfinite(value)},
    )  # fmt: skip
