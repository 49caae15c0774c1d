"""Prompt: diagnosis of images by labelled connectomes, cross-validated by subject, beside probes and baselines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import ConfigDict, Field, model_validator

from flows.compared import TrainingRow, check_names, encoder_row, people_and_seen, write_page
from flows.forms import Form, Place, few, params_of, store_field, store_in, workspace_field
from flows.gpu_turn import gpu_turn
from flows.progress import Progress
from flows.results import publish_tables, write_section
from models.config import ClassificationConfig
from models.config_cinp import CINPConfig, NetworkClassificationConfig
from models.finished import read_settings
from models.store import Store, open_store, store_digest
from tasks.confusion import with_confusion
from tasks.embeddings import trained_encoder
from tasks.latents import read_latents
from tasks.methods_compared import Compared, prompt_methods
from tasks.network_embeddings import PairSource, check_pair, trained_pair
from tasks.probe_leaks import fold_leak_table
from tasks.probe_report import ensemble_notes, import_notes, weights_of
from tasks.probing import EncoderRow
from tasks.prompt_baselines import RESERVED, ImageRow
from tasks.prompt_cohort import PromptCohort, find_prompt_cohort
from tasks.prompt_report import empty_section, prompt_section
from tasks.prompt_rows import kinds_of, make_rows, score_rows
from tasks.prompt_seeds import Embedder, PairRow, PromptSettings, Row
from tasks.prompt_tasks import PHANTOM_PROMPTS, PROMPT_TASKS, find_prompt_task
from tasks.prompting import VARIANTS, Variant
from tasks.report import TableSection
from tasks.scores import write_scores

TaskName = Annotated[str, Field(json_schema_extra={"enum": list(PROMPT_TASKS)})]
"""The form offers the registered ones."""
Share = Annotated[float, Field(gt=0, le=1)]


class PromptParams(Form):
    """What to prompt with, and on which tasks."""

    model_config = ConfigDict(title="Prompt")

    workspace: str = workspace_field(
        "Folder with the splits, phenotypes and trainings; results are written into `<workspace>/prompts`."
    )
    store: Place = store_field()
    rows: list[TrainingRow] = Field(
        title="Rows",
        description="Trainings of recipe cinp to compare, at least one; prompting with the first is tested against "
        "every other row.",
        min_length=1,
        examples=[[{"name": "CINP", "trainings": ["cinp"]}]],
    )
    image_only: list[TrainingRow] = Field(
        default_factory=list,
        title="Image-only rows",
        description="Trainings that saw images alone (recipe image_mae, a supervised one of evaluate): their frozen "
        "encoders are probed linearly.",
        examples=[[{"name": "image-only MAE, 3 seeds", "trainings": ["image-mae"]}]],
    )
    benchmarks: list[TaskName] = Field(
        default=list(PHANTOM_PROMPTS),
        title="Tasks",
        description="Names of registered prompting tasks, at least one; those without data in the store show "
        "`no data`.",
        min_length=1,
        examples=[list(PHANTOM_PROMPTS)],
    )
    folds: int = Field(5, ge=3, le=20, title="Folds", description="Of the cross-validation, from 3 to 20.")
    shares: list[Share] = Field(
        default=[1.0, 0.5, 0.1],
        title="Support shares",
        description="Of the labelled connectomes of the training folds, each above 0 and at most 1; the first is what "
        "other rows are compared with.",
        min_length=1,
        max_length=10,
    )
    draws: int = Field(5, ge=1, le=100, title="Draws", description="Of every support below 1, from 1 to 100.")
    variants: list[Variant] = Field(
        default=list(VARIANTS),
        title="Variants",
        description="mean: cosine to the mean of a class; nearest: to its most similar connectome; knn: mean of the k "
        "highest cosines. The first is what other rows are compared with.",
        min_length=1,
    )
    k: int = Field(5, ge=1, le=1000, title="k", description="Connectomes of a class that knn takes, from 1 to 1000.")
    seed: int = Field(0, ge=0, title="Seed", description="Of the first draw, 0 or more; others count up from it.")
    network_epochs: int = Field(
        200,
        ge=0,
        le=10000,
        title="Epochs of the supervised network",
        description="Of the baseline that is trained on connectomes in every fold, up to 10000; 0: no such row.",
    )
    with_seen: bool = Field(
        True,
        title="Also with who was seen",
        description="Score once more, by the first variant and share, with the subjects that a pre-training has seen, "
        "for the table of leaks; off: they are listed alone. Of a large pre-training on the same data it costs much.",
    )
    layouts: list[str] = Field(
        default_factory=list,
        title="Layouts",
        description="YAML files that say how a dataset names its phenotypes; they win over the ones in the package.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_names([*self.rows, *self.image_only], RESERVED)
        for name, values in (("shares", self.shares), ("variants", self.variants)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {values}")
        return self

    @property
    def settings(self) -> PromptSettings:
        """What the rows are made with."""
        epochs = self.network_epochs
        return PromptSettings(
            tuple(self.variants),
            tuple(self.shares),
            self.draws,
            self.k,
            self.seed,
            NetworkClassificationConfig(epochs=epochs) if epochs else None,
        )


def run_name(params: PromptParams) -> str:
    """Return `prompt <first row> on <tasks>`, shortened after three."""
    return f"prompt {params.rows[0].name} on {few(params.benchmarks)}"


def _run_name() -> str:
    return run_name(params_of(PromptParams))


@dataclass(frozen=True)
class Prompting:
    """Everything that a flow run compares."""

    workspace: Path
    store: Store
    digest: str
    """Of the store."""
    pairs: tuple[PairRow, ...]
    images: tuple[ImageRow, ...]
    cohorts: tuple[PromptCohort, ...]
    """Also those without data."""
    unchecked: tuple[str, ...] = ()
    """Sentences on trainings of which it is not known whom they have seen."""

    @property
    def encoders(self) -> list[EncoderRow]:
        """All trainings, as rows of encoders of images."""
        pairs = [EncoderRow(row.name, tuple(one.encoder for one in row.pairs), row.together) for row in self.pairs]
        return [*pairs, *(one.row for one in self.images)]


@task(name="score", task_run_name="prompt {name}", cache_policy=NO_CACHE)
def score(name: str, cohort: PromptCohort, rows: Sequence[Row], embedder: Embedder) -> tuple[pd.DataFrame, int]:
    """Return the scores of all rows of one task and how many were computed now; unchanged ones are read back."""
    scored = [row for row in rows if row.seeds]
    finished: list[str] = []
    with Progress(f"prompt {name}", len(scored), "rows") as progress:

        def done(row: str) -> None:
            finished.append(row)
            progress.update(len(finished), note=row)

        embedder.progress = lambda note: progress.update(len(finished), note=note)
        return score_rows(cohort, rows, embedder.workspace, done)


@flow(name="prompt", flow_run_name=_run_name)
def prompt(params: PromptParams) -> dict[str, Any]:
    """Embed, prompt, probe and report; what is computed and unchanged is not computed again."""
    with gpu_turn():
        return compare(params)


def compare(params: PromptParams) -> dict[str, Any]:
    """Do what the flow does, in its turn on the GPUs."""
    made = read_prompting(params)
    folder, date = made.workspace / "prompts", datetime.now(UTC).date().isoformat()
    notes = [
        *ensemble_notes(made.encoders),
        *import_notes(made.encoders),
        *untrained_notes(made.pairs),
        *made.unchecked,
    ]
    sections, scores, fresh = [], [], 0
    for cohort in made.cohorts:
        section = empty_section(cohort.everybody, date)
        if cohort.everybody.cases:
            embedder = Embedder(cohort, made.workspace)
            rows = make_rows(cohort, made.pairs, made.images, params.settings, embedder)
            frame, computed = score(cohort.benchmark.name, cohort, rows, embedder)
            scores.append(frame)
            fresh += computed
            facts = [
                ("store digest", made.digest),
                ("folds digest", cohort.everybody.folds_digest),
                *weights_of(made.encoders),
            ]
            section = prompt_section(cohort, made.pairs, rows, frame, params.settings, embedder, notes, facts, date)
            section, more = with_leaks(made, cohort, params, with_confusion(section, frame), frame)
            fresh += more
        sections.append(section)
        write_section(section, folder / "tables")
    if scores:
        write_scores(pd.concat(scores, ignore_index=True), folder / "scores.parquet", "all prompting tasks")
    publish_tables([section.table for section in sections], folder / "tables")
    page, empty = folder / "index.html", partial(empty_section, date=date)
    words = [
        "Every encoder is frozen. Images are told apart by labelled connectomes of other subjects, and nothing is "
        "fitted; subjects that a pre-training has seen are left out.",
        *notes,
    ]
    cohorts = tuple(cohort.everybody for cohort in made.cohorts)
    methods = prompt_methods(Compared(made.workspace, made.store, tuple(made.encoders), cohorts), params.settings)
    found = write_page(page, "prompts", made.store, made.encoders, sections, PROMPT_TASKS, empty, words, date, methods)
    return {**found, "scored": fresh}


def with_leaks(
    made: Prompting, cohort: PromptCohort, params: PromptParams, section: TableSection, scores: pd.DataFrame
) -> tuple[TableSection, int]:
    """Return the section with the table of leaks, where a pre-training has seen somebody, and how many scores were
    computed for it: with them, by the first variant and the first share alone, and without a supervised network."""
    everyone, settings = cohort.everyone, params.settings
    if everyone is None:
        return section, 0
    few = replace(settings, variants=settings.variants[:1], shares=settings.shares[:1], classifier=None)
    embedder = Embedder(everyone, made.workspace)
    rows = make_rows(everyone, made.pairs, made.images, few, embedder)
    other, fresh = pd.DataFrame(), 0
    if params.with_seen:
        other, fresh = score(everyone.benchmark.name, everyone, rows, embedder)
    table = fold_leak_table(cohort.everybody, scores, other, kinds_of(rows))
    return replace(section, further={"leaks": table}), fresh


def read_prompting(params: PromptParams) -> Prompting:
    """Find trainings, people and cohorts; raises what is wrong with them before anything is computed."""
    tasks = [find_prompt_task(name) for name in dict.fromkeys(params.benchmarks)]
    workspace = Path(params.workspace).resolve()
    store = open_store(store_in(params.workspace, params.store))
    sources = {name: trained_pair(folder) for name, folder in _folders(workspace, params.rows).items()}
    for source in sources.values():
        check_pair(source, store, sorted({task.modalities[0] for task in tasks}))
    pairs = tuple(
        PairRow(row.name, tuple(sources[name] for name in row.trainings), row.together) for row in params.rows
    )
    images = tuple(_image_row(row, workspace) for row in params.image_only)
    folders = _folders(workspace, [*params.rows, *params.image_only]).values()
    people, seen, unchecked = people_and_seen(workspace, store, params.layouts, folders)
    cohorts = tuple(
        find_prompt_cohort(
            task, store, people, workspace, params.folds, seen, read_latents(workspace / "sources", task.datasets)
        )
        for task in tasks
    )
    return Prompting(workspace, store, store_digest(store.url), pairs, images, cohorts, unchecked)


def _folders(workspace: Path, rows: Iterable[TrainingRow]) -> dict[str, Path]:
    return {name: workspace / "trainings" / name for row in rows for name in row.trainings}


def _image_row(row: TrainingRow, workspace: Path) -> ImageRow:
    sources = {name: trained_encoder(folder) for name, folder in _folders(workspace, [row]).items()}
    kinds = {_objective(one.folder) for one in sources.values() if one.folder}
    return ImageRow(encoder_row(row, sources), kinds.pop() if len(kinds) == 1 else "other")


def _objective(training: Path) -> Literal["mae", "supervised", "other"]:
    objective = read_settings(training)[0].objective
    if isinstance(objective, ClassificationConfig):
        return "supervised"
    return "mae" if isinstance(objective, CINPConfig) and not objective.uses_networks else "other"


def untrained_notes(rows: Iterable[PairRow]) -> list[str]:
    """Return a sentence for each training whose projections no loss has moved: what prompting with it means."""
    return [
        f"{one.name} was trained without contrast: its projections are as they were initialised, prompting with it is "
        "expected to guess."
        for row in rows
        for one in row.pairs
        if _without_contrast(one)
    ]


def _without_contrast(source: PairSource) -> bool:
    assert source.encoder.folder is not None
    objective = read_settings(source.encoder.folder)[0].objective
    return isinstance(objective, CINPConfig) and not objective.weight_contrast
