"""The training loop, in one file: data, forward/backward, clip, finite check on all ranks, step, log, save."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.config import TrainingConfig
from models.data import to_device
from models.distributed import World, any_rank, sum_over_ranks
from models.finish import finish_training
from models.metrics import append_metrics
from models.state import Stop, Stopped, TrainingState, save_state, start_training
from models.validate import validate


class NotFiniteError(FloatingPointError):
    """A loss or a gradient became NaN or infinite."""


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step gave, on all ranks together."""

    losses: dict[str, float]
    lr: float
    grad_norm: float
    data_wait_seconds: float
    stopping: bool


def train(config: TrainingConfig, folder: Path, world: World, stop: Stop = lambda: False) -> None:
    """Run a training to its end, from its newest checkpoint if there is one; every rank calls this.

    `stop` is asked after each step (and between validation batches): when any rank says yes, a checkpoint is written
    and Stopped raised. Raises NotFiniteError naming the step; the checkpoint before it is left as it is.
    """
    state = start_training(config, folder, world)
    log_every = max(1, state.plan.total_steps // 2000)
    while state.step < state.plan.total_steps:
        if validate(state, stop):
            _stop_here(state)
        started = time.perf_counter()
        report = train_step(state, stop)
        if world.is_main and (state.step % log_every == 0 or state.step <= 10):
            append_metrics(folder, train_record(state, report, time.perf_counter() - started))
        if state.step == state.plan.total_steps or state.step % config.checkpoint_every == 0:
            save_state(state)
        if report.stopping:
            _stop_here(state)
    finish_training(state, stop)


def _stop_here(state: TrainingState) -> None:
    save_state(state)
    raise Stopped(f"training {state.config.name} was stopped at step {state.step} of {state.plan.total_steps}")


def train_step(state: TrainingState, stop: Stop) -> StepReport:
    """Do one optimiser step: all micro-batches, one synchronisation of gradients, one update."""
    state.model.train()
    state.optimiser.zero_grad(set_to_none=True)
    lr = set_learning_rate(state)
    clock, accumulation, waited = state.clock(), state.plan.accumulation, 0.0
    total: dict[str, Tensor] = {}
    cases: list[str] = []
    for micro in range(accumulation):
        asked = time.perf_counter()
        batch = to_device(next(state.batches), state.world.device)
        waited += time.perf_counter() - asked
        cases += batch["case"]
        with _unsynchronised(state, last=micro == accumulation - 1):
            with _autocast(state):
                losses = state.model(batch, clock)
            state.scaler.scale(losses["loss"] / accumulation).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach().float() / accumulation
    state.scaler.unscale_(state.optimiser)
    norm = float(torch.nn.utils.clip_grad_norm_(state.objective.parameters(), state.config.optimiser.clip_norm))
    losses_mean = _mean_over_ranks(total, state.world)
    # With fp16 an infinite gradient is how the scaler finds its scale; it skips that update itself.
    finite = math.isfinite(float(total["loss"])) and (state.scaler.is_enabled() or math.isfinite(norm))
    broken, stopping = any_rank([not finite, stop()], state.world)
    if broken:
        raise NotFiniteError(_not_finite_text(state, total, norm, cases))
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.step += 1
    return StepReport(losses_mean, lr, norm if math.isfinite(norm) else 0.0, waited, stopping)


def set_learning_rate(state: TrainingState) -> float:
    """Set the rate of the coming step in all groups and return that of the first."""
    factor = state.plan.lr_factor(state.step)
    for group in state.optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return state.optimiser.param_groups[0]["lr"]


def train_record(state: TrainingState, report: StepReport, seconds: float) -> dict[str, Any]:
    """Return the metrics line of the step just done."""
    plan = state.plan
    return {
        "kind": "train",
        "step": state.step,
        "epoch": plan.epoch(state.step - 1),
        "losses": report.losses,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "seconds": round(seconds, 4),
        "data_wait_seconds": round(report.data_wait_seconds, 4),
        "samples_per_second": round(plan.samples_per_step / seconds, 3),
        "eta_seconds": round(seconds * (plan.total_steps - state.step), 1),
        "total_steps": plan.total_steps,
    }


def _unsynchronised(state: TrainingState, last: bool) -> contextlib.AbstractContextManager[None]:
    """Keep gradients local until the last micro-batch: one all-reduce a step."""
    if last or not isinstance(state.model, DistributedDataParallel):
        return contextlib.nullcontext()
    return state.model.no_sync()


def _autocast(state: TrainingState) -> contextlib.AbstractContextManager[None]:
    """Lower precision on CUDA only: bf16 depth-wise convolutions are slower than fp32 on a CPU."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds.get(state.config.precision)
    if kind is None or state.world.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=kind)


def _mean_over_ranks(losses: dict[str, Tensor], world: World) -> dict[str, float]:
    names = sorted(losses)
    values = sum_over_ranks(torch.stack([losses[name] for name in names]), world) / world.size
    return dict(zip(names, values.tolist(), strict=True))


def _not_finite_text(state: TrainingState, losses: dict[str, Tensor], norm: float, cases: list[str]) -> str:
    values = ", ".join(f"{name} {float(value):g}" for name, value in sorted(losses.items()))
    return (
        f"training {state.config.name}: not finite at step {state.step} (epoch {state.plan.epoch(state.step)}): "
        f"{values}, gradient norm {norm:g} on rank {state.world.rank}; its cases: {', '.join(cases[:8])}. The weights "
        "were not changed; look at those cases, or lower optimiser.lr and start a new training"
    )
