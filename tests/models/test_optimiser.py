"""Optimisers: Muon against torch's own, what goes where, exact continuation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.config import NetworkConfig, OptimiserConfig
from models.networks.uniformer import UniFormer
from models.optimiser import MOMENTUM, Mixed, as_matrix, build_optimiser, matrices, orthogonalise


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv3d(1, 16, 2, stride=2), nn.Conv3d(16, 32, 3, padding=1), nn.Conv3d(32, 32, 3, groups=32))
    return nn.Sequential(*layers, nn.GELU(), nn.Flatten(), nn.Linear(32, 24), nn.Linear(24, 2))


def _optimiser(network: nn.Module, **options: object) -> torch.optim.Optimizer:
    settings = OptimiserConfig.model_validate({"kind": "muon", "lr": 1e-2, "muon_lr": 0.05, **options})
    groups = [{"name": "network", "params": list(network.parameters()), "lr": settings.lr, "weight_decay": 0.1}]
    return build_optimiser(groups, settings, network.modules(), fused=False)


def _step(network: nn.Module, optimiser: torch.optim.Optimizer, number: int) -> float:
    x = torch.randn(8, 1, 6, 6, 6, generator=torch.Generator().manual_seed(number))
    loss = nn.functional.cross_entropy(network(x), (x.mean(dim=(1, 2, 3, 4)) > 0).long())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    scales = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    got = orthogonalise(left @ torch.diag(scales) @ right)
    inside = left.T @ got @ right.T
    assert inside.diagonal().min() > 0.6
    assert inside.diagonal().max() < 1.3
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-6


def test_a_step_is_that_of_torch_muon() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(x) for x in torch.randn(1, 64, 32).repeat(2, 1, 1))
    first = Mixed([{"params": [ours], "muon": True, "lr": 0.02, "weight_decay": 0.1}])
    second = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=MOMENTUM)
    for _ in range(3):
        ours.grad = torch.randn(64, 32)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0.0)  # torch iterates in bfloat16


def test_dense_layers_and_full_convolutions_are_matrices_but_not_stems_heads_and_depthwise_ones() -> None:
    network = _network()
    names = {name for name, parameter in network.named_parameters() if parameter in matrices(network.modules())}
    assert names == {"1.weight", "5.weight"}
    encoder = UniFormer(NetworkConfig(embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), head_dim=32))
    names = {name for name, parameter in encoder.named_parameters() if parameter in matrices(encoder.modules())}
    assert "patch_embed1.proj.weight" not in names
    assert {"patch_embed2.proj.weight", "blocks1.0.conv1.weight", "blocks4.0.attn.qkv.weight"} <= names
    assert not any("pos_embed" in name or "norm" in name or name.endswith("bias") for name in names)


def test_every_parameter_is_in_one_group_with_the_rate_of_its_kind() -> None:
    network = _network()
    optimiser = _optimiser(network)
    assert {group["name"]: (group["lr"], group["initial_lr"], group["muon"]) for group in optimiser.param_groups} == {
        "network": (1e-2, 1e-2, False),
        "network matrices": (0.05, 0.05, True),
    }
    grouped = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())


def test_training_goes_down() -> None:
    network = _network()
    optimiser = _optimiser(network)
    losses = [_step(network, optimiser, number) for number in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_layout_of_the_weights_changes_nothing() -> None:
    one, two = _network(), _network()
    for parameter in two.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    for network in (one, two):
        optimiser = _optimiser(network)
        for name, parameter in network.named_parameters():
            torch.manual_seed(len(name))
            parameter.grad = torch.randn(parameter.shape)
        optimiser.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_in_half_precision_changes_no_weight(fused: bool) -> None:
    network = _network()
    groups = [{"name": "network", "params": list(network.parameters()), "lr": 1e-2, "weight_decay": 0.0}]
    optimiser = build_optimiser(groups, OptimiserConfig(kind="muon"), network.modules(), fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(network.state_dict())
    scaler.scale(network(torch.randn(2, 1, 6, 6, 6)).sum()).backward()
    network[1].weight.grad[0] = torch.inf
    scaler.unscale_(optimiser)
    scaler.step(optimiser)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert scaler.get_scale() == 512.0


def test_a_saved_state_continues_bit_for_bit() -> None:
    network = _network()
    optimiser = _optimiser(network)
    for number in range(3):
        _step(network, optimiser, number)
    other = copy.deepcopy(network)
    continued = _optimiser(other)
    continued.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for number in range(3, 6):
        assert _step(network, optimiser, number) == _step(other, continued, number)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_of_a_matrix_are_output_channels() -> None:
    assert as_matrix(torch.zeros(4, 2, 3, 3, 3)).shape == (4, 54)
