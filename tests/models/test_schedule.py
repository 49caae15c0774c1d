"""Steps and learning rates: counted in optimiser steps, never rising after warm-up."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_phantoms import small_config

from models.schedule import Plan, plan_steps


def plan(tmp_path: Path, cases: int = 10, world: int = 1, **changes: object) -> Plan:
    return plan_steps(small_config(tmp_path, "store", **changes), cases, world)


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_rate_never_rises_after_warm_up_and_ends_at_zero(tmp_path: Path, accumulation: int, warmup: float) -> None:
    optimiser = small_config(tmp_path, "store").optimiser.replace(warmup_share=warmup)
    steps = plan(tmp_path, cases=30, epochs=40, accumulation=accumulation, optimiser=optimiser)
    rates = [steps.lr_factor(step) for step in range(steps.total_steps + 1)]
    peak = steps.warmup_steps
    assert rates[peak] == 1.0
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert min(rates[:-1]) > 0, "a step with rate 0 would be wasted"


def test_all_epochs_are_complete_and_epochs_count_from_zero(tmp_path: Path) -> None:
    steps = plan(tmp_path, cases=7, epochs=3, accumulation=2)
    assert steps.samples_per_step == 4
    assert steps.total_steps == 6
    assert [steps.epoch(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]


def test_another_world_size_keeps_the_cases_of_a_step(tmp_path: Path) -> None:
    usual = plan(tmp_path, world=2, world_size=2, accumulation=1)
    alone = plan(tmp_path, world=1, world_size=2, accumulation=1)
    assert usual.samples_per_step == alone.samples_per_step == 4
    assert (usual.accumulation, alone.accumulation) == (1, 2)
    assert usual.total_steps == alone.total_steps


def test_a_world_size_that_does_not_divide_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 cases per optimiser step .* cannot be dealt to 3 ranks; use .* divides 2"):
        plan(tmp_path, world=3, world_size=2)


def test_no_training_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training case; at least 1 is needed"):
        plan(tmp_path, cases=0)
