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

from models.best import look
from models.config import TrainingConfig
from models.data import to_device
from models.distributed import World, any_rank, average_sparse_gradients, sum_over_ranks
from models.finish import finish_training
from models.heartbeat import beat, beating
from models.monitor_probe import probe
from models.optimiser import clip_gradients
from models.state import Stop, Stopped, TrainingState, save_state, start_training
from models.validate import validate

SMALLEST_SCALE = 2.0**-14
"""Of the fp16 scaler: gradients that are still infinite below it are NaN, and no scale will help."""


class NotFiniteError(FloatingPointError):
    """A loss or a gradient became NaN or infinite."""


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step gave, on all ranks together."""

    losses: dict[str, float]
    lr: float
    grad_norm: float
    data_wait_seconds: float
    """Mean over ranks."""
    stopping: bool


def train(config: TrainingConfig, folder: Path, world: World, stop: Stop = lambda: False) -> None:
    """Run a training to its end, from its newest checkpoint if there is one; every rank calls this.

    `stop` is asked after each step (and between validation batches): when any rank says yes, a checkpoint is written
    and Stopped raised. Raises NotFiniteError naming the step; the checkpoint before it is left as it is.
    """
    with beating(folder, world.rank), contextlib.closing(start_training(config, folder, world, stop)) as state:
        while state.step < state.plan.total_steps:
            if look(state, stop) or validate(state, stop) or probe(state, stop):
                _stop_here(state)
            started = time.perf_counter()
            report = train_step(state, stop)
            seconds = time.perf_counter() - started
            state.timing.add(seconds, report.data_wait_seconds)
            if is_logged_step(state.step, state.plan.total_steps):
                state.log(train_record(state, report, seconds))
            if state.step == state.plan.total_steps or state.step % config.checkpoint_every == 0:
                save_state(state)
            if report.stopping:
                _stop_here(state)
        finish_training(state, stop)


def is_logged_step(step: int, total_steps: int) -> bool:
    """Say whether a finished step gets a metrics line: the first ten, the last, and some 2000 to 4000 spread evenly."""
    return step <= 10 or step == total_steps or step % max(1, total_steps // 2000) == 0


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
        beat("reading data", state.step)
        asked = time.perf_counter()
        batch = to_device(next(state.batches), state.world.device)
        waited += time.perf_counter() - asked
        beat("computing", state.step)
        cases += batch["case"]
        with _unsynchronised(state, last=micro == accumulation - 1):
            with _autocast(state):
                losses = state.model(batch, clock)
            state.scaler.scale(losses["loss"] / accumulation).backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach().float() / accumulation
    average_sparse_gradients(state.objective, state.world)
    state.scaler.unscale_(state.optimiser)
    norm = float(clip_gradients(state.objective.parameters(), state.config.optimiser.clip_norm))
    mean = _mean_over_ranks(
        {**total, "data_wait_seconds": torch.tensor(waited, device=state.world.device)}, state.world
    )
    # With fp16 an infinite gradient is how the scaler finds its scale; it skips that update itself.
    searching = state.scaler.is_enabled() and state.scaler.get_scale() > SMALLEST_SCALE
    finite = math.isfinite(float(total["loss"])) and (searching or math.isfinite(norm))
    broken, stopping = any_rank([not finite, stop()], state.world)
    if broken:
        raise NotFiniteError(_not_finite_text(state, total, norm, cases))
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.step += 1
    waited = mean.pop("data_wait_seconds")
    return StepReport(mean, lr, norm if math.isfinite(norm) else 0.0, waited, stopping)


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


def bf16_on_cpu() -> bool:
    """Say whether this processor multiplies matrices of bf16 (AMX); without, autocast would only slow it down."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _autocast(state: TrainingState) -> contextlib.AbstractContextManager[None]:
    """Lower precision on CUDA, and bf16 on a CPU that is made for it; depth-wise convolutions stay in fp32 there."""
    device, kind = state.world.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(state.config.precision)
    if kind is None or (device == "cpu" and not (kind == torch.bfloat16 and bf16_on_cpu())):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=kind)


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
