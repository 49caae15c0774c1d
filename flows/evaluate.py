"""Evaluate: fine-tune a pre-trained encoder and the same network from scratch, score both, write tables and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, Field

from flows.artifacts import png_markdown, publish_markdown, publish_table
from flows.forms import few, params_of, workspace_field
from flows.progress import Progress
from infra.storage import write_bytes
from models.records import digest_of
from models.schedule import plan_steps
from models.selection import read_selection
from models.store import open_store
from tasks import finetune, tables
from tasks.benchmarks import BENCHMARKS, PHANTOM_BENCHMARKS, find_benchmark
from tasks.evaluation import (
    NATIVE,
    Cohort,
    check_leakage,
    find_cohort,
    make_section,
    make_table,
    native_cohort,
    score_baselines,
    score_trainings,
)
from tasks.finetune import Finetuning
from tasks.latents import read_latents
from tasks.launch import launch
from tasks.missing import MissingTable, applies, missing_table, score_missing
from tasks.report import TableSection, write_report
from tasks.report_content import Made, provenance, report_content
from tasks.scores import write_scores
from tasks.splits import made_from, people_of, roles, workspace_split
from tasks.statistics import REPLICATES
from tasks.tables import BenchmarkTable

BenchmarkName = Annotated[str, Field(json_schema_extra={"enum": list(BENCHMARKS)})]
"""The form offers the registered ones."""


class EvaluateParams(BaseModel):
    """Which pre-training to evaluate, on what, and with which budget."""

    model_config = ConfigDict(extra="forbid", title="Evaluate")

    workspace: str = workspace_field(
        "Folder with the store, the splits and the trainings; tables and report are written into it."
    )
    pretrained: str = Field(
        title="Pre-training",
        description="Name of a finished training in <workspace>/trainings whose encoder is fine-tuned.",
        min_length=1,
        examples=["brainmvp_tiny"],
    )
    benchmarks: list[BenchmarkName] = Field(
        default=list(PHANTOM_BENCHMARKS),
        title="Benchmarks",
        description="Names of registered benchmarks, at least one; those without data in the store show `no data`.",
        min_length=1,
        examples=[list(PHANTOM_BENCHMARKS)],
    )
    seeds: int = Field(3, ge=1, le=20, title="Seeds", description="Trainings of each row, from 1 to 20.")
    epochs: int | None = Field(
        None, ge=1, title="Epochs", description="Of every fine-tuning, at least 1; empty: as the recipe says."
    )
    lanes: int = Field(
        2, ge=1, le=64, title="Lanes", description="Fine-tunings that run at the same time on this host, from 1 to 64."
    )
    template_mix: bool = Field(
        False,
        title="Template mix",
        description="Train a third row at the same budget: pre-trained, learned templates mixed into the channels.",
    )
    missing_modalities: bool = Field(
        False,
        title="Missing modalities",
        description="Predict segmentations again without each modality: zeros against the learned template.",
    )
    native_scores: bool = Field(
        False,
        title="Native scores",
        description="Score segmentations a second time on the grids of their label files, which must still be there.",
    )
    split: str = Field(
        "default",
        title="Split",
        description="Name of the split in <workspace>/splits: letters, digits, dashes and underscores.",
        pattern=r"^[A-Za-z0-9_-]+$",
    )
    replicates: int = Field(
        REPLICATES, ge=200, le=100_000, title="Bootstrap replicates", description="From 200 to 100,000."
    )


def run_name(params: EvaluateParams) -> str:
    """Return `evaluate <pre-training> on <benchmarks>`, shortened after three."""
    return f"evaluate {params.pretrained} on {few(params.benchmarks)}"


def _run_name() -> str:
    return run_name(params_of(EvaluateParams))


@task(name="fine-tune", cache_policy=NO_CACHE)
def fine_tune(trainings: Sequence[Finetuning], lanes: int) -> int:
    """Run all unfinished fine-tunings and return how many were run; see tasks.finetune.run_lanes."""
    steps = {one.folder.name: _steps(one) for one in trainings}
    done = {one.folder.name: steps[one.folder.name] for one in trainings if one.finished}
    with Progress("fine-tune", sum(steps.values()), "steps") as progress:
        progress.update(sum(done.values()), note=f"{len(done)} of {len(trainings)} trainings found finished")

        def show(line: dict[str, Any]) -> None:
            name = str(line["training"])
            done[name] = max(done.get(name, 0), int(line["step"]))
            progress.update(sum(done.values()), note=name)

        return finetune.run_lanes(trainings, lanes, launch, show)


def _steps(training: Finetuning) -> int:
    cases = sum(case.role == "train" for case in read_selection(training.folder / "selection.parquet"))
    return plan_steps(training.config, cases, 1).total_steps


@task(name="score", task_run_name="score {name}", cache_policy=NO_CACHE)
def score(name: str, cohort: Cohort, trainings: Sequence[Finetuning], folder: Path) -> tuple[pd.DataFrame, int]:
    """Score all rows of one benchmark; unchanged rows are read back. See tasks.evaluation."""
    ours, fresh = score_trainings(cohort, trainings, folder)
    simple, more = score_baselines(cohort, folder, seeds=len({one.seed for one in trainings}))
    return pd.concat([ours, simple], ignore_index=True), fresh + more


@task(name="score without modalities", task_run_name="score {name} without modalities", cache_policy=NO_CACHE)
def score_without(
    name: str, cohort: Cohort, trainings: Sequence[Finetuning], pretrained: Path, folder: Path
) -> tuple[pd.DataFrame, int]:
    """Score the trainings of one benchmark without each modality; unchanged ones are read back. See tasks.missing."""
    return score_missing(cohort, trainings, pretrained, folder)


@flow(name="evaluate", flow_run_name=_run_name)
def evaluate(params: EvaluateParams) -> dict[str, Any]:
    """Fine-tune, score and report; what is finished and unchanged is not done again."""
    for name in params.benchmarks:
        find_benchmark(name)
    workspace = Path(params.workspace).resolve()
    made, cohorts = _read_workspace(params, workspace)
    present = [cohort for cohort in cohorts if cohort.selected]
    trainings = _prepare(params, workspace, made, present)
    trained = fine_tune(list(trainings), params.lanes) if trainings else 0
    scored = [cohort for cohort in present if cohort.benchmark.kind == "segmentation"] if params.native_scores else []
    native = [native_cohort(cohort) for cohort in scored]
    scores, computed = _score_all([*present, *native], trainings, workspace / "scores")
    missing, more = _score_all_missing(params, made, present, trainings)
    cohorts = [*cohorts, *native]
    inputs = _inputs(params, made, trainings, cohorts, missing)
    kept = finetune.read_json(workspace / "report" / "evaluation.json") or {}
    if kept.get("inputs") != inputs or not _results_exist(workspace, kept["digests"]):
        kept = {"inputs": inputs, **_write_results(params, made, cohorts, trainings, scores, missing)}
        write_bytes(str(workspace / "report" / "evaluation.json"), json.dumps(kept, indent=1).encode())
    publish_tables([BenchmarkTable.model_validate(table) for table in kept["tables"]], workspace / "tables")
    return {
        "report": str(workspace / "report" / "index.html"),
        "tables": kept["digests"],
        "trained": trained,
        "scored": computed + more,
        "no_data": kept["no_data"],
    }


def _results_exist(workspace: Path, names: Iterable[str]) -> bool:
    """Return whether the report and the table of each of these benchmarks are on disk."""
    tables_written = (workspace / "tables" / f"{name}.md" for name in names)
    return all(path.exists() for path in (workspace / "report" / "index.html", *tables_written))


def _inputs(
    params: EvaluateParams,
    made: Made,
    trainings: Sequence[Finetuning],
    cohorts: Sequence[Cohort],
    missing: dict[str, MissingTable],
) -> str:
    """Return the digest of everything that decides tables and report."""
    scores = made.workspace / "scores.parquet"
    return digest_of(
        {
            "params": params.model_dump(mode="json", exclude={"workspace", "lanes"}),
            "provenance": provenance(made, trainings),
            "benchmarks": [benchmark.content_digest() for benchmark in BENCHMARKS.values()],
            "cases": [[case.model_dump(mode="json") for case in cohort.selected] for cohort in cohorts],
            "scores": hashlib.sha256(scores.read_bytes()).hexdigest() if scores.exists() else "",
            "missing": {name: table.model_dump(mode="json") for name, table in missing.items()},
        }
    )


def _write_results(
    params: EvaluateParams,
    made: Made,
    cohorts: Sequence[Cohort],
    trainings: Sequence[Finetuning],
    scores: pd.DataFrame,
    missing: dict[str, MissingTable],
) -> dict[str, Any]:
    """Write tables, pictures and the report; return what the next flow run needs to show them again."""
    date = datetime.now(UTC).date().isoformat()
    facts = provenance(made)[:3]
    sections: dict[str, TableSection] = {}
    for cohort in cohorts:
        name = cohort.benchmark.name
        mine = cohort.own(trainings)
        part = scores[scores["benchmark"] == name] if len(scores) else scores
        table = make_table(cohort, part, mine, facts, date, params.replicates)
        sections[name] = replace(make_section(table, cohort, mine, part), missing=missing.get(name))
        write_section(sections[name], made.workspace / "tables")
    shown = [section for section in sections.values() if section.table.has_scores]
    absent = [section for section in sections.values() if not section.table.has_scores]
    others = [_absent_section(name, made, date) for name in BENCHMARKS if name not in sections]
    page = report_content(made, trainings, shown, [*absent, *others], date)
    write_report(page, made.workspace / "report" / "index.html")
    return {
        "tables": [section.table.model_dump(mode="json") for section in sections.values()],
        "digests": {name: section.table.digest for name, section in sections.items()},
        "no_data": [section.table.benchmark.name for section in absent],
    }


def _read_workspace(params: EvaluateParams, workspace: Path) -> tuple[Made, list[Cohort]]:
    store = open_store(str(workspace / "store.zarr"))
    cases = store.cases().to_pandas()
    people = people_of(cases, workspace)
    split, digest = workspace_split(workspace, params.split, store.url, people)
    by_subject = roles(split)
    tables_used = made_from(workspace, params.split, digest)
    made = Made(workspace, store, cases, split, tables_used, params.pretrained)
    cohorts = []
    for name in dict.fromkeys(params.benchmarks):
        benchmark = find_benchmark(name)
        cohorts.append(
            find_cohort(benchmark, store, people, by_subject, read_latents(workspace / "sources", benchmark.datasets))
        )
    return made, cohorts


def _prepare(params: EvaluateParams, workspace: Path, made: Made, cohorts: Sequence[Cohort]) -> list[Finetuning]:
    pretrained = workspace / "trainings" / params.pretrained
    if not cohorts:
        return []
    finetune.pretrained_digest(pretrained)
    seen = read_selection(pretrained / "selection.parquet")
    for cohort in cohorts:
        check_leakage(seen, cohort)
    run = finetune.read_json(pretrained / "run.json") or {}
    size = "tiny" if str(run.get("recipe", "")).endswith("_tiny") else "full"
    common = (
        made.store.url,
        workspace / "trainings",
        pretrained,
        params.seeds,
        params.epochs,
        size,
        params.template_mix,
        made.tables,
    )
    return [one for cohort in cohorts for one in finetune.prepare(cohort.benchmark, cohort.selected, *common)]


def _score_all(cohorts: Sequence[Cohort], trainings: Sequence[Finetuning], folder: Path) -> tuple[pd.DataFrame, int]:
    frames, computed = [], 0
    with Progress("score", len(cohorts), "benchmarks") as progress:
        for k, cohort in enumerate(cohorts):
            name = cohort.benchmark.name
            frame, fresh = score(name, cohort, cohort.own(trainings), folder)
            frames.append(frame)
            computed += fresh
            progress.update(k + 1, note=f"{name}: {fresh} rows computed")
    scores = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    if len(scores):
        write_scores(scores, folder.parent / "scores.parquet", "all benchmarks")
    return scores, computed


def _score_all_missing(
    params: EvaluateParams, made: Made, cohorts: Sequence[Cohort], trainings: Sequence[Finetuning]
) -> tuple[dict[str, MissingTable], int]:
    """Return the tables without single modalities by benchmark, and how many trainings were scored now."""
    found: dict[str, MissingTable] = {}
    computed = 0
    for cohort in cohorts if params.missing_modalities else ():
        if not applies(cohort):
            continue
        name, title = cohort.benchmark.name, f"{cohort.benchmark.title} without one modality"
        mine = cohort.own(trainings)
        pretrained = made.workspace / "trainings" / made.pretrained
        frame, fresh = score_without(name, cohort, mine, pretrained, made.workspace / "scores")
        found[name] = missing_table(title, frame, params.replicates)
        computed += fresh
    return found, computed


def publish_tables(found: Sequence[BenchmarkTable], folder: Path) -> None:
    """Publish every table with its pictures as artifacts of this flow run."""
    for table in found:
        name = table.benchmark.name
        pictures = [png_markdown(path.read_bytes(), path.stem) for path in sorted(folder.glob(f"{name}.*.png"))]
        more = [path.read_text(encoding="utf-8") for path in folder.glob(f"{name}.missing.md")]
        text = "\n\n".join([tables.to_markdown(table), *more, *pictures])
        publish_markdown(f"benchmark-{name}", text, "Benchmark table")
        publish_table(f"scores-{name}", tables.artifact_rows(table), table.benchmark.title)


def write_section(section: TableSection, folder: Path) -> None:
    """Write `<benchmark>.md`, `.csv` and `.tex`, and what there is of `.<k>.png`, `.missing.*` and `.reliability.csv`.

    What an earlier evaluation left and this one does not write is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, table = section.table.benchmark.name, section.table
    for suffix, text in (
        ("md", tables.to_markdown(table)),
        ("csv", tables.to_csv(table)),
        ("tex", tables.to_latex(table)),
    ):
        write_bytes(str(folder / f"{name}.{suffix}"), text.encode("utf-8"))
    stale_files = (f"{name}.*.png", f"{name}.missing.*", f"{name}.reliability.csv", f"{name}{NATIVE}.*")
    for stale in (path for pattern in stale_files for path in folder.glob(pattern)):
        stale.unlink()
    for k, picture in enumerate(section.pictures):
        write_bytes(str(folder / f"{name}.{k}.png"), picture.png)
    if section.reliability is not None:
        write_bytes(str(folder / f"{name}.reliability.csv"), section.reliability.to_csv(index=False).encode())
    if section.missing is not None:
        write_bytes(str(folder / f"{name}.missing.md"), section.missing.to_markdown().encode())
        write_bytes(str(folder / f"{name}.missing.csv"), section.missing.to_csv().encode())


def _absent_section(name: str, made: Made, date: str) -> TableSection:
    cohort = Cohort(find_benchmark(name), (), made.cases, made.store)
    table = make_table(cohort, pd.DataFrame(), (), (), date, REPLICATES)
    return make_section(table, cohort, (), pd.DataFrame())
