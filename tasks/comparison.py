"""What changed between two sets of scores: every row that both have, its primary metric before and after, with a test.

Fixed test sets: the paired bootstrap over the subjects that both scored. Cross-validated scores: the corrected test
over folds, where both used the same folds. Holm's correction spans all rows that are compared. Seeds are averaged
first, so a row's spread between seeds is part of neither; docs/metrics.md says what the intervals mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from models.records import Record
from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.evaluation import NATIVE
from tasks.fold_statistics import fold_test
from tasks.label_efficiency import LABELS
from tasks.probe_summary import fold_scores
from tasks.probe_tasks import PROBES
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.scores import COLUMNS
from tasks.statistics import REPLICATES, Interval, draw_subjects, estimate_of, holm, paired_test
from tasks.summary import primary_metric, row_metrics
from tasks.tables import heading, markdown_rows, number, p_text

FILES = ("scores.parquet", "probes/scores.parquet", "prompts/scores.parquet")
"""Of a workspace, that may hold scores."""
LEVEL = 0.05
"""Of Holm's p, below which a change is called one."""
LOWER_IS_BETTER = frozenset({"mae", "hd95", "brier", "ece"})
Key = tuple[str, str]
"""Benchmark and row."""

Verdict = Literal["better", "worse", "no evidence of a change", "equal", "not comparable"]


class ComparisonError(ValueError):
    """Scores that cannot be compared: no file, or nothing in common."""


class Change(Record):
    """One row of one benchmark before and after, by its primary metric."""

    benchmark: str
    row: str
    metric: str
    region: str = ""
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    """After minus before, on what both scored."""
    low: float | None = None
    high: float | None = None
    n: int = 0
    """Subjects that both scored."""
    p: float | None = None
    p_holm: float | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """What the numbers say."""
        if self.difference is None or self.p_holm is None:
            return "not comparable"
        if self.difference == 0 and self.p_holm == 1:
            return "equal"
        if self.p_holm >= LEVEL:
            return "no evidence of a change"
        return "better" if (self.difference > 0) != (self.metric in LOWER_IS_BETTER) else "worse"


