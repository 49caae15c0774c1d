"""What the report of a workspace shows beside the benchmark tables: provenance, quality pictures, trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from models.config import MadeFrom
from models.store import store_digest
from tasks.finetune import Finetuning, read_json
from tasks.methods_text import MethodsText
from tasks.qc import mosaic_of, qc_cases, quarantine_table
from tasks.report import (
    Picture,
    ReportContent,
    TableSection,
    TrainingSection,
    software_versions,
    training_facts,
    training_section,
)
from tasks.rows import Run
from tasks.run_times import time_shares
from tasks.splits import ROLES

if TYPE_CHECKING:
    from models.store import Store

MOSAICS_PER_DATASET = 2


@dataclass(frozen=True)
class Made:
    """What an evaluation was made from."""

    workspace: Path
    store: Store
    cases: pd.DataFrame
    split: pd.DataFrame
    tables: MadeFrom
    """Versions of the split and of the phenotypes."""
    runs: tuple[Run, ...]
    """The pre-trainings, in the order of their rows."""
    unchecked: tuple[str, ...] = ()
    """Sentences on pre-trainings of which it could not be looked for whom they have seen (tasks.seen_prints)."""


def report_content(
    made: Made,
    trainings: Sequence[Finetuning],
    shown: Sequence[TableSection],
    absent: Sequence[TableSection],
    methods: MethodsText,
    date: str,
) -> ReportContent:
    """Return the whole page of a workspace."""
    stored, out = (made.cases[made.cases["status"] == status] for status in ("stored", "quarantined"))
    shares = ", ".join(f"{int((made.split['split'] == role).sum())} {role}" for role in ROLES)
    summary = [
        ("cases stored", str(len(stored))),
        ("subjects", str(len(stored.drop_duplicates(["dataset", "subject"])))),
        ("scans", str(int(stored["modalities"].map(len).sum()))),
        ("quarantined", str(len(out))),
        ("subjects by role", shares),
        ("fine-tunings", str(len(trainings))),
    ]
    return ReportContent(
        title=f"brainloom report: {made.workspace.name}",
        date=date,
        summary=summary,
        provenance=[*provenance(made, trainings), *time_shares(trainings, made.workspace / "scores")],
        qc=qc_pictures(made),
        quarantine=quarantine_table(made.store.url, _catalog(made)),
        trainings=training_sections(made, trainings),
        benchmarks=shown,
        absent=absent,
        notes=[description(made)],
        methods=methods.paragraphs,
        references=methods.references,
    )


def _catalog(made: Made) -> str | None:
    path = made.workspace / "catalog.parquet"
    return str(path) if path.exists() else None


def description(made: Made) -> str:
    """Return the paragraph that says what was done, from the records of the workspace."""
    spec = made.store.spec
    frame = "a fixed template grid" if spec.frame == "template" else "the axes of each case's reference scan"
    plural = len(made.runs) > 1
    origins = [_pretraining(run, f" of “{run.name}”" if plural else "") for run in made.runs]
    return (
        f"Raw scans were preprocessed with the spec “{spec.name}” ({spec.spacing_mm:g} mm, {frame}) into a sharded "
        f"Zarr store. {'. '.join(origins)}{'. All were' if plural else ', then'} fine-tuned; training from scratch had "
        "the same budget."
    )


def _pretraining(run: Run, of: str) -> str:
    """Return the words that say where an encoder comes from."""
    if run.origin:
        return (
            f"The encoder{of} was imported from the file “{run.origin['file']}” (it may have seen test subjects: see "
            "its model card)"
        )
    config = read_json(run.folder / "run.json") or {}
    return (
        f"The encoder{of} was pre-trained with the recipe “{config.get('recipe', 'unknown')}” (preset "
        f"“{config.get('preset', 'unknown')}”, {config.get('epochs', 'unknown')} epochs, "
        f"{config.get('world_size', 'unknown')} ranks) on subjects outside the test role"
    )


def provenance(made: Made, trainings: Sequence[Finetuning] = ()) -> list[tuple[str, str]]:
    """Return the digests of store, spec, split and trainings, and the versions of the software."""
    found = [
        ("store digest", store_digest(made.store.url)),
        ("preprocessing spec", f"{made.store.spec.name} {made.store.spec.content_digest()}"),
        ("split digest", made.tables.split_digest),
        ("phenotypes digest", made.tables.phenotypes_digest or "no phenotypes"),
        *([("crosswalks digest", made.tables.crosswalks_digest)] if made.tables.crosswalks_digest else []),
    ]
    for folder in (folder for run in made.runs for folder in run.folders):
        done = read_json(folder / "done.json") or {}
        found += [
            (f"{folder.name}: {words}", str(done[key]))
            for key, words in (
                ("config_digest", "config digest"),
                ("selection_digest", "selection digest"),
                ("weights_digest", "weights digest"),
            )
            if key in done
        ]
    found += [(f"{one.folder.name}: config digest", one.config.content_digest()) for one in trainings]
    return [*found, *((f"version of {name}", version) for name, version in software_versions())]


def training_sections(made: Made, trainings: Sequence[Finetuning]) -> list[TrainingSection]:
    """Return the pre-trainings with their pictures, and one fine-tuning of each benchmark (first row, first seed)."""
    sections = []
    first: dict[str, Path] = {}
    for one in trainings:
        first.setdefault(one.benchmark, one.folder)
    for path in (*(run.folder for run in made.runs), *first.values()):
        run = read_json(path / "run.json") or {}
        done = read_json(path / "done.json") or {}
        facts = training_facts(run)
        facts |= {name: f"{value:.4g}" for name, value in dict(done.get("metrics") or {}).items()}
        sections.append(training_section(path, facts))
    return sections


def qc_pictures(made: Made) -> list[Picture]:
    """Return tri-planar mosaics of some stored cases of each dataset, the strangest one first; faces are masked."""
    pictures = []
    for dataset, row in qc_cases(made.store.url, MOSAICS_PER_DATASET):
        title = f"{dataset} {made.store.dataset(dataset).case_info(row).case}"
        png = mosaic_of(made.store, dataset, row)
        pictures.append(Picture(png, f"tri-planar mosaic of {title}", f"{title}: as stored, faces masked"))
    return pictures
