"""Everything that a training carries from step to step: building it, saving it, and continuing it exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from models.checkpoint import CheckpointError, newest_checkpoint, save_checkpoint
from models.config import SupervisedConfig, TrainingConfig
from models.connectomes import unlike_connectomes
from models.data import CaseDataset, make_loader
from models.distributed import World, barrier, broadcast_buffers, gather_tensors, wrap
from models.filling import learned_templates
from models.finished import FinishedTraining, read_training
from models.heartbeat import beat
from models.means import cached_training_means
from models.metrics import append_metrics, truncate_after
from models.objectives import build_objective
from models.objectives.base import Clock
from models.optimiser import build_optimiser
from models.records import SelectedCase
from models.sampler import OrderedBatches, StreamBatches, sample_rng
from models.schedule import Plan, plan_steps
from models.selection import Role, check_selection, of_role, read_selection, selection_digest
from models.spec import PreprocessSpec
from models.staging import stage_store
from models.store import Store, open_store
from models.tensorboard_events import EventFiles

log = logging.getLogger(__name__)

OF_NETWORKS = ("network_encoder.", "network_projection.", "matching.")
"""Weights that know what the numbers of a connectome are."""

Stop = Callable[[], bool]
"""Asked by the loop; True when this process was told to stop."""


class Stopped(Exception):  # noqa: N818 - an order, not an error
    """The training was told to stop; its state is in a checkpoint."""


@dataclass
class Best:
    """What the validation cases have chosen so far; see models.best."""

    metric: str = ""
    looked: int = -1
    """Last step that was looked at."""
    looks: int = 0
    step: int = 0
    """Step of the best weights."""
    value: float | None = None
    """Their metric; None before the first choice."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Their state dict, on the CPU."""


@dataclass
class Timing:
    """Time spent in optimiser steps on this rank, over all resumes; a checkpoint keeps that of rank 0."""

    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    """Of these, waiting for training batches: the mean over ranks."""

    def add(self, seconds: float, data_wait_seconds: float) -> None:
        """Count one step."""
        self.seconds += seconds
        self.data_wait_seconds += data_wait_seconds

    @property
    def data_wait_share(self) -> float:
        """Share of the step time in which the ranks waited for data."""
        return min(1.0, self.data_wait_seconds / self.seconds) if self.seconds else 0.0


