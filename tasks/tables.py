"""Benchmark tables as Markdown, CSV and LaTeX (booktabs), each saying n, interval, budget and how sure it is.

The digest of a table covers its content and not the date on which it was written.
"""

from __future__ import annotations

import csv
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from models.records import Record, digest_of
from tasks.benchmarks import LESION_METRICS, SEGMENTATION_METRICS, Benchmark
from tasks.dataset_cards import whereabouts
from tasks.latex import Tabular, floats, tabulars
from tasks.markdown_text import cell_text
from tasks.statistics import INTERVAL_METHOD, P_METHOD, UNBOUNDED_METHOD, few_subjects, one_subject_points
from tasks.summary import MEAN, OTHERS, PRETRAINED, UNBOUNDED, Line, primary_metric

METRIC_NAMES: dict[str, str] = {
    "dice": "Dice",
    "hd95": "HD95",
    "hd95_pooled": "pooled HD95",
    "nsd": "NSD",
    "volume_error_ml": "volume error",
    "volume_error": "relative volume error",
    "lesion_dice": "lesion Dice",
    "lesion_f1": "lesion F1",
    "lesion_sensitivity": "lesion sensitivity",
    "false_lesions": "false lesions",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "f1": "macro F1",
    "auprc": "AUPRC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier score",
    "ece": "ECE",
    "mae": "MAE",
    "r": "r",
}
UNITS: dict[str, str] = {"hd95": "mm", "hd95_pooled": "mm", "volume_error_ml": "ml", "mae": "years"}
"""Of metrics that are no shares, counts or correlations."""
DECIMALS: dict[str, int] = {
    "hd95": 1, "hd95_pooled": 1, "volume_error_ml": 2, "false_lesions": 2, "mae": 2, "effect": 2,
}  # fmt: skip
"""Printed, where not three."""
DISTANCE_COVERAGE = "in simulated test sets of 20 to 238 subjects they held the truth in 94 to 97 %"
"""Measured by studies/coverage.py, distances log-normal or gamma."""
FURTHER: tuple[frozenset[str], ...] = (
    *(frozenset({metric}) for metric in (*SEGMENTATION_METRICS[1:], *LESION_METRICS)),
    frozenset({"auprc", "sensitivity", "specificity", "brier", "ece"}),
)
"""Metrics that have a grid of their own below the first, which holds all others: a page has a width."""
SHORT = frozenset(
    {"dice", "hd95", "nsd", "lesion_f1", "accuracy", "balanced_accuracy", "auroc", "f1", "brier", "mae", "r"}
)
"""Metrics that a Prefect table artifact shows; the files have all."""


class BenchmarkTable(Record):
    """Everything that one printed table shows."""

    benchmark: Benchmark
    lines: tuple[Line, ...]
    budget: str = ""
    """Same for every trained row."""
    provenance: tuple[tuple[str, str], ...] = ()
    """Name and digest of what it was made from."""
    date: str = ""
    """ISO date of writing; not part of the digest."""
    notes: tuple[str, ...] = ()
    first: str = Field(PRETRAINED, exclude_if=lambda value: value == PRETRAINED)
    """The row that all others are compared with. The only one that there was before is left out of digests."""

    @property
    def digest(self) -> str:
        """SHA-256 of the content without the date; floats are rounded to 9 digits."""
        content = self.model_dump(mode="json", exclude={"date"})
        return digest_of(_rounded(content))

    @property
    def has_scores(self) -> bool:
        """Whether any number of ours is in it."""
        return any(line.kind not in {"no data", "published", "absent"} for line in self.lines)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 9)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def columns_of(table: BenchmarkTable) -> list[tuple[str, str]]:
    """Return the (metric, region) columns in order: those of the benchmark, then any that only published rows have."""
    found: list[tuple[str, str]] = []
    for line in table.lines:
        if line.metric and (line.metric, line.region) not in found:
            found.append((line.metric, line.region))
    order = {metric: k for k, metric in enumerate(METRIC_NAMES)}
    return sorted(found, key=lambda column: (order.get(column[0], 99), column[1] != MEAN))


def heading(metric: str, region: str) -> str:
    """Return the words above a column, e.g. `Dice ET` or `mean Dice`."""
    name = METRIC_NAMES.get(metric, metric)
    unit = f" ({UNITS[metric]})" if metric in UNITS else ""
    return (f"mean {name}" if region == MEAN else f"{name} {region}".strip()) + unit


