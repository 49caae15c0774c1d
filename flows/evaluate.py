"""Evaluate: fine-tune pre-trained encoders and networks from scratch, score all rows, write tables and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.case_workers import CaseWorkers
from flows.evaluate_params import EvaluateParams, run_name
from flows.evaluate_report import Evaluated, Further, kept_or_written
from flows.forms import params_of
from flows.gpu_turn import gpu_turn
from flows.launching import Launch, launch_settings, launcher
from flows.progress import Progress
from flows.results import publish_tables
from infra.settings import Settings
from models.gpu_turn import need_gpus
from models.schedule import plan_steps
from models.selection import read_selection
from models.store import open_store
from tasks import finetune, lanes
from tasks.baseline_scores import score_baselines
from tasks.benchmarks import find_benchmark
from tasks.case_map import HERE, CaseMap
from tasks.crosswalk import crosswalk_links
from tasks.duplicates import links as near_duplicates
from tasks.evaluation import (
    KINDS,
    Cohort,
    find_cohort,
    native_cohort,
    without_seen_by_any,
)
from tasks.finetune import Finetuning
from tasks.gains import gain_table
from tasks.label_efficiency import label_table, of_share, share_cohort
from tasks.latents import read_latents
from tasks.launch import launch
from tasks.leaks import leak_table
from tasks.missing import applies, missing_table, score_missing
from tasks.native_truth import SourceLabels
from tasks.others import check_others, score_others
from tasks.phenotype_layouts import with_layouts
from tasks.report_content import Made
from tasks.rows import Row, rows_for, scratch_of, training_rows
from tasks.scores import write_scores
from tasks.seed_variance import seed_table
from tasks.seen_prints import seen_elsewhere
from tasks.serving import check_runs, check_templates
from tasks.splits import made_from, people_of, roles, workspace_split
from tasks.summary import MIXED
from tasks.tables import BenchmarkTable, FurtherTable
from tasks.trained_scores import score_trainings


def _run_name() -> str:
    return run_name(params_of(EvaluateParams))


@task(name="fine-tune", cache_policy=NO_CACHE)
def fine_tune(trainings: Sequence[Finetuning], count: int, where: Launch = "local") -> int:
    """Run all unfinished fine-tunings, `count` at a time, and return how many were run; see tasks.lanes."""
    steps = {one.folder.name: _steps(one) for one in trainings}
    done = {one.folder.name: steps[one.folder.name] for one in trainings if one.finished}
    if where != "slurm" and any(one.to_launch for one in trainings):  # SLURM has queues of its own
        need_gpus()  # here: threads do not know whom to ask
    with Progress("fine-tune", sum(steps.values()), "steps") as progress:
        progress.update(sum(done.values()), note=f"{len(done)} of {len(trainings)} trainings found finished")

        def show(line: dict[str, Any]) -> None:
            name = str(line["training"])
            done[name] = max(done.get(name, 0), int(line["step"]))
            progress.update(sum(done.values()), note=name)

        # One rank each, so on one node each, whatever the settings say of pre-trainings.
        start = launch if where == "local" else launcher(launch_settings(where, 1))
        return lanes.run_lanes(trainings, count, start, show)


def _steps(training: Finetuning) -> int:
    cases = sum(case.role == "train" for case in read_selection(training.folder / "selection.parquet"))
    return plan_steps(training.config, cases, 1).total_steps


@task(name="score", task_run_name="score {name}", cache_policy=NO_CACHE)
def score(
    name: str, cohort: Cohort, trainings: Sequence[Finetuning], folder: Path, work: CaseMap = HERE
) -> tuple[pd.DataFrame, int]:
    """Score all rows of one benchmark; unchanged rows are read back. See tasks.trained_scores."""
    ours, fresh = score_trainings(cohort, trainings, folder, work)
    simple, more = score_baselines(cohort, folder, len({one.own_seed for one in trainings}), work)
    theirs, most = score_others(cohort, folder, work)
    return pd.concat([ours, simple, theirs], ignore_index=True), fresh + more + most


@task(name="score without modalities", task_run_name="score {name} without modalities", cache_policy=NO_CACHE)
def score_without(
    name: str, cohort: Cohort, trainings: Sequence[Finetuning], pretrained: Path, folder: Path, work: CaseMap = HERE
) -> tuple[pd.DataFrame, int]:
    """Score the trainings of one benchmark without each modality; unchanged ones are read back. See tasks.missing."""
    return score_missing(cohort, trainings, pretrained, folder, work)


@task(name="score fewer labels", task_run_name="score {name}", cache_policy=NO_CACHE)
def score_share(
    name: str, cohort: Cohort, trainings: Sequence[Finetuning], folder: Path, work: CaseMap = HERE
) -> tuple[pd.DataFrame, int]:
    """Score the trainings of one benchmark on a share of its labels; unchanged ones are read back."""
    return score_trainings(cohort, trainings, folder, work)


@dataclass(frozen=True)
class Compared:
    """What a flow run compares: pre-trainings, the rows that are trained, and cohorts with data."""

    params: EvaluateParams
    made: Made
    rows: tuple[Row, ...]
    cohorts: tuple[Cohort, ...]
    """The test subjects set aside that any of the pre-trainings has seen."""

    @property
    def scores(self) -> Path:
        """Folder of the kept scores."""
        return self.made.workspace / "scores"

    def own_rows(self, cohort: Cohort) -> list[Row]:
        """Return the rows that a benchmark trains."""
        return rows_for(cohort.benchmark, self.rows)

    def first(self, cohort: Cohort) -> str:
        """Return the row that the others of a benchmark are compared with."""
        return self.own_rows(cohort)[0].name

    def prepare(self, share: float = 1.0) -> list[Finetuning]:
        """Return the fine-tunings on a share of the labels; the mix is trained on all labels alone."""
        rows = [row for row in self.rows if share == 1 or not row.mix]
        size = _size(self.made.runs[0].folder)
        return [
            one
            for cohort in self.cohorts
            for one in finetune.prepare(
                of_share(cohort.benchmark, share),
                cohort.selected,
                self.made.store.url,
                self.made.workspace / "trainings",
                rows_for(cohort.benchmark, rows),
                self.params.seeds,
                self.params.epochs,
                size,
                self.made.tables,
                share,
            )
        ]


def _size(first: Path) -> str:
    """Return which recipe sets the budget of all rows: that of the first pre-training's size."""
    run = finetune.read_json(first / "run.json") or {}
    return "tiny" if str(run.get("recipe", "")).endswith("_tiny") else "full"