@dataclass
class TrainingState:
    """One training on this rank."""

    config: TrainingConfig
    folder: Path
    world: World
    store: Store
    """What is read: the config's store, or its staged copy."""
    selection: list[SelectedCase]
    selection_digest: str
    plan: Plan
    objective: Any
    model: nn.Module
    """The objective, or its DDP wrapper."""
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """Finished optimiser steps."""
    init_digest: str = ""
    """Digest of the weights that started this training; empty for random ones."""
    world_sizes: list[int] = field(default_factory=list)
    """Numbers of ranks so far: more than one value means a resume on other hardware."""
    best: Best = field(default_factory=Best)
    timing: Timing = field(default_factory=Timing)
    events: EventFiles | None = None
    """On rank 0, when the config wants TensorBoard."""
    held: ExitStack = field(default_factory=ExitStack)
    """What ends with the training: the claim on its staged cases."""

    @cached_property
    def batches(self) -> Iterator[dict[str, Any]]:
        """Training batches of this rank from the current step to the last."""
        dataset = self.dataset("train")
        acc, world = self.plan.accumulation, self.world
        stream = StreamBatches(
            cases=len(dataset),
            batch_size=self.config.data.batch_size,
            world=world.size,
            rank=world.rank,
            seed=self.config.seed,
            first=self.step * acc,
            last=self.plan.total_steps * acc,
        )
        return iter(make_loader(dataset, stream, self.config.data.workers, world.device.type == "cuda"))

    @cached_property
    def validation(self) -> DataLoader[dict[str, Any]]:
        """Validation cases of this rank, in order."""
        dataset = self.dataset("val")
        order = OrderedBatches(len(dataset), self.config.data.batch_size, self.world.size, self.world.rank)
        return make_loader(dataset, order, 0)

    def dataset(self, role: Role) -> CaseDataset:
        """Return the cases of one role."""
        return CaseDataset(self.store.url, self.selection, self.objective.sampler(), role, self.config.seed)

    @property
    def finished_epoch(self) -> int:
        """Epoch of the last finished step."""
        return self.plan.epoch(max(0, self.step - 1))

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and to the event files when there are any; other ranks do nothing."""
        if not self.world.is_main:
            return
        append_metrics(self.folder, record)
        if self.events is not None:
            self.events.add(record)

    def close(self) -> None:
        """Write out the event files and let go of what is held; the loader processes end with the state."""
        if self.events is not None:
            self.events.close()
        self.held.close()

    def clock(self) -> Clock:
        """Return the step that is about to be done, with a generator that depends on seed, step and rank alone."""
        words = np.random.SeedSequence([self.config.seed, self.step, self.world.rank]).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(words[0]) << 16 ^ int(words[1]))
        return Clock(step=self.step, epoch=self.plan.epoch(self.step), generator=generator)


def configure_numerics(config: TrainingConfig, world: World) -> None:
    """Make the arithmetic of this process repeatable: threads and seed; deterministic kernels on the CPU.

    Numbers below 1e-38 count as 0: a CPU computes with them many times slower, and they do not matter here. New memory
    is not filled first, as torch would in this mode: kernels write all that they read.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(world.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(config.seed)


def start_training(config: TrainingConfig, folder: Path, world: World, stop: Stop = lambda: False) -> TrainingState:
    """Build a training, or continue it from its newest checkpoint.

    Raises SelectionError when the store no longer holds the selected cases, StagingError when they cannot be staged,
    ValueError for a case that the objective cannot use, CheckpointError for a checkpoint that belongs to something
    else, NotFinishedError when `init_from` is not a finished training, Stopped when told to stop while staging.
    """
    with ExitStack() as held:
        state = _build(config, folder, world, stop, held)
        # Weights start equal on all ranks; what is drawn afterwards must differ.
        torch.manual_seed(config.seed + 1_000_003 * (world.rank + 1))
        _check_cases(state)
        _continue(state)
        if config.running.tensorboard and world.is_main:
            state.events = EventFiles(folder)
        state.held = held.pop_all()
    return state


def _build(config: TrainingConfig, folder: Path, world: World, stop: Stop, held: ExitStack) -> TrainingState:
    configure_numerics(config, world)
    beat("opening the store", 0)
    selection = read_selection(config.data.selection)
    store = _store(config, selection, world, stop, held)
    plan = plan_steps(config, len(of_role(selection, "train")), world.size)
    objective = build_objective(config, store.spec, _means(config, folder, world, store, selection))
    init_digest = _initialise(objective, config, store.spec)
    objective.fit(store, of_role(selection, "train"))
    objective.to(world.device)
    if config.channels_last:
        objective.use_channels_last()
    model = wrap(objective, world)
    return TrainingState(
        config=config,
        folder=folder,
        world=world,
        store=store,
        selection=selection,
        selection_digest=selection_digest(selection),
        plan=plan,
        objective=objective,
        model=model,
        optimiser=_optimiser(objective, config, world),
        scaler=_scaler(config, world),
        init_digest=init_digest,
    )


def _store(config: TrainingConfig, selection: list[SelectedCase], world: World, stop: Stop, held: ExitStack) -> Store:
    """Return the store, or its staged copy; what is no longer in the store is refused, staged or not."""
    store, running = open_store(config.data.store), config.running
    check_selection(selection, store)
    if not running.stage_dir:
        return store
    folder = Path(running.stage_dir)
    staged = stage_store(store, selection, folder, running.stage_gib, world, stop, held, config.name)
    if staged is None:
        raise Stopped(f"training {config.name} was stopped while its cases were staged; what is staged stays")
    return staged


def _check_cases(state: TrainingState) -> None:
    """Draw once from every case, which reads no voxels: a case that cannot be used is refused before the first step."""
    for role in ("train", "val"):
        dataset = state.dataset(role)
        infos = [dataset.info(index) for index in range(len(dataset))]
        for index, info in enumerate(infos):
            dataset.sampler.draw(info, sample_rng(state.config.seed, 0, index), role == "train")
        if role == "train" and state.world.is_main:
            for idle in state.objective.idle_terms(infos):
                log.warning("training %s: %s", state.config.name, idle)


def _means(
    config: TrainingConfig, folder: Path, world: World, store: Store, selection: list[SelectedCase]
) -> np.ndarray | None:
    if config.objective.kind != "brainmvp":
        return None
    train = of_role(selection, "train")
    if world.is_main:
        cached_training_means(folder, store, train)
    barrier(world)
    return cached_training_means(folder, store, train)


def _initialise(objective: Any, config: TrainingConfig, spec: PreprocessSpec) -> str:
    if not config.init_from:
        return ""
    start = read_training(config.init_from)
    tensors, digest = _of_like_connectomes(start, spec), str(start.done["weights_digest"])
    loaded = objective.load_pretrained(tensors)
    log.info("training %s starts from %d of %d tensors of %s", config.name, len(loaded), len(tensors), config.init_from)
    if isinstance(config.objective, SupervisedConfig) and config.objective.uses_templates:
        objective.use_templates(learned_templates(start, config.objective.modalities, spec))
    return digest


def _of_like_connectomes(start: FinishedTraining, spec: PreprocessSpec) -> dict[str, torch.Tensor]:
    """Return the tensors to start with: none of networks when this store's connectomes are made otherwise."""
    one, other = start.spec.connectome, spec.connectome
    if one is None or other is None or not (differs := unlike_connectomes(one, other)):
        return start.tensors
    log.warning(
        "%s was trained on connectomes that differ in %s from this store's: its weights of networks are not used",
        start.config.name,
        differs,
    )
    return {name: value for name, value in start.tensors.items() if not name.startswith(OF_NETWORKS)}


def _optimiser(objective: Any, config: TrainingConfig, world: World) -> torch.optim.Optimizer:
    options = config.optimiser
    groups = objective.parameter_groups(options)
    return build_optimiser(groups, options, objective.modules(), fused=world.device.type in ("cpu", "cuda"))


def _scaler(config: TrainingConfig, world: World) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cuda", enabled=config.precision == "fp16" and world.device.type == "cuda")


@contextmanager
def evaluating(state: TrainingState) -> Iterator[None]:
    """Use the network as it will be used: rank 0's batch statistics on all ranks, evaluation mode, no gradients.

    Leaves training untouched, also its random numbers. Every rank enters.
    """
    broadcast_buffers(state.objective, state.world)
    state.model.eval()
    try:
        with torch.random.fork_rng(enabled=True), torch.no_grad():
            yield
    finally:
        state.model.train()


def save_state(state: TrainingState) -> None:
    """Write a checkpoint of all ranks (rank 0 writes; every rank must call)."""
    beat("saving a checkpoint", state.step)
    rng = gather_tensors(torch.get_rng_state(), state.world)
    cuda = state.world.device.type == "cuda"
    rng_cuda = gather_tensors(torch.cuda.get_rng_state(), state.world) if cuda else []
    if not state.world.is_main:
        return
    plan = state.plan
    content = {
        "model": state.objective.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "schedule": {"total_steps": plan.total_steps, "warmup_steps": plan.warmup_steps},
        "scaler": state.scaler.state_dict(),
        "step": state.step,
        "rng": {"cpu": rng, "cuda": rng_cuda},
        "sampler": {"seed": state.config.seed, "place": state.step * plan.samples_per_step},
        "world_sizes": state.world_sizes,
        "config": state.config.model_dump_json(),
        "config_digest": state.config.content_digest(),
        "selection_digest": state.selection_digest,
        "init_digest": state.init_digest,
        "best": vars(state.best),
        "timing": vars(state.timing),
    }
    save_checkpoint(state.folder, content, state.config.keep_checkpoints)


def _continue(state: TrainingState) -> None:
    content = newest_checkpoint(state.folder, state.config, state.selection_digest)
    size = state.world.size
    if content is None:
        state.world_sizes = [size]
        if state.world.is_main:
            truncate_after(state.folder, -1)
        return
    state.objective.load_state_dict(content["model"])
    state.optimiser.load_state_dict(content["optimiser"])
    if content["scaler"]:  # empty when the checkpoint is of a device without scaling
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]
    if content["init_digest"] != state.init_digest:
        raise CheckpointError(
            f"training {state.config.name} was started from weights {content['init_digest'][:12]}, "
            f"{state.config.init_from} now holds {state.init_digest[:12]}; start a new training"
        )
    state.best = Best(**content["best"])
    state.timing = Timing(**content.get("timing", {}))
    past = content["world_sizes"]
    state.world_sizes = past if past[-1] == size else [*past, size]
    _restore_rng(content["rng"], state.world)
    if state.world.is_main:
        truncate_after(state.folder, state.step)
        log.info("training %s continues at step %d of %d", state.config.name, state.step, state.plan.total_steps)
        if len(state.world_sizes) > 1:
            log.warning("the number of ranks changed (%s): results differ in rounding", state.world_sizes)


def _restore_rng(rng: dict[str, list[torch.Tensor]], world: World) -> None:
    if world.rank < len(rng["cpu"]):
        torch.set_rng_state(rng["cpu"][world.rank])
    if world.device.type == "cuda" and world.rank < len(rng["cuda"]):
        torch.cuda.set_rng_state(rng["cuda"][world.rank])
