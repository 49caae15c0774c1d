"""The template bank in training: only what a step used is sent and moved."""

from __future__ import annotations

import pytest
import torch
from objective_cases import RECOMMENDED, SPEC, make_batch, make_case, make_config, make_means
from torch import nn

from models.config import OptimiserConfig
from models.objectives.base import Clock
from models.objectives.brainmvp import BrainMVP
from models.optimiser import build_optimiser, clip_gradients


@pytest.mark.parametrize("kind", ["adamw", "adam", "muon"])
def test_templates_that_a_step_did_not_use_stay_to_the_bit(kind: str) -> None:
    torch.manual_seed(0)
    objective = BrainMVP(make_config(RECOMMENDED), SPEC, make_means())
    options = OptimiserConfig.model_validate({"kind": kind})
    optimiser = build_optimiser(objective.parameter_groups(options), options, objective.modules(), fused=False)
    for step, present in enumerate([("t1", "t2"), ("pd", "adc"), ("pd", "adc")]):
        batch = make_batch(objective.sampler(), [make_case(i, present=present) for i in range(4)], seed=step)
        before = objective.template.bank.detach().clone()
        optimiser.zero_grad()
        objective(batch, Clock(step, 0))["loss"].backward()
        optimiser.step()
        moved = (objective.template.bank != before).flatten(1).any(1).nonzero().flatten().tolist()
        assert moved == sorted(set(batch["template"].tolist()))


def test_rows_touched_at_every_step_move_as_with_adam() -> None:
    torch.manual_seed(0)
    lazy, dense = (nn.Parameter(x) for x in torch.randn(1, 6, 4).repeat(2, 1, 1))
    options = OptimiserConfig(lr=1e-2)
    groups = [{"name": "template", "params": [lazy], "lr": 1e-2, "weight_decay": 0.0}]
    one, two = build_optimiser(groups, options, [], fused=False), torch.optim.AdamW([dense], lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        values = torch.randn(2, 4)
        lazy.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), values, (6, 4), check_invariants=True)
        dense.grad = lazy.grad.to_dense()
        one.step()
        two.step()
    torch.testing.assert_close(lazy, dense)


@pytest.mark.parametrize("limit", [0.1, 1e3])
def test_sparse_gradients_are_clipped_like_dense_ones(limit: float) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(5, 4)), nn.Parameter(torch.zeros(5, 4))]
    dense = [nn.Parameter(torch.zeros(5, 4)) for _ in parameters]
    parameters[0].grad = torch.randn(5, 4)
    parameters[1].grad = torch.sparse_coo_tensor(torch.tensor([[2, 2, 0]]), torch.randn(3, 4), (5, 4)).coalesce()
    for parameter, other in zip(parameters, dense, strict=True):
        other.grad = parameter.grad.to_dense().clone()
    norm, expected = clip_gradients(parameters, limit), nn.utils.clip_grad_norm_(dense, limit)
    torch.testing.assert_close(norm, expected)
    for parameter, other in zip(parameters, dense, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), other.grad)
