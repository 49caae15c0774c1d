"""Test subjects that a pre-training has seen: left out of every number, with what they would have changed beside.

By id, by looks, and by crosswalks: a subject that looks like one of the pre-training (tasks.duplicates), or is called
the same person by a crosswalk (tasks.crosswalk), counts as seen.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from models.records import SelectedCase
from tasks.crosswalk import Link
from tasks.scores import ScoreError
from tasks.splits import Subject, lookalikes
from tasks.summary import PRETRAINED, Line, primary_metric, summarise
from tasks.tables import FurtherTable, cell, heading

if TYPE_CHECKING:
    from tasks.evaluation import Cohort

SAME = "the same id"
BY_CROSSWALK = "(crosswalk)"
THE, SOME = "the pre-training", "one of the pre-trainings"
"""Words for who has seen a subject."""


def find_leaks(
    pretraining: Iterable[SelectedCase], cohort: Cohort, links: Sequence[Link] = (), told: Sequence[Link] = ()
) -> dict[Subject, str]:
    """Return the test subjects of a cohort that a pre-training has seen, sorted, each with why.

    links: pairs of subjects that look like one person; told: pairs that crosswalks call one. Raises ScoreError when too
    few test subjects would be left.
    """
    why = seen_because(pretraining, links, told)
    test = {(case.dataset, case.subject) for case in cohort.of_role("test")}
    found = {subject: why[subject] for subject in sorted(test) if subject in why}
    if found:
        _check_rest(cohort, found)
    return found


def seen_because(
    pretraining: Iterable[SelectedCase], links: Sequence[Link] = (), told: Sequence[Link] = ()
) -> dict[Subject, str]:
    """Return everybody whom a pre-training was trained or validated on, and who is one person with one of them, and
    why; links and told as `find_leaks` takes them, also through others."""
    seen = {(case.dataset, case.subject) for case in pretraining if case.role != "test"}
    found = {subject: f"looks like {'/'.join(twin)}" for subject, twin in lookalikes(seen, [*links, *told]).items()}
    named = lookalikes(seen, told).items()
    found |= {subject: f"the same person as {'/'.join(twin)} {BY_CROSSWALK}" for subject, twin in named}
    return found | dict.fromkeys(seen, SAME)


def _check_rest(cohort: Cohort, leaks: Mapping[Subject, str]) -> None:
    test = cohort.of_role("test")
    kept = [case for case in test if (case.dataset, case.subject) not in leaks]
    absent = [name for name in cohort.benchmark.classes if name not in {case.target for case in kept}]
    if kept and not absent:
        return
    first = next(iter(leaks))
    left = f"no test subject of class {absent[0]!r} is left" if kept else "none is left"
    raise ScoreError(
        f"benchmark {cohort.benchmark.name!r}: {len(leaks)} test subjects were in the pre-training, first "
        f"{'/'.join(first)}, and {left} without them; pre-train again with this workspace's split, or evaluate another "
        "pre-training"
    )


def leak_note(cohort: Cohort) -> tuple[str, ...]:
    """Return the sentence of a table about the subjects that were left out; nothing without any."""
    if not cohort.leaks:
        return ()
    total = len({(case.dataset, case.subject) for case in cohort.of_role("test")})
    told = any(BY_CROSSWALK in why for why in cohort.leaks.values())
    how = "by id, by looks or by crosswalk" if told else "by id or by looks"
    return (
        f"{len(cohort.leaks)} of {total} test subjects were in {cohort.seen_by}, {how}: left out of every number here; "
        "the table of leaks has the numbers with them, its .csv names them.",
    )


class LeakTable(FurtherTable):
    """The primary score of every row without and with the test subjects that the pre-training has seen."""

    metric: str
    region: str
    lines: tuple[tuple[Line, Line], ...]
    """Without and with them."""
    leaks: tuple[tuple[str, str, str], ...]
    """Dataset, subject and why."""
    seen_by: str = THE

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        score = heading(self.metric, self.region)
        return ["row", "n", f"{score} without them", "n", f"{score} with them"]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells."""
        return [[one.row, str(one.n), cell(one), str(all_.n), cell(all_)] for one, all_ in self.lines]

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        return [
            f"{len(self.leaks)} test subjects were in {self.seen_by}, which has seen their images. The numbers without "
            "them count.",
            "Brackets: 95 % bootstrap intervals over subjects, seeds averaged.",
        ]

    def to_csv(self) -> str:
        """Return the subjects, each with why."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["dataset", "subject", "why"])
        writer.writerows(self.leaks)
        return buffer.getvalue()


def leak_table(
    cohort: Cohort, scores: pd.DataFrame, kinds: dict[str, str], replicates: int, first: str = PRETRAINED
) -> LeakTable:
    """Return the table of one benchmark from the scores of all its test subjects; first: as `summarise` takes it."""
    metric, region = primary_metric(cohort.benchmark)
    columns = []
    for frame in (cohort.without_leaks(scores), scores):
        lines = summarise(frame, cohort.benchmark, kinds, replicates=replicates, first=first)
        columns.append({x.row: x for x in lines if (x.metric, x.region) == (metric, region) and x.kind != "published"})
    pairs = tuple((line, columns[1][row]) for row, line in columns[0].items())
    leaks = tuple((dataset, subject, why) for (dataset, subject), why in cohort.leaks.items())
    title = f"{cohort.benchmark.title}: subjects that {cohort.seen_by} has seen"
    return LeakTable(title=title, metric=metric, region=region, lines=pairs, leaks=leaks, seen_by=cohort.seen_by)
