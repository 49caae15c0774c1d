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
from tasks.splits import ROLES
from tasks.summary import PRETRAINED

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
    pretrained: str
    """Name of the pre-training."""


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
        provenance=provenance(made, trainings),
        qc=qc_pictures(made),
        quarantine=quarantine_table(made.store.cases(), _catalog(made)),
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
    return (
        f"Raw scans were preprocessed with the spec “{spec.name}” ({spec.spacing_mm:g} mm, {frame}) into a sharded "
        f"Zarr store. {_pretraining(made.workspace / 'trainings' / made.pretrained)}, then fine-tuned; training from "
        "scratch had the same budget."
    )


def _pretraining(folder: Path) -> str:
    """Return the words that say where an encoder comes from."""
    if origin := (read_json(folder / "done.json") or {}).get("origin"):
        return (
            f"The encoder was imported from the file “{origin['file']}” (it may have seen test subjects: see "
            "its model card)"
        )
    run = read_json(folder / "run.json") or {}
    return (
        f"The encoder was pre-trained with the recipe “{run.get('recipe', 'unknown')}” (preset "
        f"“{run.get('preset', 'unknown')}”, {run.get('epochs', 'unknown')} epochs, {run.get('world_size', 'unknown')} "
        "ranks) on subjects outside the test role"
    )


def provenance(made: Made, trainings: Sequence[Finetuning] = ()) -> list[tuple[str, str]]:
    """Return the digests of store, spec, split and trainings, and the versions of the software."""
    found = [
        ("store digest", store_digest(made.store.url)),
        ("preprocessing spec", f"{made.store.spec.name} {made.store.spec.content_digest()}"),
        ("split digest", made.tables.split_digest),
        ("phenotypes digest", made.tables.phenotypes_digest or "no phenotypes"),
    ]
    done = read_json(made.workspace / "trainings" / made.pretrained / "done.json") or {}
    found += [
        (f"{made.pretrained}: {words}", str(done[key]))
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
    """Return the pre-training with its pictures, and one fine-tuning of each benchmark (pre-trained, first seed)."""
    folder = made.workspace / "trainings"
    sections = []
    first = {one.benchmark: one.folder for one in reversed(trainings) if one.row == PRETRAINED and one.seed == 0}
    for path in (
        folder / made.pretrained,
        *(first[name] for name in dict.fromkeys(one.benchmark for one in trainings)),
    ):
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
