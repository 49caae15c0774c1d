"""Layers arranged for speed against torch's own: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.config import NetworkConfig
from models.networks.decoder import PretrainingDecoder
from models.networks.layers import DepthwiseConv3d, PatchConv3d, PointwiseConv3d
from models.networks.uniformer import UniFormer, from_depth_first

LAYERS = {
    "depth-wise 3": (lambda: DepthwiseConv3d(6, 3), lambda: nn.Conv3d(6, 6, 3, padding=1, groups=6)),
    "depth-wise 5": (lambda: DepthwiseConv3d(6, 5), lambda: nn.Conv3d(6, 6, 5, padding=2, groups=6)),
    "pointwise": (lambda: PointwiseConv3d(6, 4), lambda: nn.Conv3d(6, 4, 1)),
    "patch": (lambda: PatchConv3d(6, 4), lambda: nn.Conv3d(6, 4, 2, stride=2)),
}
SHAPES = ((2, 6, 7, 6, 5), (3, 6, 2, 2, 3), (1, 6, 9, 2, 8))


def _results(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    out.backward(torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape))
    return [out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_torch_s_own_gives(
    name: str, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    ours, plain = (make() for make in LAYERS[name])
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    for found, expected in zip(_results(ours, x), _results(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_depth_wise_convolution_without_gradient_of_its_input_or_bias() -> None:
    layer = DepthwiseConv3d(2, 5)
    layer.bias = None
    layer(torch.randn(1, 2, 6, 6, 6)).square().sum().backward()
    assert layer.weight.grad is not None


def test_depth_wise_convolutions_stay_in_fp32_under_autocast_on_the_cpu() -> None:
    layer, x = DepthwiseConv3d(4, 3), torch.randn(1, 4, 5, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out, dense = layer(x.bfloat16()), PointwiseConv3d(4, 4)(x)
        out.sum().backward()
    assert (out.dtype, dense.dtype, layer.weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, layer(x.bfloat16().float()))


def test_a_network_in_bf16_is_close_to_fp32_and_has_all_gradients() -> None:
    torch.manual_seed(0)
    config = NetworkConfig(embed_dims=(8, 16, 32, 48), depths=(1, 1, 1, 1), head_dim=16, decoder_dim=8)
    encoder, decoder = UniFormer(config), PretrainingDecoder(config)
    x = torch.randn(2, 1, 32, 32, 32)
    expected = decoder(encoder(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder(encoder(x))
    assert (found - expected).norm() < 0.05 * expected.norm()
    found.float().square().sum().backward()
    gradients = [parameter.grad for part in (encoder, decoder) for parameter in part.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("chosen", [None, torch.tensor([[3, 0], [1, 1]])], ids=["all outputs", "chosen outputs"])
def test_the_last_two_layers_of_the_decoder_at_once(chosen: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(embed_dims=(4, 8, 16, 32), depths=(1, 1, 1, 1), head_dim=8, decoder_dim=6)
    decoder = PretrainingDecoder(config, outputs=4)
    features = [torch.randn(2, 32, 1, 3, 2)]
    x = features[-1]
    for level in (decoder.decoder5, decoder.decoder4, decoder.decoder3, decoder.decoder2):
        x = level(x)
    everything = from_depth_first(decoder.out_1(x))
    expected = everything if chosen is None else torch.stack([everything[case, k] for case, k in enumerate(chosen)])
    found = decoder(features, chosen)
    assert found.shape[2:] == (48, 32, 16)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
