"""Probe: linear probes of frozen encoders, cross-validated by subject, with baselines, site report and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import ConfigDict, Field, model_validator

from flows.compared import TrainingRow, check_names, encoder_row, people_and_seen, write_page
from flows.forms import Form, Place, few, params_of, store_field, store_in, workspace_field
from flows.gpu_turn import gpu_turn
from flows.progress import Progress
from flows.results import publish_tables, write_section
from models.store import Store, open_store, store_digest
from tasks.confusion import with_confusion
from tasks.embeddings import random_encoder, trained_encoder
from tasks.latents import read_latents
from tasks.methods_compared import Compared, probe_methods
from tasks.probe_cohort import ProbeCohort, find_probe_cohort
from tasks.probe_combat import COMBAT, combat_table, combat_twins, without_combat
from tasks.probe_leaks import fold_leak_table
from tasks.probe_report import (
    embedding_picture,
    ensemble_notes,
    forest_picture,
    import_notes,
    weights_of,
    window_notes,
)
from tasks.probe_sites import site_cohort
from tasks.probe_summary import NEIGHBOURS, probe_table
from tasks.probe_tasks import PHANTOM_PROBES, PROBES, find_probe
from tasks.probing import (
    RANDOM,
    RESERVED,
    EncoderRow,
    FeatureRow,
    absent_lines,
    feature_rows,
    row_kinds,
    score_encoders,
    score_features,
    with_neighbours,
)
from tasks.report import TableSection
from tasks.scores import write_scores

ProbeName = Annotated[str, Field(json_schema_extra={"enum": list(PROBES)})]
"""The form offers the registered ones."""


class ProbeParams(Form):
    """Which frozen encoders to probe, and on what."""

    model_config = ConfigDict(title="Probe")

    workspace: str = workspace_field(
        "Folder with the splits, phenotypes and trainings; results are written into `<workspace>/probes`."
    )
    store: Place = store_field()
    rows: list[TrainingRow] = Field(
        title="Rows",
        description="Encoders to compare, at least one; the first is tested against every other row.",
        min_length=1,
        examples=[[{"name": "AnatCL global", "trainings": ["anatcl"]}]],
    )
    benchmarks: list[ProbeName] = Field(
        default=list(PHANTOM_PROBES),
        title="Probes",
        description="Names of registered probes, at least one; those without data in the store show `no data`.",
        min_length=1,
        examples=[list(PHANTOM_PROBES)],
    )
    folds: int = Field(5, ge=3, le=20, title="Folds", description="Of the cross-validation, from 3 to 20.")
    random_seeds: int = Field(
        3,
        ge=1,
        le=20,
        title="Random encoders",
        description="Random initialisations of the first row's network in the baseline row, from 1 to 20.",
    )
    knn: bool = Field(
        False,
        title="Nearest neighbours",
        description="Probe every encoder a second time, by the nearest training cases instead of a linear model.",
    )
    with_seen: bool = Field(
        True,
        title="Also with who was seen",
        description="Score everything once more with the subjects that a pre-training has seen, for the table of "
        "leaks; off: they are listed alone. Of a large pre-training on the same data it costs much.",
    )
    site_report: bool = Field(
        True,
        title="Site report",
        description="Also say how well the features tell the sites apart, where there are two or more.",
    )
    combat: bool = Field(
        False,
        title="ComBat",
        description="Also probe features that ComBat has harmonised over sites, in tables beside the ordinary ones.",
    )
    layouts: list[str] = Field(
        default_factory=list,
        title="Layouts",
        description="YAML files that say how a dataset names its phenotypes; they win over the ones in the package.",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [RANDOM, *(row.name for row in self.rows)]
        twins = [f"{name}{NEIGHBOURS}" for name in names] if self.knn else []
        after = [f"{name}{COMBAT}" for name in [*names, *twins]] if self.combat else []
        check_names(self.rows, [*RESERVED, *twins, *after])
        return self


def run_name(params: ProbeParams) -> str:
    """Return `probe <first row> on <probes>`, shortened after three."""
    return f"probe {params.rows[0].name} on {few(params.benchmarks)}"


def _run_name() -> str:
    return run_name(params_of(ProbeParams))


@dataclass(frozen=True)
class Comparison:
    """Everything that a flow run compares."""

    workspace: Path
    store: Store
    digest: str
    """Of the store."""
    rows: tuple[EncoderRow, ...]
    """Those of the parameters, then the random encoder."""
    cohorts: tuple[ProbeCohort, ...]
    """Also those without data."""
    notes: tuple[str, ...]
    """Sentences for every table."""
    combat: bool = False
    """Probe everything once more after ComBat, where there are sites for it."""


@task(name="score", task_run_name="probe {name}", cache_policy=NO_CACHE)
def score(
    name: str, cohort: ProbeCohort, rows: Sequence[EncoderRow], features: Sequence[FeatureRow], workspace: Path
) -> tuple[pd.DataFrame, int]:
    """Return the scores of all rows of one probe and how many were computed now; unchanged ones are read back."""
    simple = [row for row in features if row.features is not None]
    seeds = max(len(row.encoders) for row in rows)
    frames: list[pd.DataFrame] = []
    fresh = 0
    with Progress(f"probe {name}", len(rows) + len(simple), "rows") as progress:

        def show(note: str) -> None:
            progress.update(len(frames), note=note)

        for encoders in rows:
            frame, computed = score_encoders(cohort, encoders, workspace, show)
            frames.append(frame)
            fresh += computed
            show(encoders.name)
        for row in simple:
            frame, computed = score_features(cohort, row, seeds, workspace)
            frames.append(frame)
            fresh += computed
            show(row.name)
    return pd.concat(frames, ignore_index=True), fresh


@flow(name="probe", flow_run_name=_run_name)
def probe(params: ProbeParams) -> dict[str, Any]:
    """Embed, probe and report; what is computed and unchanged is not computed again."""
    with gpu_turn():
        return compare(params)


def compare(params: ProbeParams) -> dict[str, Any]:
    """Do what the flow does, in its turn on the GPUs."""
    for name in params.benchmarks:
        find_probe(name)
    compared = read_comparison(params)
    folder, date = compared.workspace / "probes", datetime.now(UTC).date().isoformat()
    sections, scores, fresh = [], [], 0
    harmonised: list[pd.DataFrame] = []
    pictured = False
    for cohort in compared.cohorts:
        if cohort.cases:
            simple = feature_rows(cohort)
            frame, computed = score(cohort.benchmark.name, cohort, compared.rows, simple, compared.workspace)
            scores.append(frame)
            fresh += computed
            section = make_section(compared, cohort, simple, frame, date, with_embedding=not pictured)
            pictured = pictured or len(section.pictures) > 1
            section, more = with_leaks(compared, cohort, with_confusion(section, frame), frame, params.with_seen)
            section, after, again = with_combat(compared, cohort, simple, section, frame)
            harmonised += after
            fresh += more + again
        else:
            section = empty_section(cohort, date)
        sections.append(section)
        write_section(section, folder / "tables")
    if scores:
        write_scores(pd.concat(scores, ignore_index=True), folder / "scores.parquet", "all probes")
    _write_harmonised(harmonised, folder / "combat.parquet")
    publish_tables([section.table for section in sections], folder / "tables")
    notes = [
        "Every encoder is frozen. Its features of an image are probed by a linear model in folds by subject; "
        "subjects that a pre-training has seen are left out.",
        *compared.notes,
    ]
    page = folder / "index.html"
    empty = partial(empty_section, date=date)
    methods = probe_methods(
        Compared(compared.workspace, compared.store, compared.rows, compared.cohorts), combat=bool(harmonised)
    )
    found = write_page(page, "probes", compared.store, compared.rows, sections, PROBES, empty, notes, date, methods)
    return {**found, "scored": fresh}


def read_comparison(params: ProbeParams) -> Comparison:
    """Find encoders, people and cohorts; raises what is wrong with them before anything is computed."""
    workspace = Path(params.workspace).resolve()
    store = open_store(store_in(params.workspace, params.store))
    trainings = {name: workspace / "trainings" / name for row in params.rows for name in row.trainings}
    sources = {name: trained_encoder(folder) for name, folder in trainings.items()}
    rows = [encoder_row(row, sources) for row in params.rows]
    first = rows[0].encoders[0]
    seeds = (random_encoder(first.network, seed) for seed in range(params.random_seeds))
    alike = (replace(one, modalities=first.modalities, window=first.window) for one in seeds)
    rows.append(EncoderRow(RANDOM, tuple(alike)))
    rows = with_neighbours(rows) if params.knn else rows
    people, seen, unchecked = people_and_seen(workspace, store, params.layouts, trainings.values())
    cohorts = [
        find_probe_cohort(
            benchmark,
            store,
            people,
            workspace,
            params.folds,
            seen,
            read_latents(workspace / "sources", benchmark.datasets),
        )
        for benchmark in map(find_probe, dict.fromkeys(params.benchmarks))
    ]
    notes = [*ensemble_notes(rows), *window_notes(rows), *import_notes(rows), *unchecked]
    if params.site_report:
        sites, words = site_cohort([one for one in cohorts if one.cases], people, workspace, params.folds, seen)
        cohorts += [sites] if sites else []
        notes += [words] if words else []
    if params.combat:
        cohorts = [replace(one, notes=(*one.notes, *_no_combat(one))) for one in cohorts]
    return Comparison(
        workspace, store, store_digest(store.url), tuple(rows), tuple(cohorts), tuple(notes), params.combat
    )


def _no_combat(cohort: ProbeCohort) -> list[str]:
    """Return why a cohort with data has no table after ComBat; nothing where it has one."""
    return [why] if cohort.cases and (why := without_combat(cohort)) else []


def with_leaks(
    compared: Comparison, cohort: ProbeCohort, section: TableSection, scores: pd.DataFrame, with_seen: bool
) -> tuple[TableSection, int]:
    """Return the section with the table of leaks, where a pre-training has seen somebody, and how many scores were
    computed for it: `with_seen`, everything is probed once more with them."""
    everyone = cohort.everyone
    if everyone is None:
        return section, 0
    simple = feature_rows(everyone)
    other, fresh = pd.DataFrame(), 0
    if with_seen:
        other, fresh = score(everyone.benchmark.name, everyone, compared.rows, simple, compared.workspace)
    table = fold_leak_table(cohort, scores, other, row_kinds(compared.rows, simple))
    return replace(section, further={**section.further, "leaks": table}), fresh


def with_combat(
    compared: Comparison,
    cohort: ProbeCohort,
    simple: Sequence[FeatureRow],
    section: TableSection,
    scores: pd.DataFrame,
) -> tuple[TableSection, list[pd.DataFrame], int]:
    """Return the section with the table after ComBat, where it was asked for and there are sites for it, the scores of
    that table, and how many of them were computed now."""
    if not compared.combat or without_combat(cohort):
        return section, [], 0
    encoders, features = combat_twins(compared.rows, simple)
    after, fresh = score(f"{cohort.benchmark.name}{COMBAT}", cohort, encoders, features, compared.workspace)
    table = combat_table(cohort, scores, after)
    return replace(section, further={**section.further, "combat": table}), [after], fresh


def _write_harmonised(found: Sequence[pd.DataFrame], path: Path) -> None:
    """Write the scores after ComBat in a file of their own; without any, what an earlier flow run left is removed."""
    if found:
        write_scores(pd.concat(found, ignore_index=True), path, "all probes after ComBat")
    else:
        path.unlink(missing_ok=True)


def make_section(
    compared: Comparison,
    cohort: ProbeCohort,
    simple: Sequence[FeatureRow],
    scores: pd.DataFrame,
    date: str,
    with_embedding: bool,
) -> TableSection:
    """Return table and pictures of one probe with data."""
    facts = [("store digest", compared.digest), ("folds digest", cohort.folds_digest), *weights_of(compared.rows)]
    table = probe_table(
        cohort,
        scores,
        row_kinds(compared.rows, simple),
        absent_lines(cohort, compared.rows, simple),
        compared.notes,
        facts,
        date,
    )
    pictures = [forest_picture(table)]
    if with_embedding and (found := embedding_picture(cohort, compared.rows, compared.workspace)):
        pictures.append(found)
    return TableSection(table, pictures)


def empty_section(cohort: ProbeCohort, date: str) -> TableSection:
    """Return the table of a probe without data: `no data`, beside what was published."""
    return TableSection(probe_table(cohort, pd.DataFrame(), {}, (), (), (), date))
