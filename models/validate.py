"""Validation: metrics over the validation cases of all ranks, and pictures for people."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from models.data import to_device
from models.distributed import World, broadcast_buffers
from models.export import write_picture
from models.metrics import append_metrics, read_metrics
from models.state import Stop, TrainingState

Sums = dict[str, tuple[float, float]]


def validate(state: TrainingState, stop: Stop, force: bool = False) -> bool:
    """Validate when the current step is due and has no validation line yet; `force` makes any step due.

    Leaves training untouched: own random numbers, evaluation mode, no gradients. When any rank is told to stop it gives
    up without a line and returns True on all ranks; the continued training then validates that step.
    """
    every = state.config.validate_every
    due = force or (every > 0 and state.step > 0 and state.step % every == 0)
    if not due or _is_logged(state):
        return False
    with torch.random.fork_rng(enabled=True), torch.no_grad():
        sums, stopped = _local_sums(state, stop)
    metrics, stopped = merge_sums(_gather((sums, stopped), state.world))
    if state.world.is_main and not stopped:
        epoch = state.plan.epoch(max(0, state.step - 1))
        append_metrics(state.folder, {"kind": "val", "step": state.step, "epoch": epoch, "metrics": metrics})
    return stopped


def merge_sums(parts: list[tuple[Sums, bool]]) -> tuple[dict[str, float], bool]:
    """Return the means over all ranks' sums and counts, and whether any rank gave up. A count of 0 gives no metric."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for part, _ in parts:
        for name, (value, count) in part.items():
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0.0) + count
    means = {name: sums[name] / counts[name] for name in sorted(sums) if counts[name] > 0}
    return means, any(stopped for _, stopped in parts)


def _local_sums(state: TrainingState, stop: Stop) -> tuple[Sums, bool]:
    broadcast_buffers(state.objective, state.world)
    state.model.eval()
    sums: Sums = {}
    try:
        for number, batch in enumerate(state.validation):
            if stop():
                return sums, True
            on_device = to_device(batch, state.world.device)
            if number == 0 and state.world.is_main:
                write_pictures(state, on_device)
            for name, (value, count) in state.objective.validate(on_device, state.clock()).items():
                old_value, old_count = sums.get(name, (0.0, 0.0))
                sums[name] = (old_value + float(value), old_count + float(count))
    finally:
        state.model.train()
    return sums, False


def write_pictures(state: TrainingState, batch: dict[str, Any]) -> None:
    """Write pictures/<name>.png of one validation batch, replacing those of an earlier step."""
    for name, picture in state.objective.pictures(batch, state.clock()).items():
        write_picture(state.folder / "pictures" / f"{name}.png", picture)


def _is_logged(state: TrainingState) -> bool:
    logged = False
    if state.world.is_main:
        logged = any(line["kind"] == "val" and line["step"] == state.step for line in read_metrics(state.folder))
    return _gather(logged, state.world)[0]


def _gather(value: Any, world: World) -> list[Any]:
    if world.size == 1:
        return [value]
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, value)
    return parts
