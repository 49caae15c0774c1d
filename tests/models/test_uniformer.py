"""UniFormer against the reference's outputs, its parameter counts and names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.config import NetworkConfig
from models.networks.uniformer import UniFormer, from_depth_first, to_depth_first

REFERENCE = Path(__file__).parents[1] / "golden" / "uniformer_tiny.safetensors"
TINY = NetworkConfig(embed_dims=(8, 16, 40, 64), depths=(1, 2, 2, 1), head_dim=8)


def _reference() -> tuple[UniFormer, dict[str, torch.Tensor]]:
    tensors = load_file(REFERENCE)
    network = UniFormer(TINY)
    parameters = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    network.load_state_dict(parameters, strict=True)
    return network, tensors


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_reference_file_describes_the_tiny_network() -> None:
    with safe_open(REFERENCE, "pt") as file:
        metadata = file.metadata()
    assert metadata["embed_dim"] == "8,16,40,64"
    assert metadata["depth"] == "1,2,2,1"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_outputs_equal_the_reference_in_eval_mode(memory_format: torch.memory_format) -> None:
    network, tensors = _reference()
    network.eval().to(memory_format=memory_format)
    with torch.no_grad():
        outputs = network(tensors["input"])
    for stage, output in enumerate(outputs):
        expected = tensors[f"eval.stage{stage}"]
        assert output.shape == expected.shape
        assert _relative(output, expected) < 1e-5, stage


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_outputs_equal_the_reference_in_train_mode(memory_format: torch.memory_format) -> None:
    network, tensors = _reference()
    network.train().to(memory_format=memory_format)
    assert _relative(network(tensors["input"])[4], tensors["train.stage4"]) < 1e-5


@pytest.mark.parametrize(("channels", "parameters"), [(1, 22_038_464), (4, 22_040_000)])
def test_uniformer_s_parameter_count(channels: int, parameters: int) -> None:
    with torch.device("meta"):
        network = UniFormer(NetworkConfig(in_channels=channels))
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_uniformer_s_stage_shapes_and_block_parameters() -> None:
    with torch.device("meta"):
        network = UniFormer(NetworkConfig()).eval()
        outputs = network(torch.empty(1, 1, 96, 96, 96))
    assert [tuple(x.shape[1:3]) for x in outputs] == [(1, 96), (64, 48), (128, 24), (320, 12), (512, 6)]
    blocks = [sum(p.numel() for p in network.get_submodule(f"blocks{i}").parameters()) for i in (1, 2, 3, 4)]
    assert blocks == [154_560, 739_840, 9_935_360, 9_500_160]


def test_axis_order_is_undone() -> None:
    image = torch.randn(1, 2, 3, 4, 5)
    assert to_depth_first(image).shape == (1, 2, 5, 3, 4)
    assert torch.equal(from_depth_first(to_depth_first(image)), image)


def test_width_must_fit_the_heads() -> None:
    with pytest.raises(ValueError, match="width of stage 3 must be a multiple of head_dim: got 40 and 16"):
        UniFormer(NetworkConfig(embed_dims=(8, 16, 40, 64), head_dim=16))


def test_forward_and_backward_are_bitwise_deterministic_on_one_thread() -> None:
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = UniFormer(TINY).to(memory_format=torch.channels_last_3d)
        network(torch.randn(2, 1, 32, 32, 32))[4].square().mean().backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.set_num_threads(threads)
    assert len(first) == len(list(UniFormer(TINY).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
