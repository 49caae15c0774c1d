"""What stands around a probe table: pictures, where the numbers come from, and the page with all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from models.export import read_done
from models.store import store_digest
from tasks.embedding_figure import embedding_figure
from tasks.finetune import read_json
from tasks.methods_text import MethodsText
from tasks.overlap import PARTS
from tasks.probe_cohort import ProbeCohort
from tasks.probes import Floats
from tasks.probing import EncoderRow, embed_row
from tasks.qc import quarantine_table
from tasks.report import (
    Picture,
    ReportContent,
    TableSection,
    TrainingSection,
    primary_picture,
    software_versions,
    training_facts,
)
from tasks.tables import BenchmarkTable

if TYPE_CHECKING:
    from models.store import Store

PANELS = 4
"""Rows of encoders that a picture of embeddings shows at most."""
IMPORTED = (
    "{} was imported: which subjects it was trained on is not in its file, so nothing here can tell whether it has "
    "seen some of these."
)


OPENBHB = (
    "{} holds weights of AnatCL: the released ones were trained on OpenBHB, so nobody of openbhb, "
    + ", ".join(sorted(PARTS))
    + " is an independent test subject for them."
)


def forest_picture(table: BenchmarkTable) -> Picture:
    """Return the forest plot of a table's primary metric."""
    words = "Point: mean over folds; bar: 95 % interval over folds, Nadeau-Bengio corrected; diamonds: published"
    return primary_picture(table, words, "folds")


def embedding_picture(cohort: ProbeCohort, rows: Sequence[EncoderRow], workspace: Path) -> Picture | None:
    """Return the embeddings of a cohort by the first encoder of each row, coloured by age; None where no age is known.

    More than PANELS rows: the first ones and the last, which is the random encoder.
    """
    ages = pd.to_numeric(cohort.people.get("age", pd.Series(np.nan, index=cohort.people.index)), errors="coerce")
    if not ages.notna().any() or len(ages) < 3:
        return None
    rows = [row for row in rows if row.model == "linear"]  # their twins have the same features
    shown = rows if len(rows) <= PANELS else [*rows[: PANELS - 1], rows[-1]]
    features = {row.name: _filled(embed_row(cohort, row.encoders[0], workspace)) for row in shown}
    title = f"Embeddings of {', '.join(cohort.benchmark.datasets)}"
    png = embedding_figure(features, ages.to_numpy(dtype=np.float64), title)
    words = "Two first principal components of the frozen features, a point a subject, coloured by age"
    return Picture(png, f"embeddings of {cohort.benchmark.title}", words)


def _filled(features: Floats) -> Floats:
    """Return features (N, C) with the means of their columns where a case lacks a modality: a picture has no folds."""
    return np.where(np.isnan(features), np.nanmean(features, axis=0), features)


def weights_of(rows: Sequence[EncoderRow]) -> list[tuple[str, str]]:
    """Return name and weights digest of every trained encoder, each once."""
    return list(
        dict.fromkeys((f"{one.name}: weights", one.weights) for row in rows for one in row.encoders if one.folder)
    )


def import_notes(rows: Sequence[EncoderRow]) -> list[str]:
    """Return a sentence for each imported encoder, and one more for weights of AnatCL."""
    origins = {folder.name: origin for folder in _folders(rows) if (origin := (read_done(folder) or {}).get("origin"))}
    anatcl = [name for name, origin in origins.items() if str(origin.get("layout", "")).startswith("anatcl")]
    return [*map(IMPORTED.format, origins), *map(OPENBHB.format, anatcl)]


def ensemble_notes(rows: Sequence[EncoderRow]) -> list[str]:
    """Return a sentence for each ensemble."""
    return [
        f"{row.name}: an ensemble of {len(row.encoders)} encoders; each is probed alone, then their "
        "probabilities or predictions are averaged."
        for row in rows
        if row.together == "ensemble"
    ]


def window_notes(rows: Sequence[EncoderRow]) -> list[str]:
    """Return a sentence about the encoders that are given windows of an image, by the size of their windows."""
    found: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        if row.model == "linear" and (window := row.encoders[0].window):
            found.setdefault(window, []).append(row.name)
    return [
        f"{', '.join(names)}: embedded in windows of {' x '.join(map(str, window))} voxels, the crops of the training, "
        "that cover the image; the features are the mean over windows that hold a voxel above or below zero."
        for window, names in found.items()
    ]


def probe_report(
    title: str,
    workspace: Path,
    store: Store,
    rows: Sequence[EncoderRow],
    shown: Sequence[TableSection],
    absent: Sequence[TableSection],
    notes: Sequence[str],
    date: str,
    methods: MethodsText,
) -> ReportContent:
    """Return the page with all tables of a flow run; `title` says what was made, e.g. probes."""
    cases = store.cases().to_pandas()
    stored = cases[cases["status"] == "stored"]
    subjects = max((line.n for section in shown for line in section.table.lines), default=0)
    summary = [
        ("cases stored", str(len(stored))),
        ("subjects stored", str(len(stored.drop_duplicates(["dataset", "subject"])))),
        ("subjects of the largest table", str(subjects)),
        ("rows of encoders", str(len(rows))),
    ]
    spec = store.spec
    provenance = [
        ("store digest", store_digest(store.url)),
        ("preprocessing spec", f"{spec.name} {spec.content_digest()}"),
        *weights_of(rows),
        *((f"version of {name}", version) for name, version in software_versions()),
    ]
    return ReportContent(
        title=f"brainloom {title}: {workspace.name}",
        date=date,
        summary=summary,
        provenance=provenance,
        quarantine=quarantine_table(store.cases()),
        trainings=[_training(folder) for folder in _folders(rows)],
        benchmarks=shown,
        absent=absent,
        notes=notes,
        methods=methods.paragraphs,
        references=methods.references,
    )


def _folders(rows: Sequence[EncoderRow]) -> list[Path]:
    return list(dict.fromkeys(one.folder for row in rows for one in row.encoders if one.folder))


def _training(folder: Path) -> TrainingSection:
    facts = training_facts(read_json(folder / "run.json") or {})
    weights = str((read_done(folder) or {}).get("weights_digest", ""))
    return TrainingSection(folder.name, facts | {"weights digest": weights})