@flow(name="evaluate", flow_run_name=_run_name)
def evaluate(params: EvaluateParams) -> dict[str, Any]:
    """Fine-tune, score and report; what is finished and unchanged is not done again."""
    made, cohorts = _read_workspace(params)
    compared = _compare(params, made, [cohort for cohort in cohorts if cohort.selected])
    native = _native(compared)
    trainings = compared.prepare()
    fewer = [one for share in params.label_shares for one in compared.prepare(share)]
    with gpu_turn(), CaseWorkers(Settings()) as work:
        trained = fine_tune([*trainings, *fewer], params.lanes, params.launch) if trainings else 0
        scores, further, computed = _score_all(compared, [*compared.cohorts, *native], trainings, work)
        missing, more = _score_all_missing(compared, trainings, work)
        labels, most = _score_fewer_labels(compared, fewer, scores, work)
    further |= {"missing": missing, "labels": labels}
    there = {cohort.benchmark.name: cohort for cohort in compared.cohorts}
    cohorts = [*(there.get(cohort.benchmark.name, cohort) for cohort in cohorts), *native]
    kept = kept_or_written(Evaluated(params, compared.made, cohorts, trainings, scores, further))
    publish_tables([BenchmarkTable.model_validate(table) for table in kept["tables"]], made.workspace / "tables")
    return {
        "report": str(made.workspace / "report" / "index.html"),
        "tables": kept["digests"],
        "trained": trained,
        "scored": computed + more + most,
        "no_data": kept["no_data"],
    }


def _read_workspace(params: EvaluateParams) -> tuple[Made, list[Cohort]]:
    benchmarks = [find_benchmark(name) for name in dict.fromkeys(params.benchmarks)]
    workspace = Path(params.workspace).resolve()
    store = open_store(str(workspace / "store.zarr"))
    cases = store.cases().to_pandas()
    people = with_layouts(people_of(cases, workspace))
    split, digest = workspace_split(workspace, params.split, store.url, people)
    by_subject = roles(split)
    tables_used = made_from(workspace, params.split, digest)
    runs = tuple(row.in_folder(workspace / "trainings") for row in params.rows)
    made = Made(workspace, store, cases, split, tables_used, runs)
    latents = {one.name: read_latents(workspace / "sources", one.datasets) for one in benchmarks}
    return made, [find_cohort(one, store, people, by_subject, latents[one.name]) for one in benchmarks]


def _compare(params: EvaluateParams, made: Made, present: Sequence[Cohort]) -> Compared:
    """Return what is trained and scored; raises what is wrong with the runs before anything is trained."""
    if not present:
        return Compared(params, made, (), ())
    check_runs(made.runs, [cohort.benchmark for cohort in present], made.store)
    check_templates(made.runs, params.template_mix, params.missing_modalities)
    rows = training_rows(made.runs, params.networks, params.template_mix, _size(made.runs[0].folder))
    seen = {
        run.name: [case for folder in run.folders for case in read_selection(folder / "selection.parquet")]
        for run in made.runs
    }
    elsewhere = seen_elsewhere({run.name: run.folders for run in made.runs}, made.store)
    links, told = [*near_duplicates(made.store.url), *elsewhere.links], crosswalk_links(made.workspace)
    cohorts = tuple(_with_others(params, without_seen_by_any(seen, cohort, links, told)) for cohort in present)
    return Compared(params, replace(made, unchecked=elsewhere.notes), tuple(rows), cohorts)


def check_given(params: EvaluateParams) -> None:
    """Raise ScoreError for predictions of others with a file missing or on another grid; computes nothing."""
    named = list(dict.fromkeys(row.benchmark for row in params.predictions))
    _, cohorts = _read_workspace(params.model_copy(update={"benchmarks": named}))
    for cohort in cohorts:
        if cohort.selected:
            _with_others(params, cohort)


