"""All runs against all benchmarks in one page: a table a protocol, each cell the primary metric with its interval."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.probe_tasks import PROBES
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.summary import OTHERS, Line, primary_metric
from tasks.tables import cell, heading, markdown_rows, others_name, others_told

ALL: dict[str, Benchmark] = {**BENCHMARKS, **PROBES, **PROMPT_TASKS}
"""The registered benchmarks of all protocols by name."""
LEVEL = 0.05
"""Of Holm's p, below which a row is marked as different from the first."""


@dataclass(frozen=True)
class Protocol:
    """How benchmarks of one protocol are told and where their results lie."""

    title: str
    words: str
    tables: str
    """Folder of the tables below the workspace."""
    page: str
    scores: str


PROTOCOLS: dict[str, Protocol] = {
    "fine-tune": Protocol(
        "Fine-tuning",
        "Trained on the train role with one budget for all rows, scored on the test role; 95 % bootstrap intervals "
        "over subjects.",
        "tables",
        "report/index.html",
        "scores.parquet",
    ),
    "probe": Protocol(
        "Probes of frozen encoders",
        "Linear models in folds by subject; 95 % intervals over folds, Nadeau-Bengio corrected.",
        "probes/tables",
        "probes/index.html",
        "probes/scores.parquet",
    ),
    "prompt": Protocol(
        "Prompting with connectomes",
        "Images told apart by labelled connectomes, in folds by subject; 95 % intervals over folds, Nadeau-Bengio "
        "corrected.",
        "prompts/tables",
        "prompts/index.html",
        "prompts/scores.parquet",
    ),
}
"""By the name that a benchmark has for it."""


def find_any(name: str) -> Benchmark:
    """Return a registered benchmark of any protocol; raises ValueError listing the known names."""
    if name not in ALL:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(ALL)}")
    return ALL[name]


@dataclass(frozen=True)
class Part:
    """The benchmarks of one protocol."""

    protocol: Protocol
    benchmarks: tuple[Benchmark, ...]
    lines: tuple[tuple[Line, ...], ...]
    """Of each benchmark: the lines of its primary metric, without published ones; none without data."""
    notes: tuple[str, ...] = ()
    """Further sentences."""

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        return ["row", *(_column(one, lines) for one, lines in zip(self.benchmarks, self.lines, strict=True))]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells: a line a row of any of the benchmarks, in their order."""
        found = [{line.row: line for line in lines} for lines in self.lines]
        rows = dict.fromkeys(row for lines in found for row in lines)
        shown = {row: others_name(row) if row in self.predicted else row for row in rows}
        return [[shown[row], *(_cell(lines, row) for lines in found)] for row in rows] or [
            ["no data", *("–" for _ in found)]
        ]

    @property
    def predicted(self) -> list[str]:
        """Rows that are predictions of others."""
        return list(dict.fromkeys(line.row for lines in self.lines for line in lines if line.kind == OTHERS))

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        marked = any("*" in cells for row in self.body for cells in row[1:])
        stars = (
            f"*: differs from the first row, p < {LEVEL:g} after Holm's correction inside a benchmark."
            if marked
            else "No row differs from the first after Holm's correction inside a benchmark."
        )
        absent = [one.title for one, lines in zip(self.benchmarks, self.lines, strict=True) if not lines]
        return [
            self.protocol.words,
            *([stars] if any(self.lines) else []),
            *([f"No data in the store: {', '.join(absent)}."] if absent else []),
            *others_told(self.predicted),
            *self.notes,
        ]


def _column(benchmark: Benchmark, lines: Sequence[Line]) -> str:
    n = max((line.n for line in lines), default=0)
    return f"{benchmark.title}: {heading(*primary_metric(benchmark))}{f' (n = {n})' if n else ''}"


def _cell(lines: dict[str, Line], row: str) -> str:
    text = cell(lines.get(row))
    if (line := lines.get(row)) is None or line.p_holm is None or line.p_holm >= LEVEL:
        return text
    number, bracket, interval = text.partition(" [")
    return f"{number}*{bracket}{interval}"


def read_part(workspace: Path, protocol: str, names: Sequence[str]) -> Part:
    """Return the part of one protocol from the tables that its flow has written below the workspace."""
    found = PROTOCOLS[protocol]
    benchmarks = tuple(find_any(name) for name in names)
    return Part(found, benchmarks, tuple(_primary_lines(workspace / found.tables, one) for one in benchmarks))


def _primary_lines(folder: Path, benchmark: Benchmark) -> tuple[Line, ...]:
    with (folder / f"{benchmark.name}.csv").open(encoding="utf-8", newline="") as file:
        read = (
            Line.model_validate({"metric": "", **{k: v for k, v in row.items() if v}}) for row in csv.DictReader(file)
        )
        lines = [line for line in read if (line.metric, line.region) == primary_metric(benchmark)]
    return tuple(line for line in lines if line.kind in ("ours", "baseline", "ceiling", OTHERS))


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    """Return the page as Markdown: a table a protocol, and where everything lies below the workspace."""
    text = [f"# {title}", ""]
    for part in parts:
        where = part.protocol
        text += [f"## {where.title}", "", *markdown_rows(part.header, part.body), ""]
        text += [f"- {sentence}" for sentence in part.statements]
        text += [f"- Report: `{where.page}`; tables: `{where.tables}/`; scores of every case: `{where.scores}`.", ""]
    return "\n".join(text)


def to_html(title: str, parts: Sequence[Part], date: str) -> str:
    """Return the page as HTML beside the report of fine-tuning, with links to all reports."""
    from tasks.report import page_template

    return page_template("benchmark.html").render(title=title, parts=parts, date=date)
