"""One self-contained HTML page with everything that a chain of flows did: no outside resource."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.storage import write_bytes
from tasks.tables import BenchmarkTable, FurtherTable, Grid, grids, heading, statements

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Template

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG with the words that replace it for those who cannot see it, and a caption."""

    png: bytes
    alt: str
    caption: str = ""

    @property
    def uri(self) -> str:
        """The picture as a data URI; raises ValueError for bytes that are no PNG."""
        if not self.png.startswith(PNG_SIGNATURE):
            raise ValueError(f"picture {self.alt!r} is no PNG: it starts with {self.png[:8]!r}")
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


FURTHER = ("leaks", "combat", "seeds", "gains", "missing", "labels")
"""Kinds of further tables, in the order in which they are shown."""


@dataclass(frozen=True)
class TableSection:
    """One benchmark: its table, forest plot and overlays, and further tables where they were asked for."""

    table: BenchmarkTable
    pictures: Sequence[Picture] = ()
    further: Mapping[str, FurtherTable] = field(default_factory=dict)
    """Tables beside the main one, by the kind that is part of their file names, one of FURTHER."""
    reliability: pd.DataFrame | None = None
    """Reliability curves of a classification, for a file beside the table."""
    confusion: pd.DataFrame | None = None
    """Confusion matrices of a classification (tasks.confusion), for a file beside the table."""

    @property
    def grids(self) -> list[Grid]:
        """The printed parts of the table."""
        return grids(self.table)

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        return statements(self.table)


@dataclass(frozen=True)
class TrainingSection:
    """One training shown in the report: its loss curves and the pictures that it wrote."""

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page; every text is escaped by the template."""

    title: str
    date: str
    summary: Sequence[tuple[str, str]]
    """Name and value of the headline facts, e.g. ("cases stored", "112")."""
    provenance: Sequence[tuple[str, str]]
    """Name and digest or version of everything that the numbers were made from."""
    qc: Sequence[Picture] = ()
    quarantine: Sequence[Mapping[str, Any]] = ()
    trainings: Sequence[TrainingSection] = ()
    benchmarks: Sequence[TableSection] = ()
    absent: Sequence[TableSection] = ()
    """Benchmarks without data at hand."""
    leaderboard: FurtherTable | None = None
    """Mean places over benchmarks (tasks.leaderboard)."""
    notes: Sequence[str] = ()
    methods: Sequence[str] = ()
    """Paragraphs for a paper; they cite `references` by their numbers."""
    references: Sequence[str] = ()

    @property
    def quarantine_columns(self) -> list[str]:
        """Columns of the quarantine table, from its first row."""
        return list(self.quarantine[0]) if self.quarantine else []


@cache
def page_template(name: str) -> Template:
    """Return a page of tasks/templates; it escapes every text and refuses names that it was not given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render_report(content: ReportContent) -> str:
    """Return the page as HTML text."""
    return page_template("report.html").render(content=content)


def write_report(content: ReportContent, path: Path) -> Path:
    """Write the page as one file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(str(path), render_report(content).encode("utf-8"))
    return path


def primary_picture(table: BenchmarkTable, words: str, over: str = "subjects") -> Picture:
    """Return the forest plot of a table's primary metric, published rows included; `words` say what is drawn."""
    from tasks.figures import forest_plot
    from tasks.summary import primary_metric

    column = primary_metric(table.benchmark)
    lines = [line for line in table.lines if (line.metric, line.region) == column and line.estimate is not None]
    plot = forest_plot(lines, f"{table.benchmark.title}: {heading(*column)}", over, len(table.benchmark.classes))
    return Picture(plot, f"forest plot of {table.benchmark.title}", words)


def training_facts(run: Mapping[str, Any]) -> dict[str, str]:
    """Return what a section says of a training, from its run.json."""
    return {name: str(run[name]) for name in ("recipe", "preset", "epochs", "seed", "world_size") if name in run}


def training_section(folder: Path, facts: Mapping[str, str] | None = None) -> TrainingSection:
    """Return the section of a training folder: loss curves from metrics.jsonl, then `pictures/*.png` in order."""
    from models.metrics import read_metrics
    from tasks.figures import loss_curves, loss_series

    pictures: list[Picture] = []
    records = read_metrics(folder)
    if loss_series(records):
        curves = loss_curves(records, f"{folder.name}: losses")
        pictures.append(Picture(curves, f"loss curves of {folder.name}", "Losses by optimiser step; faint: unsmoothed"))
    for path in sorted((folder / "pictures").glob("*.png")):
        words = path.stem.replace("_", " ").replace("-", " ")
        pictures.append(Picture(path.read_bytes(), f"{words} of {folder.name}", words))
    return TrainingSection(folder.name, dict(facts or {}), pictures)


def software_versions() -> list[tuple[str, str]]:
    """Return the versions of the packages that the numbers depend on."""
    from importlib.metadata import version

    names = ("brainloom", "torch", "monai", "scikit-learn", "numpy", "scipy", "zarr", "prefect", "dask")
    return [(name, version(name)) for name in names]
