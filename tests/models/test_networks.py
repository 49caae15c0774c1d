"""Decoder, segmentation and classification networks: sizes, shapes, names."""

from __future__ import annotations

import pytest
import torch

from models.config import NetworkConfig
from models.networks.classification import ClassificationNet
from models.networks.decoder import PretrainingDecoder
from models.networks.segmentation import SegmentationNet
from models.networks.uniformer import UniFormer

TINY = NetworkConfig(embed_dims=(8, 16, 32, 48), depths=(1, 1, 1, 1), head_dim=16, decoder_dim=8)


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_decoder_has_only_the_used_parameters() -> None:
    decoder = PretrainingDecoder(NetworkConfig())
    assert _count(decoder) == 1_736_769
    assert {name: tuple(value.shape) for name, value in decoder.state_dict().items()} == {
        "decoder5.transp_conv.conv.weight": (512, 320, 2, 2, 2),
        "decoder4.transp_conv.conv.weight": (320, 128, 2, 2, 2),
        "decoder3.transp_conv.conv.weight": (128, 64, 2, 2, 2),
        "decoder2.transp_conv.conv.weight": (64, 64, 2, 2, 2),
        "out_1.conv.conv.weight": (1, 64, 1, 1, 1),
        "out_1.conv.conv.bias": (1,),
    }


def test_decoder_restores_size_and_axes() -> None:
    encoder, decoder = UniFormer(TINY), PretrainingDecoder(TINY)
    assert decoder(encoder(torch.randn(2, 1, 32, 48, 64))).shape == (2, 1, 32, 48, 64)


@pytest.mark.parametrize(("channels", "regions", "parameters"), [(4, 3, 34_323_593), (1, 1, 34_316_355)])
def test_segmentation_net_parameter_count(channels: int, regions: int, parameters: int) -> None:
    with torch.device("meta"):
        network = SegmentationNet(NetworkConfig(in_channels=channels), regions)
    assert _count(network) == parameters


def test_segmentation_outputs_have_the_size_of_the_input() -> None:
    network = SegmentationNet(TINY.replace(in_channels=2), regions=3)
    outputs = network(torch.randn(1, 2, 32, 48, 64))
    assert [tuple(x.shape) for x in outputs] == [(1, 3, 32, 48, 64)] * 3


def test_segmentation_refuses_edges_that_do_not_fit_the_skips() -> None:
    network = SegmentationNet(TINY, regions=1)
    with pytest.raises(ValueError, match=r"edges must be multiples of 16.*got \(32, 40, 32\)"):
        network(torch.randn(1, 1, 32, 40, 32))


def test_segmentation_trains_every_parameter() -> None:
    network = SegmentationNet(TINY, regions=1)
    torch.stack(network(torch.randn(1, 1, 32, 32, 32))).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_outputs_can_be_chosen_case_by_case() -> None:
    torch.manual_seed(0)
    encoder, decoder = UniFormer(TINY).eval(), PretrainingDecoder(TINY, outputs=5)
    features = encoder(torch.randn(2, 1, 16, 32, 16))
    chosen = torch.tensor([[4, 0], [1, 1]])
    everything = decoder(features)
    expected = torch.stack([everything[case, outputs] for case, outputs in enumerate(chosen)])
    torch.testing.assert_close(decoder(features, chosen), expected)


@pytest.mark.parametrize("skips", [False, True])
def test_only_the_stages_enter_the_decoder_never_the_image(skips: bool) -> None:
    torch.manual_seed(0)
    features = [torch.randn_like(x).requires_grad_() for x in UniFormer(TINY)(torch.randn(1, 1, 32, 32, 32))]
    PretrainingDecoder(TINY, skips=skips)(features).square().sum().backward()
    assert [x.grad is not None for x in features] == [False, skips, skips, skips, True]


def test_pretrained_decoder_names_exist_in_the_segmentation_net() -> None:
    pretraining, downstream = PretrainingDecoder(TINY).state_dict(), SegmentationNet(TINY, 1).decoder.state_dict()
    shared = [name for name in pretraining if name in downstream]
    assert len(shared) == 4
    assert all(pretraining[name].shape == downstream[name].shape for name in shared)


def test_classification_net_pools_stage_four() -> None:
    network = ClassificationNet(TINY, classes=3).eval()
    image = torch.randn(2, 1, 32, 32, 32)
    expected = network.head(network.encoder(image)[4].flatten(2).mean(2))
    assert torch.allclose(network(image), expected, atol=1e-6)
    assert network.head.weight.shape == (3, 48)