def _with_others(params: EvaluateParams, cohort: Cohort) -> Cohort:
    """Return a cohort with the predictions of others for it; raises what is wrong with their files."""
    found = tuple(row.others for row in params.predictions if row.benchmark == cohort.benchmark.name)
    for one in found:
        check_others(one, cohort)
    return replace(cohort, others=found)


def _native(compared: Compared) -> list[Cohort]:
    """Return the segmentations that are also scored on the grids of their label files; raises ScoreError without one,
    before anything is trained."""
    asked = compared.cohorts if compared.params.native_scores else ()
    found = [native_cohort(cohort) for cohort in asked if cohort.benchmark.kind == "segmentation"]
    for cohort in found:
        SourceLabels(cohort.store).check(cohort.of_role("test"))
    return found


def _score_all(
    compared: Compared, cohorts: Sequence[Cohort], trainings: Sequence[Finetuning], work: CaseWorkers
) -> tuple[pd.DataFrame, Further, int]:
    """Return the scores that count, the tables of leaks and of gains, and how many rows were computed now."""
    params, made = compared.params, compared.made
    frames: list[pd.DataFrame] = []
    further: Further = {"leaks": {}, "seeds": {}, "gains": {}}
    computed = 0
    with Progress("score", len(cohorts), "benchmarks") as progress:
        for k, cohort in enumerate(cohorts):
            name = cohort.benchmark.name
            work.show = _shown(progress, k, name)
            frame, fresh = score(name, cohort, cohort.own(trainings), compared.scores, work)
            frames.append(cohort.without_leaks(frame))
            if cohort.leaks:
                first = compared.first(cohort)
                further["leaks"][name] = leak_table(cohort, frame, cohort.kinds, params.replicates, first)
            if any(run.repeats for run in made.runs):
                further["seeds"][name] = seed_table(frames[-1], cohort.benchmark, compared.own_rows(cohort))
            if params.runs or params.networks:
                named = {row.name for row in compared.own_rows(cohort)}
                scratch = {run: row for run, row in scratch_of(made.runs).items() if run in named}
                others = [
                    *(row for row, kind in KINDS.items() if kind == "baseline"),
                    *(row.name for row in compared.rows if row.segments_only),
                ]
                further["gains"][name] = gain_table(frames[-1], cohort.benchmark, scratch, others, params.replicates)
            computed += fresh
            progress.update(k + 1, note=f"{name}: {fresh} rows computed")
    scores = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    if len(scores):
        write_scores(scores, made.workspace / "scores.parquet", "all benchmarks")
    return scores, further, computed


def _shown(progress: Progress, done: int, name: str) -> Callable[[str], None]:
    """Return what tells of the cases of a benchmark while so many benchmarks are done."""
    return lambda words: progress.update(done, note=f"{name}: {words}")


def _score_all_missing(
    compared: Compared, trainings: Sequence[Finetuning], work: CaseWorkers
) -> tuple[dict[str, FurtherTable], int]:
    """Return the tables without single modalities by benchmark, and how many trainings were scored now."""
    params, runs = compared.params, compared.made.runs
    found: dict[str, FurtherTable] = {}
    computed = 0
    cohorts = [cohort for cohort in compared.cohorts if params.missing_modalities and applies(cohort)]
    if not cohorts:
        return found, computed
    bank = next(run for run in runs if run.has_templates)
    whose = "the pre-training" if len(runs) == 1 else f"the pre-training of {bank.name}"
    with Progress("score-missing", len(cohorts), "benchmarks") as progress:
        for k, cohort in enumerate(cohorts):
            name, title = cohort.benchmark.name, f"{cohort.benchmark.title} without one modality"
            work.show = _shown(progress, k, name)
            frame, fresh = score_without(name, cohort, cohort.own(trainings), bank.folder, compared.scores, work)
            found[name] = missing_table(title, cohort.without_leaks(frame), params.replicates, templates_of=whose)
            computed += fresh
            progress.update(k + 1, note=f"{name}: {fresh} trainings predicted")
    return found, computed


def _score_fewer_labels(
    compared: Compared, trainings: Sequence[Finetuning], scores: pd.DataFrame, work: CaseWorkers
) -> tuple[dict[str, FurtherTable], int]:
    """Return the tables of fewer labels by benchmark, and how many trainings were scored now; scores: of all labels."""
    params = compared.params
    found: dict[str, FurtherTable] = {}
    computed = 0
    for cohort in compared.cohorts if params.label_shares else ():
        frames = {1.0: scores[scores["benchmark"] == cohort.benchmark.name]}
        for share in params.label_shares:
            own = share_cohort(cohort, share)
            frame, fresh = score_share(own.benchmark.name, own, own.own(trainings), compared.scores, work)
            frames[share] = own.without_leaks(frame)
            computed += fresh
        rows = [row.name for row in compared.own_rows(cohort) if row.name != MIXED]
        found[cohort.benchmark.name] = label_table(cohort, frames, params.replicates, rows)
    return found, computed
