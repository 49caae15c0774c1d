"""Subjects that a pre-training has seen, in cross-validated tables: the primary score without them and with them."""

from __future__ import annotations

import pandas as pd

from tasks.fold_statistics import INTERVAL_METHOD
from tasks.leaks import SOME, LeakTable
from tasks.probe_cohort import ProbeCohort
from tasks.probe_summary import summarise_probes
from tasks.summary import Line, primary_metric


class FoldLeakTable(LeakTable):
    """The primary score of every row, cross-validated without and with the subjects that a pre-training has seen."""

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        count = f"{len(self.leaks)} subjects were in {self.seen_by}"
        if not self.lines:
            return [f"{count} and are left out. They were not scored (with_seen is off)."]
        return [
            f"{count}. The numbers without them count; with them, they are trained on and tested like everybody, in "
            "folds that move nobody else.",
            f"Brackets: {INTERVAL_METHOD}.",
        ]


def fold_leak_table(
    cohort: ProbeCohort, scores: pd.DataFrame, with_seen: pd.DataFrame, kinds: dict[str, str]
) -> FoldLeakTable:
    """Return the table of a cohort from its scores and from those of `cohort.everyone`, which may be empty; rows that
    only one of both has are not in it."""
    assert cohort.everyone is not None
    column = primary_metric(cohort.benchmark)
    first = _primary(cohort, scores, kinds, column)
    second = _primary(cohort.everyone, with_seen, kinds, column) if len(with_seen) else {}
    return FoldLeakTable(
        title=f"{cohort.benchmark.title}: subjects that {SOME} has seen",
        metric=column[0],
        region=column[1],
        lines=tuple((line, second[row]) for row, line in first.items() if row in second),
        leaks=tuple((dataset, subject, why) for (dataset, subject), why in sorted(cohort.leaks.items())),
        seen_by=SOME,
    )


def _primary(
    cohort: ProbeCohort, scores: pd.DataFrame, kinds: dict[str, str], column: tuple[str, str]
) -> dict[str, Line]:
    lines = summarise_probes(scores, cohort, kinds)
    return {x.row: x for x in lines if (x.metric, x.region) == column and x.kind != "published"}