def number(value: float | None, metric: str) -> str:
    """Return a value as printed: three decimals for shares, fewer for mm and years, an en dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:z.{DECIMALS.get(metric, 3)}f}"


def cell(line: Line | None) -> str:
    """Return estimate and interval of a line as printed, e.g. `0.712 [0.650, 0.771]`."""
    if line is None or line.estimate is None:
        return "–"
    if line.kind == "published":
        return number(line.estimate, line.metric)
    if line.low is None or line.high is None:
        return f"{number(line.estimate, line.metric)} [no interval]"
    return f"{number(line.estimate, line.metric)} [{number(line.low, line.metric)}, {number(line.high, line.metric)}]"


def p_text(p: float | None) -> str:
    """Return a p-value as printed."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _rows(table: BenchmarkTable) -> list[tuple[tuple[str, str, str], list[Line]]]:
    """Return (row, kind, source) with its lines; published rows of one method but another source stay apart."""
    grouped: dict[tuple[str, str, str], list[Line]] = {}
    for line in table.lines:
        if line.kind != "no data":
            grouped.setdefault((line.row, line.kind, line.source), []).append(line)
    return list(grouped.items())


@dataclass(frozen=True)
class Grid:
    """Printed cells: every one is a string, no NaN can appear."""

    header: list[str]
    rows: list[list[str]]
    kinds: list[str]
    """Of each row, as in its lines; `no data` without any."""


def grids(table: BenchmarkTable, basis: bool = True) -> list[Grid]:
    """Return the table in parts that fit a page: the first with the tests and all rows, then those of FURTHER.

    Rows without a number are left out of the further ones. basis: a last column of the first grid says how sure a
    published number is; without it the name of its row does.
    """
    columns = columns_of(table)
    further = frozenset().union(*FURTHER)
    found = [_with_tests(table, _grid(table, [column for column in columns if column[0] not in further], basis), basis)]
    for metrics in FURTHER:
        full = _grid(table, [column for column in columns if column[0] in metrics], basis)
        kept = [k for k, row in enumerate(full.rows) if any(text != "–" for text in row[3:])]
        if kept:
            found.append(Grid(full.header, [full.rows[k] for k in kept], [full.kinds[k] for k in kept]))
    return found


def _grid(table: BenchmarkTable, columns: Sequence[tuple[str, str]], basis: bool) -> Grid:
    header = ["row", "n", "seeds", *(heading(*column) for column in columns)]
    rows: list[list[str]] = [] if table.has_scores else [["no data", *(["–"] * (len(header) - 1))]]
    kinds = [] if table.has_scores else ["no data"]
    for (row, kind, _), lines in _rows(table):
        by_column = {(line.metric, line.region): line for line in lines}
        seeds = str(lines[0].seeds) if lines[0].seeds else "–"
        cells = [cell(by_column.get(column)) for column in columns]
        rows.append([_printed_name(row, kind, lines[0], basis), str(lines[0].n or "–"), seeds, *cells])
        kinds.append(kind)
    return Grid(header, rows, kinds)


def _with_tests(table: BenchmarkTable, grid: Grid, basis: bool) -> Grid:
    """Return a grid of all rows with the columns of the paired tests of the primary metric, and of the basis."""
    main = primary_metric(table.benchmark)
    compared = any(line.difference is not None for line in table.lines)
    effects = any(line.effect is not None for line in table.lines)
    words = [f"difference in {heading(*main)}"] if compared else []
    words += ["effect"] if effects else []
    words += [f"p (Holm), {heading(*main)}", *(["basis"] if basis else [])]
    found = [] if table.has_scores else [[*(["–"] * (len(words) - basis)), *([table.benchmark.basis] if basis else [])]]
    for _, lines in _rows(table):
        test = next((line for line in lines if (line.metric, line.region) == main), None)
        cells = [_difference(test)] if compared else []
        cells += [number(test.effect if test else None, "effect")] if effects else []
        cells += [p_text(test.p_holm if test else None), *([lines[0].basis or "–"] if basis else [])]
        found.append(cells)
    return Grid([*grid.header, *words], [a + b for a, b in zip(grid.rows, found, strict=True)], grid.kinds)


def _difference(line: Line | None) -> str:
    if line is None or line.difference is None:
        return "–"
    return cell(line.replace(estimate=line.difference, low=line.difference_low, high=line.difference_high))


def _printed_name(row: str, kind: str, line: Line, basis: bool) -> str:
    if kind == "published":
        return f"{row} (published{'' if basis else f', {line.basis}'}: {line.source})"
    if kind == OTHERS:
        return others_name(row)
    return f"{row} ({line.note})" if kind == "absent" else row


