"""Fine-tuning trainings of a benchmark: the same budget from pre-trained weights and from scratch, by seed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from infra.storage import write_bytes
from models.config import MadeFrom, TrainingConfig
from models.records import SelectedCase
from models.selection import write_selection
from tasks.benchmarks import Benchmark
from tasks.cohort import fewer_labels, targets_of_seed
from tasks.summary import MIXED, PRETRAINED, SCRATCH

Launch = Callable[..., Any]
"""tasks.launch.launch(run_dirs, world_size, on_progress)."""

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Finetuning:
    """One prepared training."""

    benchmark: str
    row: str
    seed: int
    folder: Path
    config: TrainingConfig

    @property
    def finished(self) -> bool:
        """Whether done.json says that this very config was trained to its end."""
        done = read_json(self.folder / "done.json")
        return done is not None and done.get("config_digest") == self.config.content_digest()


class LaneError(RuntimeError):
    """Raised inside a lane when another part of the evaluation has failed or was cancelled."""


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file as a dict, or None when it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def training_name(benchmark: str, row: str, seed: int) -> str:
    """Return the folder name of a fine-tuning, e.g. `phantom-tumour-pre-trained-seed0`."""
    return f"{benchmark}-{row}-seed{seed}"


def prepare(
    benchmark: Benchmark,
    cases: Sequence[SelectedCase],
    store: str,
    trainings: Path,
    pretrained: Path,
    seeds: int,
    epochs: int | None = None,
    size: str = "tiny",
    template_mix: bool = False,
    made_from: MadeFrom | None = None,
    share: float = 1.0,
) -> list[Finetuning]:
    """Write run.json and selection.parquet of all rows and seeds; return them, the rows of a seed in turn.

    The rows are pre-trained and scratch and, with `template_mix`, pre-trained with learned templates mixed into the
    channels (see `with_template_mix`) where a benchmark has more than one.

    made_from: versions of the split and the phenotypes, for run.json. share: of the training subjects, drawn anew for
    each seed, with as many optimiser steps as all of them have.

    A folder that was made from something else (other config, cases or pre-trained weights) is set aside under its old
    digest. All rows have the network of the pre-training. Raises ValueError when that is not finished.
    """
    settings = {**pretrained_network(pretrained), "made_from": made_from or MadeFrom()}
    origin = (str(pretrained), pretrained_digest(pretrained))
    origins = {PRETRAINED: origin, SCRATCH: ("", "")}
    if template_mix and len(benchmark.modalities) > 1:
        origins[MIXED] = origin
    return [
        _prepare_one(benchmark, row, seed, own, store, trainings, origin, epochs, size, settings, share)
        for seed in range(seeds)
        for own in [targets_of_seed(benchmark, cases, seed)]
        for row, origin in origins.items()
    ]


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


def _prepare_one(
    benchmark: Benchmark,
    row: str,
    seed: int,
    cases: Sequence[SelectedCase],
    store: str,
    trainings: Path,
    origin: tuple[str, str],
    epochs: int | None,
    size: str,
    settings: dict[str, Any],
    share: float,
) -> Finetuning:
    name = training_name(benchmark.name, row, seed)
    folder = trainings / name
    selection = folder / "selection.parquet"
    values = {"name": name, "seed": seed, "init_from": origin[0], **settings}
    config = build_config(benchmark, store, selection, size, epochs, **values)
    config = with_template_mix(config) if row == MIXED else config
    if share < 1:
        config, cases = with_fewer_labels(config, cases, share)
    inputs = {
        "config": config.content_digest(),
        "cases": sorted(f"{case.dataset}/{case.row}/{case.digest}/{case.role}/{case.target}" for case in cases),
        "weights": origin[1],
    }
    if folder.exists() and read_json(folder / "inputs.json") != inputs:
        _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "inputs.json").exists():
        write_selection(selection, cases)
        write_bytes(str(folder / "run.json"), config.model_dump_json(indent=1).encode())
        write_bytes(str(folder / "inputs.json"), json.dumps(inputs, indent=1).encode())
    return Finetuning(benchmark.name, row, seed, folder, config)


def _set_aside(folder: Path) -> None:
    """Rename a folder that was made from other inputs, so that nothing is lost and nothing stale is read."""
    aside = folder.parent / "superseded"
    aside.mkdir(exist_ok=True)
    number = sum(1 for path in aside.iterdir() if path.name.startswith(f"{folder.name}."))
    folder.rename(aside / f"{folder.name}.{number}")


def lanes(trainings: Sequence[Finetuning], count: int) -> list[list[Path]]:
    """Deal the folders of unfinished trainings to `count` lanes, in turn; empty lanes are left out."""
    todo = [training.folder for training in trainings if not training.finished]
    return [lane for lane in (todo[k::count] for k in range(count)) if lane]


def run_lanes(
    trainings: Sequence[Finetuning],
    count: int,
    launch: Launch,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run the unfinished trainings in `count` parallel single-process groups; return how many were run.

    When a lane fails the others are finished first: finished work stays. When the caller is interrupted, every lane is
    stopped at its next report.
    """
    parts = lanes(trainings, count)
    if not parts:
        return 0
    stop = threading.Event()
    lines: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def report(line: dict[str, Any]) -> None:
        if stop.is_set():
            raise LaneError("the evaluation was stopped; run it again to continue from the last checkpoints")
        lines.put(line)

    # The launching thread must outlive its ranks: PDEATHSIG fires when the thread that started them ends.
    with ThreadPoolExecutor(len(parts), thread_name_prefix="lane") as pool:
        futures = [pool.submit(launch, lane, world_size=1, on_progress=report) for lane in parts]
        try:
            _follow(futures, lines, on_progress)
        except BaseException:
            stop.set()
            raise
        for future in futures:
            future.result()
    if unfinished := [_why_unfinished(training) for training in trainings if not training.finished]:
        raise RuntimeError(f"{len(unfinished)} trainings did not end as asked, first {unfinished[0]}")
    return sum(len(lane) for lane in parts)


def _why_unfinished(training: Finetuning) -> str:
    done = read_json(training.folder / "done.json")
    if done is None:
        return f"{training.folder.name!r}: it ended without done.json; see its log"
    return (
        f"{training.folder.name!r}: its done.json belongs to another config ({done.get('config_digest')}, asked for is "
        f"{training.config.content_digest()}); move the folder away and run again"
    )


def _follow(
    futures: Sequence[Future[Any]],
    lines: SimpleQueue[dict[str, Any]],
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Hand the lanes' lines to the caller in the caller's own thread, which alone knows the running flow."""
    pending = set(futures)
    while pending:
        _, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        while not lines.empty():
            line = lines.get()
            if on_progress is not None:
                on_progress(line)


def budget(config: TrainingConfig, n_train: int) -> str:
    """Return the words that a table says about a training's budget."""
    optimiser, batch = config.optimiser, config.data.batch_size * config.world_size
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    crop = f"crops of {' x '.join(map(str, config.data.crop))} voxels" if any(config.data.crop) else "whole images"
    return f"{epochs} of {n_train} training cases, batch {batch}, {crop}, {optimiser.kind} at {optimiser.lr:g}"
