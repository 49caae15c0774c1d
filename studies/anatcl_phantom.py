"""What AnatCL's pre-training is worth on phantoms: linear probes beside its baselines and a random encoder.

    python -m studies.anatcl_phantom state/anatcl

Writes two cohorts, their store, the pre-trainings and the probes below that folder and prints the tables; what is
finished is skipped. Some 25 minutes on two cores, at low priority. Everything that could be chosen after the fact
stands in the constants below, committed before the first run; effect sizes are those of `tasks.phantom.effects_cortex`.

Protocol. As in the paper, pre-training sees healthy people of one cohort and the probes see another one, with
patients: no subject is in both. Every row has the same network, epochs and cases; seed s of a row is one pre-training,
and seeds are averaged in each of the five folds. The primary outcome is the error of the age, AnatCL (global) against
the random encoder: the study's claim holds when their 95 % intervals do not overlap. Everything else (local beside
global, the diagnoses, the site effect) is described, with Holm's correction inside each table. AD-like against control
is the positive control, its shuffled twin the negative one, the probe of the true latents the ceiling.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from models.recipes import find_recipe
from models.records import SelectedCase
from models.store import Store, open_store
from studies.flows import run_flow
from tasks.catalog import build_catalog, write_catalog
from tasks.launch import launch
from tasks.phantom.anatomical import AnatomicalConfig, write_anatomical_cohort
from tasks.phantom.sources import anatomical_sources
from tasks.pretraining import PreparedTraining, prepare_training, with_ages
from tasks.probe_tasks import PHANTOM_PROBES
from tasks.selection import select_cases
from tasks.splits import people_of, workspace_split

COHORT_SEED = 20270211
"""Of the probed cohort, and one more of the healthy one: seeds that no development has seen."""
PROBED = "phantom-anat"
HEALTHY = "phantom-anat-healthy"
HEALTHY_SUBJECTS = 360
PROBED_SUBJECTS = 320
"""Half controls, a quarter schizophrenia-like, a quarter AD-like."""
SHARES = (0.9, 0.1, 0.0)
"""Of the healthy cohort: training, validation (curves and warnings, nothing is chosen on it), none for testing."""
SEEDS = (0, 1, 2)
EPOCHS = 30
FOLDS = 5
NICE = 10


@dataclass(frozen=True)
class Variant:
    """One row: a recipe with its overrides."""

    row: str
    recipe: str
    overrides: tuple[tuple[str, Any], ...] = ()

    def name(self, seed: int) -> str:
        """Return the folder name of one training."""
        parts = [self.recipe.removesuffix("_tiny"), *(str(value) for _, value in self.overrides)]
        return "-".join([*parts, f"seed{seed}"])


VARIANTS: tuple[Variant, ...] = (
    Variant("AnatCL global", "anatcl_tiny", (("variant", "global"),)),
    Variant("AnatCL local", "anatcl_tiny", (("variant", "local"),)),
    Variant("SimCLR", "simclr_tiny"),
    Variant("y-Aware", "yaware_tiny"),
    Variant("ExpW", "expw_tiny"),
    Variant("age regression", "age_regression_tiny"),
)
"""The first is compared with every other row. Preset `recommended`, at its tiny size."""


@dataclass(frozen=True)
class Size:
    """How large the study is: the constants, or less in a test of its code."""

    cohort_seed: int = COHORT_SEED
    healthy: int = HEALTHY_SUBJECTS
    probed: int = PROBED_SUBJECTS
    seeds: tuple[int, ...] = SEEDS
    epochs: int = EPOCHS
    ranks: int = 2
    folds: int = FOLDS


def make_store(folder: Path, size: Size) -> Store:
    """Write cohorts, catalog and store; what is there stays."""
    probed = AnatomicalConfig(name=PROBED, seed=size.cohort_seed, subjects=size.probed)
    healthy = AnatomicalConfig(name=HEALTHY, seed=size.cohort_seed + 1, subjects=size.healthy, patients=False)
    places = {probed.name: folder / "sources", healthy.name: folder / "sources-healthy"}
    for config in (probed, healthy):
        write_anatomical_cohort(config, places[config.name], processes=size.ranks)
    sources = [source for config in (probed, healthy) for source in anatomical_sources(config, places[config.name])]
    write_catalog(build_catalog(sources, workspace=str(folder)), str(folder))
    url = str(folder / "store.zarr")
    parameters = {"catalog": str(folder), "store": url, "spec": "vbm_tiny", "workers": size.ranks}
    run_flow("preprocess", folder, parameters, size.ranks)
    return open_store(url)


def pretrain(folder: Path, store: Store, size: Size) -> None:
    """Pre-train every variant with every seed on the healthy cohort, in one process group; what is done stays."""
    people = people_of(store.cases().to_pandas(), folder)
    healthy = people[people["dataset"] == HEALTHY]
    split, _ = workspace_split(folder, "healthy", store.url, healthy, SHARES)
    cases = with_ages(select_cases(store.cases(), split, [HEALTHY]), healthy)
    prepared = [prepare(folder, store, cases, variant, seed, size) for seed in size.seeds for variant in VARIANTS]
    todo = [one.folder for one in prepared if not one.is_finished()]
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} {len(todo)} of {len(prepared)} pre-trainings to do", flush=True)
    if todo:
        launch(todo, size.ranks)


def prepare(
    folder: Path, store: Store, cases: Sequence[SelectedCase], variant: Variant, seed: int, size: Size
) -> PreparedTraining:
    """Write the folder of one pre-training, unless it is there."""
    training = folder / "trainings" / variant.name(seed)
    config = find_recipe(variant.recipe)(
        store.url,
        str(training / "selection.parquet"),
        name=training.name,
        seed=seed,
        epochs=size.epochs,
        world_size=size.ranks,
        **dict(variant.overrides),
    )
    return prepare_training(training, config, cases)


def probe(folder: Path, size: Size) -> None:
    """Probe all rows; see flows.probe."""
    rows = [{"name": one.row, "trainings": [one.name(seed) for seed in size.seeds]} for one in VARIANTS]
    parameters = {
        "workspace": str(folder),
        "rows": rows,
        "benchmarks": list(PHANTOM_PROBES),
        "folds": size.folds,
        "random_seeds": len(size.seeds),
    }
    run_flow("probe", folder, parameters, size.ranks)


def verdict(folder: Path) -> str:
    """Return whether the study's claim holds, with the intervals that decide it."""
    table = pd.read_csv(folder / "probes" / "tables" / "phantom-anat-age.csv")
    errors = table[table["metric"] == "mae"].set_index("row")
    ours, random = (errors.loc[row] for row in (VARIANTS[0].row, "random encoder"))
    apart = "do not overlap: the claim holds" if ours["high"] < random["low"] else "overlap: the claim does not hold"
    words = [f"{one.name} {one['estimate']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for one in (ours, random)]
    return f"Error of the age in years: {'; '.join(words)}. The intervals {apart}."


def run(folder: Path, size: Size) -> None:
    """Run the whole study in a folder and print its tables."""
    folder.mkdir(parents=True, exist_ok=True)
    store = make_store(folder, size)
    pretrain(folder, store, size)
    probe(folder, size)
    for path in sorted((folder / "probes" / "tables").glob("*.md")):
        print(path.read_text(encoding="utf-8"), flush=True)
    print(verdict(folder), flush=True)


def main() -> None:
    """Run the study in the folder that is given."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m studies.anatcl_phantom FOLDER")
    os.nice(NICE)
    run(Path(sys.argv[1]).resolve(), Size())


if __name__ == "__main__":
    main()