def others_name(row: str) -> str:
    """Return what tables call a row of predictions of others."""
    return f"{row} (predictions of others)"


def others_told(rows: Sequence[str]) -> list[str]:
    """Return the sentence of a table over several benchmarks on such rows; nothing without any."""
    if not rows:
        return []
    return [
        f"Predictions of others: {', '.join(rows)}. How and on whom their networks were trained is not known here: "
        "test subjects may be among their training data, and one name may stand for another network on each benchmark."
    ]


def statements(table: BenchmarkTable) -> list[str]:
    """Return the sentences under a table: n, worth of a subject, interval, tests, budget, undefined scores, basis."""
    found = [f"Basis of the protocol: {table.benchmark.basis}."]
    if table.benchmark.note:
        found.append(f"About the data: {table.benchmark.note}.")
    if not table.has_scores:
        found += whereabouts(table.benchmark)
    if table.has_scores and table.benchmark.protocol != "fine-tune":
        found += [*_seed_statements(table), *_interval_statements(table)]
    elif table.has_scores:
        n = max(line.n for line in table.lines if line.kind != "published")
        found += [
            f"n = {n} test subjects; one subject is worth {one_subject_points(n):.2f} points of a mean or an accuracy.",
            f"Brackets: {INTERVAL_METHOD}.",
            f"Difference: {table.first} minus the row; effect: the difference in standard deviations of one subject "
            "(of a mean, Cohen's d_z).",
            f"p: paired bootstrap of {table.first} against the row, over subjects{P_METHOD}, "
            "Holm-corrected over all such rows.",
            *([f"{few[0].upper()}{few[1:]}."] if (few := few_subjects(n)) else []),
            f"Budget of every trained row: {table.budget or 'none trained'}.",
            *_rank_statements(table),
            *_seed_statements(table),
            *_rules(table.benchmark),
            *_undefined_statements(table),
            *_interval_statements(table),
        ]
    if any(line.kind == "published" for line in table.lines):
        found.append("Published rows are other people's numbers on their own splits: shown, never tested against.")
    found += [f"Published, no score of one model: {claim}." for claim in table.benchmark.claims]
    if table.benchmark.control:
        meaning = {
            "positive": "Positive control: a strong effect that must be found.",
            "negative": "Negative control: labels shuffled anew for every seed, so AUROC intervals should contain 0.5; "
            "of 20 rows one misses it by chance.",
        }
        found.append(meaning[table.benchmark.control])
    return [*found, *table.notes]


def _rank_statements(table: BenchmarkTable) -> list[str]:
    """Return how stable the order of the rows is."""
    places = [
        f"{line.row} {line.rank:g} [{line.rank_low:g}, {line.rank_high:g}] ({100 * (line.first or 0):.0f} %)"
        for line in table.lines
        if line.rank is not None
    ]
    words = (
        f"Rank by {heading(*primary_metric(table.benchmark))}, its 95 % over drawn subjects, and how often it is first"
    )
    return [f"{words}: {', '.join(places)}."] if places else []


def _rules(benchmark: Benchmark) -> list[str]:
    """Return the rules without which the numbers of a segmentation cannot be read."""
    if benchmark.kind != "segmentation":
        return []
    found = [
        "Two empty masks count 1 for Dice, NSD and lesion scores, one empty mask 0; HD95, relative volume error and "
        "lesion sensitivity are undefined where a mask that they need is empty.",
        f"NSD: surfaces at most {benchmark.surface_tolerance_mm:g} mm apart agree.",
        *_unbounded_rules(benchmark),
    ]
    if rule := benchmark.lesions:
        found.append(
            f"Lesions: 26 neighbours; true ones that touch after {rule.dilation} steps of dilation are one; true ones "
            f"of at most {rule.min_volume_mm3:g} mm³ do not count, false ones always do."
        )
    return found


def _unbounded_rules(benchmark: Benchmark) -> list[str]:
    """Return how the intervals of metrics without an upper bound are made."""
    named = [METRIC_NAMES[metric] for metric in benchmark.metrics if metric in UNBOUNDED]
    return [f"Brackets of {', '.join(named)}: {UNBOUNDED_METHOD}; {DISTANCE_COVERAGE}."] if named else []


def _undefined_statements(table: BenchmarkTable) -> list[str]:
    """Return how many scores are undefined; metrics with the same counts share a sentence."""
    counts: dict[str, list[str]] = {}
    for line in table.lines:
        if line.undefined and line.region != MEAN:
            counts.setdefault(METRIC_NAMES[line.metric], []).append(f"{line.row} {line.region} {line.undefined}")
    metrics: dict[str, list[str]] = {}
    for name, cases in counts.items():
        metrics.setdefault(", ".join(cases), []).append(name)
    return [
        f"Undefined and left out of means, counted over all seeds: {', '.join(names)}: {cases}."
        for cases, names in metrics.items()
    ]


