"""What each of BrainMVP's objectives is worth on phantoms, at a fifth and at all of the labels.

    python -m studies.brainmvp_ablation state/ablation

Writes the cohort, the store, three pre-trainings of each variant and all fine-tunings below that folder, and prints
the tables; what is finished is skipped. About 90 minutes on two cores. Everything that could be chosen after the fact
stands in the constants below, committed before the first run; the effect sizes are those of `tasks.phantom.effects`.

The variants differ only in the weights of the three losses; `none` is training from scratch. All fine-tunings have the
same number of optimiser steps. Seed s of a variant is one pre-training with its own fine-tuning, so the spread between
seeds holds both. Tables compare every variant with the full method, paired over test subjects, seeds nested.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from models.recipes import RECIPES
from models.store import Store, open_store
from studies.flows import run_flow
from tasks.baseline_scores import score_baselines
from tasks.benchmarks import find_benchmark
from tasks.catalog import build_catalog, write_catalog
from tasks.cohort import fewer_labels
from tasks.evaluation import Cohort, find_cohort
from tasks.finetune import Finetuning, build_config, training_name
from tasks.lanes import run_lanes
from tasks.latents import read_latents
from tasks.launch import launch
from tasks.phantom import PhantomConfig, write_cohort
from tasks.phantom.sources import phantom_sources
from tasks.pretraining import PreparedTraining, prepare_training
from tasks.sections import make_table
from tasks.selection import select_cases
from tasks.splits import people_of, roles, workspace_split
from tasks.summary import PRETRAINED, SCRATCH
from tasks.tables import to_markdown
from tasks.trained_scores import score_trainings

COHORT = PhantomConfig(seed=20261201, bids_subjects=200, datalist_subjects=60, spacing_mm=2.75)
"""A seed that no development has seen."""
SHARES = (0.5, 0.1, 0.4)
SEEDS = (0, 1, 2)
PRETRAIN_EPOCHS = 32
FULL = "CMR + MD + CL"
VARIANTS: dict[str, dict[str, float]] = {
    "CMR": {"weight_distillation": 0.0, "weight_contrast": 0.0},
    "CMR + MD": {"weight_contrast": 0.0},
    FULL: {},
}
"""Overrides of the preset `recommended`; a weight that is not named is the preset's."""
TASKS = ("phantom-tumour", "phantom-diagnosis")
LABELS = (0.2, 1.0)
"""Shares of the labelled training subjects."""
LANES = 2


@dataclass(frozen=True)
class Study:
    """The cohort in its store, and who is in which role."""

    folder: Path
    store: Store
    people: pd.DataFrame
    split: pd.DataFrame

    def cohort(self, task: str) -> Cohort:
        """Return a benchmark on this cohort."""
        benchmark = find_benchmark(task)
        latents = read_latents(self.folder / "sources", benchmark.datasets)
        return find_cohort(benchmark, self.store, self.people, roles(self.split), latents)


def make_store(folder: Path) -> Study:
    """Write cohort, catalog, store and split, as the demo does; what is there stays."""
    write_cohort(COHORT, folder / "sources", processes=LANES)
    write_catalog(build_catalog(phantom_sources(COHORT, folder / "sources")), str(folder))
    url = str(folder / "store.zarr")
    parameters = {"catalog": str(folder), "store": url, "spec": "demo", "workers": LANES}
    run_flow("preprocess", folder, parameters, LANES)
    store = open_store(url)
    people = people_of(store.cases().to_pandas(), folder)
    split, _ = workspace_split(folder, "default", url, people, SHARES)
    return Study(folder, store, people, split)


def pretrain(study: Study, variant: str, seed: int) -> PreparedTraining:
    """Pre-train one variant with one seed, unless that is done."""
    name = f"{variant.replace(' + ', '-').lower()}-seed{seed}"
    folder = study.folder / "trainings" / name
    recipe = RECIPES["brainmvp_tiny"]
    config = recipe(
        study.store.url,
        str(folder / "selection.parquet"),
        name=name,
        seed=seed,
        epochs=PRETRAIN_EPOCHS,
        **VARIANTS[variant],
    )
    prepared = prepare_training(folder, config, select_cases(study.store.cases(), study.split, drop_test=True))
    if not prepared.is_finished():
        launch([folder], config.world_size)
    print(f"{_now()} {name}: {prepared.done()['metrics'].get('psnr_model', float('nan')):.2f} dB", flush=True)
    return prepared


def fine_tunings(study: Study, task: str, share: float, starts: dict[tuple[str, int], Path]) -> list[Finetuning]:
    """Prepare the fine-tunings of one task at one share of the labels: all variants and scratch, all seeds."""
    cohort, found = study.cohort(task), []
    for seed in SEEDS:
        cases = fewer_labels(cohort.selected, share, seed)
        for row in (*VARIANTS, SCRATCH):
            start = starts.get((row, seed))
            folder = (
                study.folder / "trainings" / f"labels{share:g}" / training_name(task, row.replace(" + ", "-"), seed)
            )
            selection = folder / "selection.parquet"
            values = {"name": folder.name, "seed": seed, "init_from": str(start) if start else ""}
            config = build_config(cohort.benchmark, study.store.url, selection, "tiny", None, **values)
            # As many optimiser steps with a fifth of the cases: five times the epochs.
            config = config.replace(epochs=round(config.epochs / share))
            prepare_training(folder, config, cases)
            found.append(Finetuning(task, PRETRAINED if row == FULL else row, seed, folder, config))
    return found


def tables(study: Study, starts: dict[tuple[str, int], Path]) -> Iterator[str]:
    """Fine-tune and yield one table a task and share of labels."""
    for share in LABELS:
        for task in TASKS:
            trainings = fine_tunings(study, task, share, starts)
            run_lanes(trainings, LANES, launch)
            cohort, scores = study.cohort(task), study.folder / "scores" / f"labels{share:g}"
            ours, _ = score_trainings(cohort, trainings, scores)
            simple, _ = score_baselines(cohort, scores)
            table = make_table(cohort, pd.concat([ours, simple]), trainings, (), _now(), 2000)
            heading = f"## {cohort.benchmark.title}, {share:.0%} of the labels\n\n`pre-trained` is {FULL}.\n\n"
            yield heading + to_markdown(table, title_level=3)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


def main() -> None:
    """Run the study in the folder that is given."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m studies.brainmvp_ablation FOLDER")
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    study = make_store(folder)
    starts = {(variant, seed): pretrain(study, variant, seed).folder for seed in SEEDS for variant in VARIANTS}
    for text in tables(study, starts):
        print(text, flush=True)


if __name__ == "__main__":
    main()
