"""UNET3D: sizes and shapes of the reference, all parts of a training, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from objective_cases import SPEC, make_batch, make_case, make_config, make_means
from pydantic import ValidationError
from training_phantoms import make_training, write_blobs

from models.config import BrainMVPConfig, ClassificationConfig, NetworkConfig, SegmentationConfig, UNet3DConfig
from models.distributed import World
from models.encoder import load_encoder
from models.export import read_done
from models.networks.build import build_encoder, build_pretraining_decoder
from models.networks.segmentation import SegmentationNet
from models.networks.unet3d import UNet3D, UNet3DPretrainingDecoder
from models.objectives import build_objective
from models.objectives.base import Clock
from models.objectives.brainmvp import PRESETS
from models.recipes import RECIPES, TUMOUR_REGIONS
from models.trainer import train

TINY = UNet3DConfig(widths=(8, 16, 16, 24), blocks=(1, 2, 1, 1))


def _count(*networks: torch.nn.Module) -> int:
    return sum(p.numel() for network in networks for p in network.parameters())


def test_parameter_count_and_shapes_are_those_of_the_reference() -> None:
    with torch.device("meta"):
        encoder, decoder = build_encoder(UNet3DConfig()), build_pretraining_decoder(UNet3DConfig())
        features = encoder(torch.empty(1, 1, 96, 96, 96))
    assert _count(encoder, decoder) == 18_799_937
    assert [tuple(x.shape[1:3]) for x in features] == [(1, 96), (32, 96), (64, 48), (128, 24), (256, 12)]
    assert features[4].flatten(1).shape[1] == 442_368
    assert decoder(features).shape == (1, 1, 96, 96, 96)


def test_axes_are_kept_and_sizes_restored() -> None:
    encoder, decoder = UNet3D(TINY), UNet3DPretrainingDecoder(TINY)
    features = encoder(torch.randn(2, 1, 16, 32, 48))
    assert features[4].shape == (2, 24, 2, 4, 6)
    assert decoder(features).shape == (2, 1, 16, 32, 48)


def test_a_block_adds_its_input() -> None:
    block = UNet3D(TINY).get_submodule("level1")[0]  # type: ignore[index]
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    image = torch.randn(1, 8, 4, 4, 4)
    assert torch.equal(block(image), image)


def test_outputs_can_be_chosen_case_by_case() -> None:
    encoder, decoder = UNet3D(TINY).eval(), UNet3DPretrainingDecoder(TINY, outputs=5)
    features = encoder(torch.randn(2, 1, 16, 16, 16))
    chosen = torch.tensor([[4, 0], [1, 1]])
    everything = decoder(features)
    expected = torch.stack([everything[case, outputs] for case, outputs in enumerate(chosen)])
    torch.testing.assert_close(decoder(features, chosen), expected)


def test_widths_must_fit_the_groups() -> None:
    with pytest.raises(ValueError, match="width of level 2 must be a multiple of groups: got 12 and 8"):
        UNet3D(TINY.replace(widths=(8, 12, 16, 16)))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_trains_every_parameter(preset: str) -> None:
    settings = PRESETS[preset].replace(contrast_from_epoch=0)
    objective = build_objective(make_config(settings, TINY, crop=(16, 16, 16)), SPEC, make_means())
    batch = make_batch(objective.sampler(), [make_case(number) for number in range(3)])
    objective(batch, Clock(step=0, epoch=0))["loss"].backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []
    assert set(objective.pictures(batch, Clock(0, 0))) == {"reconstruction", "templates"}


def test_it_is_fine_tuned_for_segmentation_and_classification() -> None:
    pretraining = build_objective(make_config(BrainMVPConfig(), TINY), SPEC)
    tensors = pretraining.exports()
    wide = TINY.replace(in_channels=2)
    segmentation = build_objective(
        make_config(SegmentationConfig(modalities=("t1", "t2"), regions=TUMOUR_REGIONS[:1]), wide), SPEC
    )
    loaded = segmentation.load_pretrained(tensors)
    stem = segmentation.encoder.state_dict()["stem.weight"]
    assert torch.allclose(stem, tensors["encoder.stem.weight"].repeat(1, 2, 1, 1, 1) / 2)
    assert {name for name in tensors if name.startswith("encoder.")} <= set(loaded)
    assert {name for name in tensors if name.startswith("decoder.up")} <= set(loaded)
    assert not any(name.startswith("decoder.out") for name in loaded), "the head made images, not regions"
    image = torch.randn(1, 2, 16, 32, 16)
    assert [tuple(x.shape) for x in segmentation.logits(image)] == [(1, 1, 16, 32, 16)] * 3
    classification = build_objective(
        make_config(ClassificationConfig(modalities=("t1", "t2"), classes=("a", "b", "c")), wide), SPEC
    )
    assert classification.logits(image).shape == (1, 3)


def test_the_segmentation_net_uses_every_stage() -> None:
    network = SegmentationNet(TINY, regions=2)
    torch.stack(network(torch.randn(1, 1, 16, 16, 16))).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_old_configs_without_a_kind_are_uniformers() -> None:
    config = RECIPES["brainmvp_tiny"]("s", "p")
    old = config.model_dump(mode="json")
    del old["network"]["kind"]
    assert type(config).model_validate(old) == config
    assert isinstance(config.network, NetworkConfig)
    assert isinstance(RECIPES["brainmvp_unet"]("s", "p").network, UNet3DConfig)
    with pytest.raises(ValidationError, match=r"'vit' found using .* does not match any of the expected tags"):
        type(config).model_validate({**old, "network": {"kind": "vit"}})


def test_a_killed_training_ends_with_the_same_bits_and_is_loaded(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    blobs = str(tmp_path / "blobs.zarr"), write_blobs(str(tmp_path / "blobs.zarr"))
    world = World(0, 1, torch.device("cpu"))
    digests = []
    for name, killed_at in (("undisturbed", -1), ("killed", 4)):
        folder = tmp_path / name
        config = make_training(folder, *blobs, network=UNet3DConfig(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1)), epochs=2)
        calls = iter(range(1000))

        def stop(at: int = killed_at, asked: object = calls) -> bool:
            if next(asked) == at:  # type: ignore[call-overload]
                raise Killed
            return False

        if killed_at >= 0:
            with pytest.raises(Killed):
                train(config, folder, world, stop)
        train(config, folder, world)
        digests.append((read_done(folder) or {})["weights_digest"])
    assert digests[0] == digests[1]
    assert load_encoder(tmp_path / "killed")(torch.rand(1, 1, 16, 16, 16))[4].shape == (1, 8, 2, 2, 2)
