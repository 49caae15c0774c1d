"""Fine-tuning trainings of a benchmark: the same budget for every row (tasks.rows), by seed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.storage import write_bytes
from models.config import MadeFrom, TrainingConfig
from models.prediction_files import damage
from models.records import SelectedCase
from models.selection import write_selection
from tasks.benchmarks import Benchmark
from tasks.cohort import fewer_labels, targets_of_seed

if TYPE_CHECKING:
    from tasks.rows import Row


STARTS_APART = 100
"""Distance of the seeds in tables of scores between two starts of a row; fine-tunings have seeds below it."""


@dataclass(frozen=True)
class Finetuning:
    """One prepared training."""

    benchmark: str
    row: str
    seed: int
    """Of the fine-tuning, plus STARTS_APART for each start of the row before its own."""
    folder: Path
    config: TrainingConfig

    @property
    def own_seed(self) -> int:
        """Of the fine-tuning alone: every start of a row is fine-tuned from the same seeds."""
        return self.seed % STARTS_APART

    @property
    def finished(self) -> bool:
        """Whether done.json says that this very config was trained to its end."""
        return _is_done(self.folder / "done.json", self.config)

    @property
    def damage(self) -> str:
        """Why the predictions of a finished training cannot be used; its launch predicts again. Empty: they can."""
        return damage(self.folder, self.config)

    @property
    def to_launch(self) -> bool:
        """Whether there is something to train or to predict."""
        return not self.finished or bool(self.damage)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file as a dict, or None when it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def training_name(benchmark: str, row: str, seed: int) -> str:
    """Return the folder name of a fine-tuning, e.g. `phantom-tumour-pre-trained-seed0`, or `...-seed0-start1` of the
    second start of a row."""
    flat = re.sub(r"[^A-Za-z0-9._+-]+", "-", row).strip("-")
    start, own = divmod(seed, STARTS_APART)
    return f"{benchmark}-{flat}-seed{own}" + (f"-start{start}" if start else "")


def prepare(
    benchmark: Benchmark,
    cases: Sequence[SelectedCase],
    store: str,
    trainings: Path,
    rows: Sequence[Row],
    seeds: int,
    epochs: int | None = None,
    size: str = "tiny",
    made_from: MadeFrom | None = None,
    share: float = 1.0,
) -> list[Finetuning]:
    """Write run.json and selection.parquet of all rows (tasks.rows) and seeds; return them, the rows of a seed in turn.

    made_from: versions of the split and the phenotypes, for run.json. share: of the training subjects, drawn anew for
    each seed, with as many optimiser steps as all of them have.

    A fine-tuning that was finished under another row's name is found and used as it is. A folder that was made from
    something else (other config, cases or pre-trained weights) is set aside.
    """
    place = _Place(benchmark, store, trainings, epochs, size, made_from or MadeFrom(), share)
    plans = [
        _plan(place, start, seed + STARTS_APART * number, own)
        for seed in range(seeds)
        for own in [targets_of_seed(benchmark, cases, seed)]
        for row in rows
        for number, start in enumerate(row.starts)
    ]
    # All of them before any folder is set aside: one row's old folder may be what another row is now.
    twins = [None if plan.is_written else _finished_twin(trainings, benchmark.name, plan) for plan in plans]
    used = {twin.folder for twin in twins if twin}
    return [twin or _written(place, plan, used) for plan, twin in zip(plans, twins, strict=True)]


@dataclass(frozen=True)
class _Place:
    """What all rows of a benchmark share."""

    benchmark: Benchmark
    store: str
    trainings: Path
    epochs: int | None
    size: str
    made_from: MadeFrom
    share: float


def pretrained_digest(folder: Path) -> str:
    """Return the digest of the weights of a finished training; raises ValueError when it is not finished."""
    done = read_json(folder / "done.json")
    if done is None:
        raise ValueError(
            f"pre-training {folder.name!r} is not finished: {folder / 'done.json'} is missing; run pretrain to its end"
        )
    return str(done["weights_digest"])


def pretrained_network(folder: Path) -> dict[str, Any]:
    """Return the setting `network` of a pre-training, or nothing where its run.json does not tell: the recipe's then.

    Fine-tunings set its input channels by their modalities.
    """
    network = (read_json(folder / "run.json") or {}).get("network")
    return {} if network is None else {"network": network}


def build_config(
    benchmark: Benchmark, store: str, selection: Path, size: str, epochs: int | None, **values: Any
) -> TrainingConfig:
    """Return the config of one fine-tuning from the recipe of the benchmark's kind (`_tiny` for size `tiny`)."""
    from models.recipes import RECIPES

    recipe = RECIPES[benchmark.kind + ("_tiny" if size == "tiny" else "")]
    inputs: dict[str, Any] = {"modalities": benchmark.modalities}
    inputs |= {"regions": benchmark.regions} if benchmark.kind == "segmentation" else {"classes": benchmark.classes}
    inputs |= {} if epochs is None else {"epochs": epochs}
    return recipe(store, str(selection), **inputs, predict=True, world_size=1, **values)


TEMPLATES_AT_MOST = 3
"""Channels that the mix replaces, as in the reference."""


