"""Evaluate: fine-tune a pre-trained encoder and the same network from scratch, score both, write tables and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.evaluate_params import EvaluateParams, run_name
from flows.forms import params_of
from flows.progress import Progress
from flows.results import publish_tables, write_section
from infra.storage import write_bytes
from models.records import digest_of
from models.schedule import plan_steps
from models.selection import read_selection
from models.store import open_store
from tasks import finetune
from tasks.benchmarks import BENCHMARKS, find_benchmark
from tasks.duplicates import links as near_duplicates
from tasks.evaluation import (
    KINDS,
    Cohort,
    find_cohort,
    make_section,
    make_table,
    native_cohort,
    score_baselines,
    score_trainings,
    with_further,
    without_seen,
)
from tasks.finetune import Finetuning
from tasks.label_efficiency import (
    label_table,
    of_share,
    share_cohort,
)
from tasks.latents import read_latents
from tasks.launch import launch
from tasks.leaks import leak_table
from tasks.methods_text import MethodsText, methods_text
from tasks.missing import applies, missing_table, score_missing
from tasks.phenotype_layouts import with_layouts
from tasks.report import TableSection, write_report
from tasks.report_content import Made, provenance, report_content
from tasks.scores import write_scores
from tasks.splits import made_from, people_of, roles, workspace_split
from tasks.statistics import REPLICATES
from tasks.tables import BenchmarkTable, FurtherTable

Further = dict[str, dict[str, FurtherTable]]
"""By kind and benchmark: the tables beside the main ones."""


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


@task(name="score fewer labels", task_run_name="score {name}", cache_policy=NO_CACHE)
def score_share(name: str, cohort: Cohort, trainings: Sequence[Finetuning], folder: Path) -> tuple[pd.DataFrame, int]:
    """Score the trainings of one benchmark on a share of its labels; unchanged ones are read back."""
    return score_trainings(cohort, trainings, folder)


@flow(name="evaluate", flow_run_name=_run_name)
def evaluate(params: EvaluateParams) -> dict[str, Any]:
    """Fine-tune, score and report; what is finished and unchanged is not done again."""
    for name in params.benchmarks:
        find_benchmark(name)
    workspace = Path(params.workspace).resolve()
    made, cohorts = _read_workspace(params, workspace)
    present = _without_seen(workspace / "trainings" / params.pretrained, made, cohorts)
    trainings = _prepare(params, workspace, made, present)
    fewer = [one for share in params.label_shares for one in _prepare(params, workspace, made, present, share)]
    trained = fine_tune([*trainings, *fewer], params.lanes) if trainings else 0
    scored = [cohort for cohort in present if cohort.benchmark.kind == "segmentation"] if params.native_scores else []
    native = [native_cohort(cohort) for cohort in scored]
    scores, leaks, computed = _score_all(params, [*present, *native], trainings, workspace / "scores")
    missing, more = _score_all_missing(params, made, present, trainings)
    labels, most = _score_fewer_labels(params, made, present, fewer, scores)
    further: Further = {"leaks": leaks, "missing": missing, "labels": labels}
    there = {cohort.benchmark.name: cohort for cohort in present}
    cohorts = [*(there.get(cohort.benchmark.name, cohort) for cohort in cohorts), *native]
    methods = methods_text(made, trainings, [cohort.benchmark for cohort in present], params.replicates)
    inputs = _inputs(params, made, trainings, cohorts, further, methods)
    kept = finetune.read_json(workspace / "report" / "evaluation.json") or {}
    if kept.get("inputs") != inputs or not _results_exist(workspace, kept["digests"]):
        kept = {"inputs": inputs, **_write_results(params, made, cohorts, trainings, scores, further, methods)}
        write_bytes(str(workspace / "report" / "evaluation.json"), json.dumps(kept, indent=1).encode())
    publish_tables([BenchmarkTable.model_validate(table) for table in kept["tables"]], workspace / "tables")
    return {
        "report": str(workspace / "report" / "index.html"),
        "tables": kept["digests"],
        "trained": trained,
        "scored": computed + more + most,
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
    further: Further,
    methods: MethodsText,
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
            "further": {
                f"{kind} {name}": [table.to_markdown(), table.to_csv()]
                for kind, found in further.items()
                for name, table in found.items()
            },
            "methods": methods.to_markdown(),
        }
    )


def _write_results(
    params: EvaluateParams,
    made: Made,
    cohorts: Sequence[Cohort],
    trainings: Sequence[Finetuning],
    scores: pd.DataFrame,
    further: Further,
    methods: MethodsText,
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
        beside = {kind: found[name] for kind, found in further.items() if name in found}
        sections[name] = with_further(make_section(table, cohort, mine, part), beside)
        write_section(sections[name], made.workspace / "tables")
    shown = [section for section in sections.values() if section.table.has_scores]
    absent = [section for section in sections.values() if not section.table.has_scores]
    others = [_absent_section(name, made, date) for name in BENCHMARKS if name not in sections]
    page = report_content(made, trainings, shown, [*absent, *others], methods, date)
    write_report(page, made.workspace / "report" / "index.html")
    write_bytes(str(made.workspace / "report" / "methods.md"), methods.to_markdown().encode("utf-8"))
    return {
        "tables": [section.table.model_dump(mode="json") for section in sections.values()],
        "digests": {name: section.table.digest for name, section in sections.items()},
        "no_data": [section.table.benchmark.name for section in absent],
    }


def _read_workspace(params: EvaluateParams, workspace: Path) -> tuple[Made, list[Cohort]]:
    store = open_store(str(workspace / "store.zarr"))
    cases = store.cases().to_pandas()
    people = with_layouts(people_of(cases, workspace))
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


def _without_seen(pretrained: Path, made: Made, cohorts: Sequence[Cohort]) -> list[Cohort]:
    """Return the cohorts with data, the test subjects set aside that the pre-training has seen."""
    present = [cohort for cohort in cohorts if cohort.selected]
    if not present:
        return []
    finetune.pretrained_digest(pretrained)
    seen, links = read_selection(pretrained / "selection.parquet"), near_duplicates(made.store.url)
    return [without_seen(seen, cohort, links) for cohort in present]


def _prepare(
    params: EvaluateParams, workspace: Path, made: Made, cohorts: Sequence[Cohort], share: float = 1.0
) -> list[Finetuning]:
    pretrained = workspace / "trainings" / params.pretrained
    if not cohorts:
        return []
    run = finetune.read_json(pretrained / "run.json") or {}
    size = "tiny" if str(run.get("recipe", "")).endswith("_tiny") else "full"
    common = (
        made.store.url,
        workspace / "trainings",
        pretrained,
        params.seeds,
        params.epochs,
        size,
        params.template_mix and share == 1,
        made.tables,
        share,
    )
    return [
        one
        for cohort in cohorts
        for one in finetune.prepare(of_share(cohort.benchmark, share), cohort.selected, *common)
    ]


def _score_all(
    params: EvaluateParams, cohorts: Sequence[Cohort], trainings: Sequence[Finetuning], folder: Path
) -> tuple[pd.DataFrame, dict[str, FurtherTable], int]:
    """Return the scores that count, the tables of leaks by benchmark, and how many rows were computed now."""
    frames: list[pd.DataFrame] = []
    leaks: dict[str, FurtherTable] = {}
    computed = 0
    with Progress("score", len(cohorts), "benchmarks") as progress:
        for k, cohort in enumerate(cohorts):
            name = cohort.benchmark.name
            frame, fresh = score(name, cohort, cohort.own(trainings), folder)
            frames.append(cohort.without_leaks(frame))
            if cohort.leaks:
                leaks[name] = leak_table(cohort, frame, KINDS, params.replicates)
            computed += fresh
            progress.update(k + 1, note=f"{name}: {fresh} rows computed")
    scores = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    if len(scores):
        write_scores(scores, folder.parent / "scores.parquet", "all benchmarks")
    return scores, leaks, computed


def _score_all_missing(
    params: EvaluateParams, made: Made, cohorts: Sequence[Cohort], trainings: Sequence[Finetuning]
) -> tuple[dict[str, FurtherTable], int]:
    """Return the tables without single modalities by benchmark, and how many trainings were scored now."""
    found: dict[str, FurtherTable] = {}
    computed = 0
    for cohort in cohorts if params.missing_modalities else ():
        if not applies(cohort):
            continue
        name, title = cohort.benchmark.name, f"{cohort.benchmark.title} without one modality"
        mine = cohort.own(trainings)
        pretrained = made.workspace / "trainings" / made.pretrained
        frame, fresh = score_without(name, cohort, mine, pretrained, made.workspace / "scores")
        found[name] = missing_table(title, cohort.without_leaks(frame), params.replicates)
        computed += fresh
    return found, computed


def _score_fewer_labels(
    params: EvaluateParams,
    made: Made,
    cohorts: Sequence[Cohort],
    trainings: Sequence[Finetuning],
    scores: pd.DataFrame,
) -> tuple[dict[str, FurtherTable], int]:
    """Return the tables of fewer labels by benchmark, and how many trainings were scored now; scores: of all labels."""
    found: dict[str, FurtherTable] = {}
    computed = 0
    for cohort in cohorts if params.label_shares else ():
        frames = {1.0: scores[scores["benchmark"] == cohort.benchmark.name]}
        for share in params.label_shares:
            own = share_cohort(cohort, share)
            frame, fresh = score_share(own.benchmark.name, own, own.own(trainings), made.workspace / "scores")
            frames[share] = own.without_leaks(frame)
            computed += fresh
        found[cohort.benchmark.name] = label_table(cohort, frames, params.replicates)
    return found, computed


def _absent_section(name: str, made: Made, date: str) -> TableSection:
    cohort = Cohort(find_benchmark(name), (), made.cases, made.store)
    table = make_table(cohort, pd.DataFrame(), (), (), date, REPLICATES)
    return make_section(table, cohort, (), pd.DataFrame())