class Comparison(Record):
    """All rows of two sets of scores."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    """`benchmark: row`."""
    only_after: tuple[str, ...]

    def to_markdown(self) -> str:
        """Return the table with what it means."""
        header = ["benchmark", "row", "metric", "n", "before", "after", "after - before", "p (Holm)", "verdict"]
        body = [
            [
                change.benchmark, change.row, heading(change.metric, change.region), str(change.n),
                number(change.before, change.metric), number(change.after, change.metric), _difference(change),
                p_text(change.p_holm), f"{change.verdict}{f' ({change.note})' if change.note else ''}",
            ]
            for change in self.changes
        ]  # fmt: skip
        named = [
            f"- only {when}: {', '.join(rows)}"
            for when, rows in (("before", self.only_before), ("after", self.only_after))
            if rows
        ]
        return "\n".join([*markdown_rows(header, body), "", *named, *(f"- {text}" for text in STATEMENTS)]) + "\n"


STATEMENTS = (
    "Each row's primary metric, seeds averaged, on the subjects that both sets of scores have.",
    "Brackets: 95 % intervals of the difference; p: paired bootstrap over subjects (fixed test sets) or corrected "
    "t-test over folds (cross-validation), Holm-corrected over all rows of this table.",
    "That there is no evidence of a change does not mean that nothing changed.",
)


def _difference(change: Change) -> str:
    if change.difference is None:
        return "–"
    ends = [number(end, change.metric) for end in (change.low, change.high)]
    return f"{number(change.difference, change.metric)} [{', '.join(ends)}]"


def read_scores(place: Path) -> pd.DataFrame:
    """Return the long-form scores of a file, or of all files of a workspace; raises ComparisonError for none."""
    paths = [place] if place.is_file() else [place / name for name in FILES if (place / name).is_file()]
    if not paths:
        raise ComparisonError(
            f"{place} holds no scores: name a scores.parquet, or a workspace with one of {', '.join(FILES)}"
        )
    return pd.concat([_read(path) for path in paths], ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise ComparisonError(f"{path} is no readable Parquet file: {error}") from None
    if absent := [name for name in COLUMNS if name not in table]:
        raise ComparisonError(
            f"{path} is no table of scores: it has no column {', '.join(map(repr, absent))}; name a scores.parquet "
            "that evaluate, probe or prompt wrote"
        )
    return table


def compare_scores(before: pd.DataFrame, after: pd.DataFrame, replicates: int = REPLICATES) -> Comparison:
    """Compare two sets of long-form scores row by row; raises ComparisonError when they have no row in common."""
    first, second = _by_row(before), _by_row(after)
    common = [key for key in first if key in second]
    if not common:
        held = [", ".join(_labels(parts)) for parts in (first, second)]
        raise ComparisonError(
            f"the two have no row in common: before {held[0]}; after {held[1]}; compare scores of the same benchmarks"
        )
    changes = [_change(*key, first[key], second[key], replicates) for key in common]
    adjusted = holm([np.nan if change.p is None else change.p for change in changes])
    return Comparison(
        changes=tuple(
            change.replace(p_holm=None if np.isnan(p) else p) for change, p in zip(changes, adjusted, strict=True)
        ),
        only_before=tuple(_labels(key for key in first if key not in second)),
        only_after=tuple(_labels(key for key in second if key not in first)),
    )


def _by_row(scores: pd.DataFrame) -> Mapping[Key, pd.DataFrame]:
    """Return the scores of each (benchmark, row), in their order."""
    keys = scores[["benchmark", "row"]].drop_duplicates().itertuples(index=False, name=None)
    return {
        (str(benchmark), str(row)): scores[(scores["benchmark"] == benchmark) & (scores["row"] == row)]
        for benchmark, row in keys
    }


def _labels(keys: Iterable[Key]) -> list[str]:
    return [f"{benchmark}: {row}" for benchmark, row in keys]


def find_registered(name: str) -> Benchmark | None:
    """Return the registered benchmark, probe or prompting task behind a name in the scores; None for another one."""
    plain = name.removesuffix(NATIVE).split(LABELS)[0]
    registries = (BENCHMARKS, PROBES, PROMPT_TASKS)
    found = next((registry[plain] for registry in registries if plain in registry), None)
    return None if found is None else found.replace(name=name)


def _change(name: str, row: str, before: pd.DataFrame, after: pd.DataFrame, replicates: int) -> Change:
    benchmark = find_registered(name)
    if benchmark is None:
        return Change(benchmark=name, row=row, metric="", note="not registered here")
    metric, region = primary_metric(benchmark)
    known = {"benchmark": name, "row": row, "metric": metric, "region": region}
    folded = ["fold" in part and part["fold"].notna().all() for part in (before, after)]
    if any(folded):
        return _over_folds(benchmark, before, after, known) if all(folded) else Change(**known, note="other protocol")
    return _over_subjects(benchmark, before, after, known, replicates)


def _over_subjects(
    benchmark: Benchmark, before: pd.DataFrame, after: pd.DataFrame, known: dict[str, str], replicates: int
) -> Change:
    both = sorted(set(_subjects(before)) & set(_subjects(after)))
    if not both:
        return Change(**known, note="no subject in common")
    parts = [part[[pair in set(both) for pair in _subjects(part)]] for part in (before, after)]
    old, new = (row_metrics(part, benchmark, both)(known["metric"], known["region"]) for part in parts)
    gap, p = paired_test(new, old, draw_subjects(len(both), replicates))
    note = "" if len(both) == len({*_subjects(before), *_subjects(after)}) else "other test subjects are left out"
    return _filled(known, estimate_of(old, len(both)), estimate_of(new, len(both)), gap, p, len(both), note)


def _subjects(part: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(part["dataset"].astype(str), part["subject"].astype(str), strict=True))


def _over_folds(benchmark: Benchmark, before: pd.DataFrame, after: pd.DataFrame, known: dict[str, str]) -> Change:
    old, new = (fold_scores(part, benchmark, known["metric"]) for part in (before, after))
    folds = [dict(zip(_subjects(part), part["fold"], strict=True)) for part in (before, after)]
    if folds[0] != folds[1]:
        return Change(**known, before=_finite(old.mean()), after=_finite(new.mean()), note="other folds or subjects")
    sizes = np.unique(list(folds[0].values()), return_counts=True)[1]
    n = int(sizes.sum())
    gap, p = fold_test(new, old, float(sizes.mean() / (n - sizes.mean())), n)
    return _filled(known, float(old.mean()), float(new.mean()), gap, p, n, "")


def _filled(known: dict[str, str], before: float, after: float, gap: Interval, p: float, n: int, note: str) -> Change:
    numbers = {"before": before, "after": after, "difference": gap.estimate, "low": gap.low, "high": gap.high, "p": p}
    words = "; ".join(text for text in (note, gap.note) if text)
    return Change(**known, n=n, note=words, **{name: _finite(value) for name, value in numbers.items()})


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