def with_template_mix(config: TrainingConfig) -> TrainingConfig:
    """Return the config of a pre-trained row with the template channel mix, at the budget of the row without.

    Every case gives two copies, so a step takes half the cases and the training half the epochs: as many optimiser
    steps, as many crops through the network in each, half as many visits of each case. Raises ValueError for an odd
    number of epochs or an odd batch.
    """
    if config.epochs % 2 or config.data.batch_size % 2:
        raise ValueError(
            f"training {config.name}: with the template mix every case counts twice, so an equal budget needs an even "
            f"number of epochs and an even batch, got {config.epochs} and {config.data.batch_size}; set epochs to "
            f"{config.epochs + config.epochs % 2}"
        )
    return config.replace(
        epochs=config.epochs // 2,
        select_every=-(-config.select_every // 2),
        data=config.data.replace(batch_size=config.data.batch_size // 2),
        objective=config.objective.replace(template_mix=TEMPLATES_AT_MOST, missing="template"),
    )


def with_fewer_labels(
    config: TrainingConfig, cases: Sequence[SelectedCase], share: float
) -> tuple[TrainingConfig, list[SelectedCase]]:
    """Return the cases with a share of the training labels, and the config with as many optimiser steps as before."""
    kept = fewer_labels(cases, share, config.seed)
    before, after = (sum(case.role == "train" for case in some) for some in (cases, kept))
    epochs = round(config.epochs * before / after)
    looks = config.select_every and max(1, round(config.select_every * epochs / config.epochs))
    return config.replace(epochs=epochs, select_every=looks), kept


@dataclass(frozen=True)
class _Plan:
    """A fine-tuning, and what its folder must say that it was made from."""

    row: Row
    seed: int
    folder: Path
    config: TrainingConfig
    given: Sequence[SelectedCase]
    """Before a share of the labels was taken."""
    cases: Sequence[SelectedCase]
    inputs: dict[str, Any]

    @property
    def is_written(self) -> bool:
        """Whether the folder is there, and made from this."""
        return read_json(self.folder / "inputs.json") == self.inputs

    def made(self, benchmark: str) -> Finetuning:
        """Return the prepared training."""
        return Finetuning(benchmark, self.row.name, self.seed, self.folder, self.config)


def _plan(place: _Place, row: Row, seed: int, cases: Sequence[SelectedCase]) -> _Plan:
    """Return the plan of a row and seed in the folder that has its inputs, else in the folder of its name."""
    first = found = _plan_in(place, row, seed, cases)
    number = 1
    while found.folder.exists() and not found.is_written:
        number += 1
        found = _plan_in(place, row, seed, cases, number)
    return found if found.is_written else first


def _plan_in(place: _Place, row: Row, seed: int, given: Sequence[SelectedCase], number: int = 1) -> _Plan:
    name = training_name(place.benchmark.name, row.name, seed) + (f"-{number}" if number > 1 else "")
    folder = place.trainings / name
    values = {
        "name": name,
        "seed": seed % STARTS_APART,
        "init_from": str(row.start or ""),
        "made_from": place.made_from,
    }
    selection = folder / "selection.parquet"
    config = build_config(
        place.benchmark, place.store, selection, place.size, place.epochs, **values, **dict(row.settings)
    )
    config, cases = (with_template_mix(config) if row.mix else config), given
    if place.share < 1:
        config, cases = with_fewer_labels(config, cases, place.share)
    inputs = {
        "config": config.content_digest(),
        "cases": sorted(f"{case.dataset}/{case.row}/{case.digest}/{case.role}/{case.target}" for case in cases),
        "weights": row.weights,
    }
    return _Plan(row, seed, folder, config, given, cases, inputs)


def _written(place: _Place, plan: _Plan, used: Collection[Path]) -> Finetuning:
    """Write a plan's folder unless it is there; one with other inputs is set aside, unless another row uses it."""
    number = 1
    while plan.folder in used:
        number += 1
        plan = _plan_in(place, plan.row, plan.seed, plan.given, number)
    if plan.folder.exists() and not plan.is_written:
        _set_aside(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    if not (plan.folder / "inputs.json").exists():
        write_selection(plan.folder / "selection.parquet", plan.cases)
        write_bytes(str(plan.folder / "run.json"), plan.config.model_dump_json(indent=1).encode())
        write_bytes(str(plan.folder / "inputs.json"), json.dumps(plan.inputs, indent=1).encode())
    return plan.made(place.benchmark.name)


def _finished_twin(trainings: Path, benchmark: str, plan: _Plan) -> Finetuning | None:
    """Return a finished fine-tuning that differs from a plan in its name alone: rows may be called anew."""
    for done in sorted(trainings.glob(f"{benchmark}-*/done.json")):
        other = read_json(done.parent / "inputs.json") or {}
        if any(other.get(key) != plan.inputs[key] for key in ("cases", "weights")):
            continue
        found = TrainingConfig.model_validate(read_json(done.parent / "run.json"))
        selection = plan.config.data.selection
        renamed = found.replace(name=plan.config.name, data=found.data.replace(selection=selection))
        if renamed.content_digest() == plan.inputs["config"] and _is_done(done, found):
            return Finetuning(benchmark, plan.row.name, plan.seed, done.parent, found)
    return None


def _is_done(done: Path, config: TrainingConfig) -> bool:
    return (read_json(done) or {}).get("config_digest") == config.content_digest()


def _set_aside(folder: Path) -> None:
    """Rename a folder that was made from other inputs, so that nothing is lost and nothing stale is read."""
    aside = folder.parent / "superseded"
    aside.mkdir(exist_ok=True)
    number = sum(1 for path in aside.iterdir() if path.name.startswith(f"{folder.name}."))
    folder.rename(aside / f"{folder.name}.{number}")


def budget(config: TrainingConfig, n_train: int) -> str:
    """Return the words that a table says about a training's budget."""
    optimiser, batch = config.optimiser, config.data.batch_size * config.world_size
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    crop = f"crops of {' x '.join(map(str, config.data.crop))} voxels" if any(config.data.crop) else "whole images"
    return f"{epochs} of {n_train} training cases, batch {batch}, {crop}, {optimiser.kind} at {optimiser.lr:g}"
