"""How many optimiser steps a training has, and the learning rate of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.config import TrainingConfig


@dataclass(frozen=True)
class Plan:
    """Steps of a training on a given number of ranks."""

    cases: int
    """Training cases of the selection."""
    epochs: int
    samples_per_step: int
    """Cases of all ranks and micro-batches in one optimiser step; independent of the ranks at hand."""
    accumulation: int
    """Micro-batches per rank and optimiser step on the ranks at hand."""
    total_steps: int
    warmup_steps: int
    decay: tuple[int, float] | None = None
    """Epochs and factor of a rate that falls in steps; None: a cosine to 0."""

    def epoch(self, step: int) -> int:
        """Return the epoch (from 0) to which the first case of a step belongs."""
        return min(step * self.samples_per_step // self.cases, self.epochs - 1)

    def lr_factor(self, step: int) -> float:
        """Return the share of the base rate at optimiser step 0, 1, ...: linear rise, then cosine to 0, or steps.

        Counted in optimiser steps, so accumulation cannot make the rate rise again half-way.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay is not None:
            epochs, factor = self.decay
            return factor ** (self.epoch(step) // epochs)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def is_due(plan: Plan, step: int, every: int) -> bool:
    """Return whether `every` more epochs (a multiple of it) were finished by the last step, or all of them."""
    if not every or not step:
        return False
    period = every * plan.cases
    before, now = ((s * plan.samples_per_step) // period for s in (step - 1, step))
    return now > before or step == plan.total_steps


def plan_steps(config: TrainingConfig, cases: int, world_size: int) -> Plan:
    """Return the plan of a training with `cases` training cases on `world_size` ranks.

    The cases of one optimiser step are those of the config's own world size: on another one the accumulation changes
    instead. Raises ValueError when that does not divide.
    """
    if cases < 1:
        raise ValueError(f"training {config.name}: the selection has no training case; at least 1 is needed")
    per_step = config.world_size * config.data.batch_size * config.accumulation
    accumulation, rest = divmod(per_step, world_size * config.data.batch_size)
    if rest or not accumulation:
        raise ValueError(
            f"training {config.name}: {per_step} cases per optimiser step (world_size {config.world_size} x batch_size "
            f"{config.data.batch_size} x accumulation {config.accumulation}) cannot be dealt to {world_size} ranks; "
            f"use a number of ranks that divides {per_step // config.data.batch_size}"
        )
    total = max(1, math.ceil(config.epochs * cases / per_step))
    options = config.optimiser
    decay = (options.step_epochs, options.step_factor) if options.schedule == "step" else None
    return Plan(cases, config.epochs, per_step, accumulation, total, int(options.warmup_share * total), decay)
