"""SwinUNETR and DynUNet: their halves are MONAI's whole, sizes, trainings, and what they are refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_cases import SPEC, make_case, make_config
from torch import Tensor
from training_phantoms import make_training, write_blobs

from models.config import BrainMVPConfig, ClassificationConfig, MaskedCropsConfig, NetworkConfig, SegmentationConfig
from models.config_scratch import SCRATCH_NETWORKS, DynUNetConfig, SwinUNETRConfig
from models.distributed import World
from models.encoder import load_encoder
from models.export import read_done
from models.networks import scratch
from models.networks.build import build_encoder, build_pretraining_decoder
from models.networks.segmentation import SegmentationNet
from models.objectives import build_objective
from models.recipes import RECIPES, TUMOUR_REGIONS
from models.released import WeightsError, layout_of
from models.trainer import train

KINDS = sorted(SCRATCH_NETWORKS)
SETTINGS = SegmentationConfig(modalities=("t1", "t2"), regions=TUMOUR_REGIONS[:1], overlap=0.25)
TINY = {
    "swin_unetr": SCRATCH_NETWORKS["swin_unetr"]["tiny"],
    "dynunet": DynUNetConfig(widths=(4, 8, 8, 8)),
}


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def moved(x: Tensor, pattern: str) -> Tensor:
    """What MONAI takes from einops."""
    return x.permute(0, 2, 3, 4, 1) if pattern.endswith("c") else x.permute(0, 4, 1, 2, 3)


def test_full_size_networks_have_the_parameters_that_their_configs_say() -> None:
    found = {}
    for kind, sizes in SCRATCH_NETWORKS.items():
        config = sizes["full"].replace(in_channels=4)
        assert config.kind == kind
        found[kind] = count(SegmentationNet(config, regions=3))
        assert f"{found[kind]:,} parameters" in " ".join((type(config).__doc__ or "").split())
    assert found == {"swin_unetr": 62_191_941, "dynunet": 16_546_857}


def test_swin_unetr_is_monais(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.networks.nets import swin_unetr

    monkeypatch.setattr(swin_unetr, "rearrange", moved)
    # Windows of 3 tokens do not divide the edges: padding and shifts take part.
    config = SwinUNETRConfig(in_channels=2, feature_size=12, depths=(2, 1, 1, 1), heads=(1, 2, 4, 8), window=3)
    torch.manual_seed(0)
    whole = scratch.swin_unetr(config, 2).eval()
    torch.manual_seed(0)
    encoder, decoder = (half.eval() for half in scratch.build_scratch(config, 2))
    image = torch.rand(1, 2, 32, 64, 32)
    stages = encoder(image)
    assert [tuple(x.shape[1:3]) for x in stages] == [(2, 32), (12, 16), (24, 8), (48, 4), (96, 2), (192, 1)]
    outputs = decoder(stages)
    assert len(outputs) == 1, "no deep supervision"
    torch.testing.assert_close(outputs[0], whole(image))
    assert count(whole) == count(encoder) + count(decoder)


@pytest.mark.parametrize("residual", [False, True])
def test_dynunet_is_monais_with_three_outputs(residual: bool) -> None:
    config = DynUNetConfig(in_channels=2, widths=(4, 8, 8, 12), residual=residual)
    torch.manual_seed(0)
    whole = scratch.dynunet(config, 2).eval()
    torch.manual_seed(0)
    encoder, decoder = (half.eval() for half in scratch.build_scratch(config, 2))
    image = torch.rand(1, 2, 16, 24, 16)
    outputs = decoder(encoder(image))
    torch.testing.assert_close(outputs[0], whole(image))
    heads: Any = whole.heads
    assert [tuple(x.shape[2:]) for x in heads] == [(8, 12, 8), (4, 6, 4)]
    for found, head in zip(outputs[1:], heads, strict=True):
        torch.testing.assert_close(found, F.interpolate(head, size=(16, 24, 16), mode="trilinear"))
    assert count(whole) == count(encoder) + count(decoder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained_at_the_crop_of_the_tiny_recipe(kind: str) -> None:
    config = RECIPES["segmentation_tiny"]("s", "p", network=SCRATCH_NETWORKS[kind]["tiny"])
    assert (config.network.kind, config.network.in_channels) == (kind, 4)
    assert RECIPES["segmentation"]("s", "p", network=SCRATCH_NETWORKS[kind]["full"]).data.crop == (96, 96, 96)
    network = SegmentationNet(config.network, regions=3)
    outputs = network(torch.rand(1, 4, *config.data.crop))
    assert [tuple(x.shape) for x in outputs] == [(1, 3, 32, 32, 32)] * {"swin_unetr": 1, "dynunet": 3}[kind]
    torch.stack(outputs).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_whole_cases_are_predicted_by_sliding_windows(kind: str) -> None:
    objective = build_objective(make_config(SETTINGS, TINY[kind].replace(in_channels=2)), SPEC)
    info, reader = make_case(0, extent=(20, 40, 34))
    assert objective.predict(info, reader)["regions"].shape == (1, 20, 40, 34)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_with_the_same_bits_and_starts_nothing_else(kind: str, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill() -> bool:
        if next(calls) == 1:
            raise Killed
        return False

    url, world, calls = str(tmp_path / "blobs.zarr"), World(0, 1, torch.device("cpu")), iter(range(1000))
    cases = write_blobs(url, cases=4)
    for name in ("whole", "killed"):
        folder = tmp_path / name
        data = {"store": url, "selection": str(folder / "selection.parquet"), "crop": (32, 32, 32), "batch_size": 2}
        changes = {"objective": SETTINGS, "epochs": 2, "checkpoint_every": 1, "validate_every": 0, "data": data}
        config = make_training(folder, url, cases, network=TINY[kind].replace(in_channels=2), **changes)
        if name == "killed":
            with pytest.raises(Killed):
                train(config, folder, world, kill)
        train(config, folder, world)
    digests = {(read_done(tmp_path / name) or {})["weights_digest"] for name in ("whole", "killed")}
    assert len(digests) == 1
    with pytest.raises(ValueError, match=f"network '{kind}' is for segmentation from scratch only: it has no encoder"):
        load_encoder(tmp_path / "whole")
    other = make_training(
        tmp_path / "other", url, cases, network=NetworkConfig(in_channels=2, head_dim=32), objective=SETTINGS,
        init_from=str(tmp_path / "whole"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="the pre-training has another encoder: encoder"):
        train(other, tmp_path / "other", world)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_refused_for_anything_but_segmentation_from_scratch(kind: str) -> None:
    network = SCRATCH_NETWORKS[kind]["tiny"]
    classes = ClassificationConfig(modalities=("t1",), classes=("a", "b"))
    for objective in (classes, BrainMVPConfig(), MaskedCropsConfig()):
        text = f"network '{kind}' is for segmentation from scratch only, not for objective '{objective.kind}'; use"
        with pytest.raises(ValueError, match=text):
            make_config(objective, network)
    with pytest.raises(ValueError, match=f"network '{kind}' is trained from scratch only, .* got init_from 'brain'"):
        RECIPES["segmentation_tiny"]("s", "p", network=network, init_from="brain")
    with pytest.raises(ValueError, match=f"network '{kind}' is for segmentation from scratch only: it has no encoder"):
        build_encoder(network)
    with pytest.raises(ValueError, match=f"network '{kind}' has no decoder; use 'uniformer' or 'unet3d'"):
        build_pretraining_decoder(network)
    with pytest.raises(WeightsError, match=f"network '{kind}' is trained from scratch only, so there is no layout of"):
        layout_of(network, (2, 2, 2))


def test_crops_and_sizes_that_do_not_fit_are_refused() -> None:
    full = SCRATCH_NETWORKS["swin_unetr"]["full"]
    with pytest.raises(ValueError, match=r"crop edges must be positive multiples of 32, got \(48, 48, 48\)"):
        RECIPES["segmentation"]("s", "p", network=full, crop=(48, 48, 48))
    with pytest.raises(ValueError, match=r"a crop of \(32, 32, 32\) leaves one voxel at 1/32, which network.norm 'i"):
        RECIPES["segmentation_tiny"]("s", "p", network=full)
    assert RECIPES["segmentation_tiny"]("s", "p", network=full, crop=(32, 32, 64)).data.crop == (32, 32, 64)
    with pytest.raises(ValueError, match=r"crop edges must be positive multiples of 16, got \(40, 48, 48\)"):
        RECIPES["segmentation"]("s", "p", network=SCRATCH_NETWORKS["dynunet"]["full"], crop=(40, 48, 48))
    with pytest.raises(ValueError, match="width of level 2 must be a multiple of its heads: got 24 and 5"):
        SwinUNETRConfig(feature_size=12, heads=(1, 5, 4, 8))
    network = SegmentationNet(TINY["swin_unetr"], regions=1)
    with pytest.raises(ValueError, match=r"edges must be multiples of 32 for the skips to fit, got \(32, 40, 32\)"):
        network(torch.rand(1, 1, 32, 40, 32))
