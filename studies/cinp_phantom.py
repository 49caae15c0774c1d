"""What CINP's pre-training is worth on phantoms: retrieval, network prompting, probes, and each of its three losses.

    python -m studies.cinp_phantom state/cinp

Writes two cohorts, their store, the pre-trainings, the retrieval and the prompting below that folder and prints the
tables; what is finished is skipped. Some 40 minutes on two quiet cores, by estimate. Everything that could be chosen
after the fact stands in the constants below, committed before the first run; effect sizes are those of
`tasks.phantom.effects_connectivity`.

Protocol. As in the paper, pre-training sees healthy people of one cohort, images with their connectomes, and the tasks
see another cohort, with patients: no subject is in both. Every row has the same cases, epochs and network; seed s of a
row is one pre-training, and seeds are averaged for each subject. Two outcomes are primary, both of the full method:

- retrieval: among 32 connectomes of controls the image's own one comes first more often than by chance (1/32): the
  lower end of the 95 % interval over subjects is above it;
- prompting: by the mean prototypes of all labelled connectomes of the other folds, controls, hypo- and hyperconnected
  people are told apart by their images: the lower end of the 95 % interval of the accuracy is above the accuracy of the
  majority class.

Everything else (each loss, supports of 10 and 50 %, nearest and k-NN, probes, hypoconnected people against controls) is
described, with Holm's correction inside each table of prompting. Positive controls: the linear model of retrieval,
hypo- against hyperconnected people; negative ones: wrong pairs, shuffled labels; ceilings: the true traits.

Development (other seeds, one training each): after half of the steps, with and without MIM and NIM, the own connectome
came first for 11 and 16 % of 150 people, three classes were prompted right for 50 and 53 %, hypoconnected people
against controls for 44 and 70 %; after all of them the full method reached 17, 45 and 65 %. The prototype of controls,
who lie in the middle, has no direction of its own; so three classes are the primary task. The size of the cohorts, the
steps and ten folds were chosen so that such values can be told from chance; a linear model finds 38 %
(docs/phantom.md).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from models.records import SelectedCase
from models.store import Store, open_store
from studies.cinp_retrieval import People, retrieve
from studies.flows import run_flow
from studies.variants import Variant, pretrain_variants
from tasks.catalog import build_catalog, write_catalog
from tasks.phantom.connectivity import ConnectivityConfig, write_connectivity_cohort
from tasks.phantom.sources import connectivity_sources
from tasks.prompt_tasks import PHANTOM_PROMPTS
from tasks.selection import select_cases
from tasks.splits import people_of, workspace_split

COHORT_SEED = 20270305
"""Of the prompted cohort, and one more of the healthy one: seeds that no development has seen."""
PROMPTED = "phantom-connect"
HEALTHY = "phantom-connect-healthy"
HEALTHY_SUBJECTS = 800
PROMPTED_SUBJECTS = 600
"""A third each: controls, hypoconnected, hyperconnected."""
SHARES = (0.9, 0.1, 0.0)
"""Of the healthy cohort: training, validation (curves and warnings, nothing is chosen on it), none for testing."""
SEEDS = (0, 1, 2)
EPOCHS = 20
BATCH = 16
"""Cases a rank, of two."""
FOLDS = 10
NICE = 10
PRIMARY_TASK = "phantom-connect-multiclass"

VARIANTS: tuple[Variant, ...] = (
    Variant("CINP", "cinp_tiny", (("batch_size", BATCH),), "cinp"),
    Variant("INC + MIM", "cinp_tiny", (("batch_size", BATCH), ("weight_matching", 0.0)), "inc-mim"),
    Variant("INC + NIM", "cinp_tiny", (("batch_size", BATCH), ("weight_masking", 0.0)), "inc-nim"),
    Variant("INC", "cinp_tiny", (("batch_size", BATCH), ("weight_masking", 0.0), ("weight_matching", 0.0)), "inc"),
)
"""The first is the full method, with which the others are compared. Preset `recommended`, at its tiny size."""
IMAGE_ONLY = Variant("MIM (image-only MAE)", "image_mae_tiny", (("batch_size", BATCH),), "image_mae")
"""MIM alone, which sees no connectome: it can be probed, not prompted."""


@dataclass(frozen=True)
class Size:
    """How large the study is: the constants, or less in a test of its code."""

    cohort_seed: int = COHORT_SEED
    healthy: int = HEALTHY_SUBJECTS
    prompted: int = PROMPTED_SUBJECTS
    seeds: tuple[int, ...] = SEEDS
    epochs: int = EPOCHS
    ranks: int = 2
    folds: int = FOLDS
    tasks: tuple[str, ...] = PHANTOM_PROMPTS
    network_epochs: int = 0
    """Of the supervised network, a baseline that is trained in every fold: with 60 it takes longer than the study."""


def make_store(folder: Path, size: Size) -> Store:
    """Write cohorts, catalog and store; what is there stays."""
    prompted = ConnectivityConfig(name=PROMPTED, seed=size.cohort_seed, subjects=size.prompted)
    healthy = ConnectivityConfig(name=HEALTHY, seed=size.cohort_seed + 1, subjects=size.healthy, patients=False)
    places = {prompted.name: folder / "sources", healthy.name: folder / "sources-healthy"}
    for config in (prompted, healthy):
        write_connectivity_cohort(config, places[config.name], processes=size.ranks)
    sources = [source for config in (prompted, healthy) for source in connectivity_sources(config, places[config.name])]
    write_catalog(build_catalog(sources, workspace=str(folder)), str(folder))
    url = str(folder / "store.zarr")
    parameters = {"catalog": str(folder), "store": url, "spec": "cinp_tiny", "workers": size.ranks}
    run_flow("preprocess", folder, parameters, size.ranks)
    return open_store(url)


def select_healthy(folder: Path, store: Store) -> list[SelectedCase]:
    """Return the cases of the healthy cohort with their roles."""
    people = people_of(store.cases().to_pandas(), folder)
    split, _ = workspace_split(folder, "healthy", store.url, people[people["dataset"] == HEALTHY], SHARES)
    return select_cases(store.cases(), split, [HEALTHY])


def select_controls(folder: Path, store: Store) -> list[SelectedCase]:
    """Return the cases of the controls of the prompted cohort, by name."""
    people = people_of(store.cases().to_pandas(), folder)
    chosen = people[(people["dataset"] == PROMPTED) & (people["diagnosis"] == "control")]
    return sorted(select_cases(store.cases().filter(_named(store, set(chosen["case"])))), key=lambda case: case.case)


def _named(store: Store, names: set[str]) -> list[bool]:
    lines = store.cases().select(["dataset", "case"]).to_pylist()
    return [line["dataset"] == PROMPTED and line["case"] in names for line in lines]


def retrieve_controls(folder: Path, store: Store, healthy: Sequence[SelectedCase], size: Size) -> pd.DataFrame:
    """Return how often the own connectome is found among those of other controls; see studies.cinp_retrieval."""
    trainings = {one.row: [folder / "trainings" / one.name(seed) for seed in size.seeds] for one in VARIANTS}
    train = People(store, [case for case in healthy if case.role == "train"], folder / "sources-healthy")
    return retrieve(trainings, train, People(store, select_controls(folder, store), folder / "sources"), folder)


def prompt(folder: Path, size: Size) -> None:
    """Prompt with all rows, and probe them; see flows.prompt."""

    def row(one: Variant) -> dict[str, object]:
        return {"name": one.row, "trainings": [one.name(seed) for seed in size.seeds]}

    parameters = {
        "workspace": str(folder),
        "rows": [row(one) for one in VARIANTS],
        "image_only": [row(IMAGE_ONLY)],
        "benchmarks": list(size.tasks),
        "folds": size.folds,
        "network_epochs": size.network_epochs,
    }
    run_flow("prompt", folder, parameters, size.ranks)


def verdict(folder: Path) -> str:
    """Return whether the study's two claims hold, with the intervals that decide them."""
    found = pd.read_csv(folder / "retrieval" / "retrieval.csv").to_dict("records")
    first = next(line for line in found if (line["row"], line["top"]) == (VARIANTS[0].row, 1))
    table = pd.read_csv(folder / "prompts" / "tables" / f"{PRIMARY_TASK}.csv").to_dict("records")
    accuracy = {line["row"]: line for line in table if line["metric"] == "accuracy"}
    ours, majority = accuracy[f"{VARIANTS[0].row}: mean, 100 %"], accuracy["majority class"]
    return (
        f"Retrieval, first of {first['candidates']}: {_interval(first)}, chance {first['chance']:.3f}: "
        f"{_holds(first['low'] > first['chance'])}. Accuracy of prompting, {PRIMARY_TASK}: {_interval(ours)}, majority "
        f"class {majority['estimate']:.3f}: {_holds(ours['low'] > majority['estimate'])}."
    )


def _interval(line: Mapping[Hashable, Any]) -> str:
    return f"{line['estimate']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"


def _holds(above: bool) -> str:
    return "the claim holds" if above else "the claim does not hold"


def run(folder: Path, size: Size) -> None:
    """Run the whole study in a folder and print its tables."""
    folder.mkdir(parents=True, exist_ok=True)
    store = make_store(folder, size)
    healthy = select_healthy(folder, store)
    pretrain_variants(folder, store.url, healthy, (*VARIANTS, IMAGE_ONLY), size.seeds, size.epochs, size.ranks)
    retrieve_controls(folder, store, healthy, size)
    prompt(folder, size)
    for path in (folder / "retrieval" / "retrieval.md", *sorted((folder / "prompts" / "tables").glob("*.md"))):
        print(path.read_text(encoding="utf-8"), flush=True)
    print(verdict(folder), flush=True)


def main() -> None:
    """Run the study in the folder that is given."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m studies.cinp_phantom FOLDER")
    os.nice(NICE)
    run(Path(sys.argv[1]).resolve(), Size())


if __name__ == "__main__":
    main()
