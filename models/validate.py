"""Validation: metrics over the validation cases of all ranks, a look at collapse, and pictures for people."""

from __future__ import annotations

import logging
from typing import Any

import torch

from models.data import to_device
from models.distributed import gather_objects
from models.export import write_picture
from models.heartbeat import beat
from models.metrics import read_metrics
from models.monitor import ONE_VIEW, TWO_VIEWS, Views, collapse_warning, feature_metrics, pooled_features, split_views
from models.objectives.base import Metrics
from models.state import Stop, TrainingState, evaluating

log = logging.getLogger(__name__)

Sums = dict[str, tuple[float, float]]


def validate(state: TrainingState, stop: Stop, force: bool = False) -> bool:
    """Validate when the current step is due and has no validation line yet; `force` makes any step due.

    Leaves training untouched: own random numbers, evaluation mode, no gradients. When any rank is told to stop it gives
    up without a line and returns True on all ranks; the continued training then validates that step.
    """
    every = state.config.validate_every
    due = force or (every > 0 and state.step > 0 and state.step % every == 0)
    if not due or is_logged(state, "val"):
        return False
    sums, stopped, views = _local_sums(state, stop)
    parts = gather_objects((sums, stopped, views), state.world)
    metrics, stopped = merge_sums([(sums, stopped) for sums, stopped, _ in parts])
    if not stopped:
        _log(state, metrics, [views for *_, part in parts for views in part])
    return stopped


def _log(state: TrainingState, metrics: dict[str, float], views: list[Views]) -> None:
    metrics |= feature_metrics(views)
    cases = sum(len(one) for one, *_ in views)
    warning = collapse_warning(metrics, cases, state.config.running.rank_limit)
    record = {"kind": "val", "step": state.step, "epoch": state.finished_epoch, "metrics": metrics}
    if warning and state.world.is_main:
        log.warning("training %s, step %d: %s", state.config.name, state.step, warning)
    state.log({**record, "warning": warning} if warning else record)


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


def _local_sums(state: TrainingState, stop: Stop) -> tuple[Sums, bool, list[Views]]:
    """Return sums and counts over this rank's cases, whether it gave up, and the features of both views by batch."""
    sums: Sums = {}
    views: list[Views] = []
    with evaluating(state):
        for number, batch in enumerate(state.validation):
            beat(f"validating batch {number + 1} of {len(state.validation)}", state.step)
            if stop():
                return sums, True, views
            on_device = to_device(batch, state.world.device)
            if number == 0 and state.world.is_main:
                write_pictures(state, on_device)
            found, seen = _validate_batch(state, on_device)
            views += seen
            for name, (value, count) in found.items():
                old_value, old_count = sums.get(name, (0.0, 0.0))
                sums[name] = (old_value + float(value), old_count + float(count))
    return sums, False, views


def _validate_batch(state: TrainingState, batch: dict[str, Any]) -> tuple[Metrics, list[Views]]:
    settings = state.config.objective
    if not isinstance(settings, (*TWO_VIEWS, *ONE_VIEW)):
        return state.objective.validate(batch, state.clock()), []
    with pooled_features(state.objective.encoder) as pooled:
        found = state.objective.validate(batch, state.clock())
    if isinstance(settings, TWO_VIEWS):
        return found, [split_views(pooled)]
    return found, [(torch.cat(pooled).cpu(),)] if pooled else []


def write_pictures(state: TrainingState, batch: dict[str, Any]) -> None:
    """Write pictures/<name>.png of one validation batch, replacing those of an earlier step."""
    for name, picture in state.objective.pictures(batch, state.clock()).items():
        write_picture(state.folder / "pictures" / f"{name}.png", picture)


def is_logged(state: TrainingState, kind: str) -> bool:
    """Say on all ranks whether metrics.jsonl has a line of this kind for the current step."""
    logged = False
    if state.world.is_main:
        logged = any(line["kind"] == kind and line["step"] == state.step for line in read_metrics(state.folder))
    return gather_objects(logged, state.world)[0]