def _interval_statements(table: BenchmarkTable) -> list[str]:
    """Return one sentence a note, naming the rows and columns that it is about."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in table.lines:
        if line.note and line.kind != "absent":
            found.setdefault(line.note, {}).setdefault(line.row, []).append(heading(line.metric, line.region))
    about = {
        note: "; ".join(f"{row} ({', '.join(names)})" for row, names in rows.items()) for note, rows in found.items()
    }
    return [f"{note[0].upper()}{note[1:]}: {about[note]}." for note in sorted(about)]


def _seed_statements(table: BenchmarkTable) -> list[str]:
    """Return how much the seeds alone move the primary metric: intervals hold the seeds fixed."""
    column = primary_metric(table.benchmark)
    spread = [
        f"{line.row} {line.seed_sd:.3f}"
        for line in table.lines
        if line.seed_sd is not None and (line.metric, line.region) == column
    ]
    words = f"Intervals hold the trained seeds fixed; standard deviation between seeds of {heading(*column)}"
    return [f"{words}: {', '.join(spread)}."] if spread else []


def to_markdown(table: BenchmarkTable, title_level: int = 2) -> str:
    """Return the table as Markdown with its statements."""
    lines = [f"{'#' * title_level} {table.benchmark.title}", ""]
    for grid in grids(table, basis=False):
        lines += [*markdown_rows(grid.header, grid.rows), ""]
    lines += [f"- {sentence}" for sentence in statements(table)]
    lines += [f"- {name}: `{digest}`" for name, digest in (*table.provenance, ("table digest", table.digest[:16]))]
    lines += [f"- Written on {table.date}."] if table.date else []
    return "\n".join(lines) + "\n"


class FurtherTable(Record, ABC):
    """A table beside the main one of a benchmark: for an artifact, the report and a file."""

    title: str

    @property
    @abstractmethod
    def header(self) -> list[str]:
        """Printed column names."""

    @property
    @abstractmethod
    def body(self) -> list[list[str]]:
        """Printed cells."""

    @property
    @abstractmethod
    def statements(self) -> list[str]:
        """Sentences under the table."""

    @abstractmethod
    def to_csv(self) -> str:
        """Return what a file holds."""

    def to_markdown(self) -> str:
        """Return title, table and statements: what an artifact shows, so no subject is named."""
        lines = [f"### {self.title}", "", *markdown_rows(self.header, self.body), ""]
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.statements)]) + "\n"

    def to_latex(self, label: str) -> str:
        """Return the same as LaTeX floats; label: for references, after `tab:`."""
        return floats(f"{self.title}.", tabulars(self.header, self.body), self.statements, label)


def markdown_rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_markdown_row(header), _markdown_row(["---"] * len(header)), *map(_markdown_row, body)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(cell_text, cells)) + " |"


def to_csv(table: BenchmarkTable) -> str:
    """Return every line in full precision, one number a line, as CSV; empty where there is no number."""
    names = list(Line.model_fields)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for line in table.lines:
        writer.writerow({name: "" if value is None else value for name, value in line.model_dump().items()})
    return buffer.getvalue()


def to_latex(table: BenchmarkTable) -> str:
    """Return the table as LaTeX floats with tabulars (booktabs) of each grid, a rule above published rows."""
    found: list[Tabular] = []
    for grid in grids(table):
        kinds = ["", *grid.kinds]
        ruled = [k for k, kind in enumerate(grid.kinds) if k and kind == "published" != kinds[k]]
        found += tabulars(grid.header, grid.rows, ruled)
    return floats(f"{table.benchmark.title}.", found, statements(table), table.benchmark.name)


def artifact_rows(table: BenchmarkTable) -> list[dict[str, str]]:
    """Return the printed cells as rows for a Prefect table artifact: strings only, so nothing in it is infinite.

    The artifact's page is narrow: of several regions only the mean is shown, of the metrics those of SHORT.
    """
    means = {metric for metric, region in columns_of(table) if region == MEAN}
    columns = [(m, r) for m, r in columns_of(table) if m in SHORT and (r == MEAN or m not in means)]
    grid = _with_tests(table, _grid(table, columns, basis=False), basis=False)
    return [dict(zip(grid.header, row, strict=True)) for row in grid.rows]
