"""The 3D ResNet of AnatCL: its sizes, the names of its weights, and the same numbers as MONAI's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from anat_phantoms import SPEC, tiny_config

from models.config import ResNet3DConfig
from models.networks.build import build_encoder, build_pretraining_decoder, pool
from models.networks.segmentation import SegmentationNet
from models.objectives.anatcl import AnatCL
from models.recipes_anatcl import TINY_RESNET

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "anatcl_keys.json").read_text())
"""Names and shapes in the released files."""
RESNET50 = ResNet3DConfig(block="bottleneck", blocks=(3, 4, 6, 3))


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_encoder_and_head_are_those_of_the_released_files() -> None:
    with torch.device("meta"):
        encoder = build_encoder(ResNet3DConfig())
        objective = AnatCL(tiny_config(Path("a"), "s", "anatcl", batch_size=32), SPEC)
    assert parameters(encoder) == 33_160_000
    assert parameters(objective.head) == 328_320
    ours = {name: list(value.shape) for name, value in objective.state_dict().items() if "descriptor" not in name}
    assert list(ours.items()) == list(KEYS.items())
    assert sum(math.prod(shape) for name, shape in KEYS.items() if "running" not in name and "num" not in name) == (
        33_160_000 + 328_320
    )


@pytest.mark.parametrize(
    ("config", "count", "features"),
    [(ResNet3DConfig(blocks=(3, 4, 6, 3)), 63_469_632, 512), (RESNET50, 46_155_072, 2048)],
)
def test_deeper_ones(config: ResNet3DConfig, count: int, features: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(config)
        coarse = encoder(torch.empty(1, 1, 40, 40, 40))[4]
    assert (parameters(encoder), config.feature_dim, coarse.shape[1]) == (count, features, features)


@pytest.mark.parametrize("width", [128, 145])
def test_stages_of_both_released_grids(width: int) -> None:
    with torch.device("meta"):
        stages = build_encoder(ResNet3DConfig())(torch.empty(2, 1, 121, width, 121))
    middle = {128: (32, 16, 8, 4), 145: (37, 19, 10, 5)}[width]
    expected = [(2, c, e, m, e) for c, e, m in zip((64, 128, 256, 512), (31, 16, 8, 4), middle, strict=True)]
    assert [tuple(stage.shape) for stage in stages[1:]] == expected
    assert pool(stages).shape == (2, 512)


@pytest.mark.full
@pytest.mark.parametrize("width", [128, 145])
def test_the_released_grids_are_computed(width: int) -> None:
    encoder = build_encoder(ResNet3DConfig()).eval()
    with torch.inference_mode():
        found = pool(encoder(torch.rand(1, 1, 121, width, 121)))
    assert found.shape == (1, 512)
    assert found.isfinite().all()


@pytest.mark.parametrize("config", [ResNet3DConfig(widths=(4, 8, 12, 16)), RESNET50.replace(widths=(4, 8, 12, 16))])
def test_it_computes_what_monai_s_resnet_does(config: ResNet3DConfig) -> None:
    from monai.networks.nets.resnet import ResNet

    theirs = ResNet(
        config.block,
        list(config.blocks),
        list(config.widths),
        n_input_channels=1,
        conv1_t_stride=2,
        feed_forward=False,
        bias_downsample=False,
    )
    ours = build_encoder(config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(2, 1, 33, 40, 29)
    assert torch.allclose(pool(ours(image)), theirs(image), atol=1e-5)
    assert torch.allclose(pool(ours.eval()(image)), theirs.eval()(image), atol=1e-5)


def test_it_has_no_decoder() -> None:
    for build in (build_pretraining_decoder, lambda config: SegmentationNet(config, 1)):
        with pytest.raises(ValueError, match="network 'resnet3d' has no decoder; use 'uniformer' or 'unet3d'"):
            build(ResNet3DConfig())


def test_released_weights_see_x_from_right_to_left_and_features_stay_in_the_frame_of_the_image() -> None:
    torch.manual_seed(0)
    plain = build_encoder(TINY_RESNET).eval()
    mirrored = build_encoder(TINY_RESNET.replace(mirror_x=True)).eval()
    mirrored.load_state_dict(plain.state_dict())
    image = torch.rand(1, 1, 31, 20, 16)
    with torch.inference_mode():
        ours, expected = mirrored(image), plain(image.flip(2))
    assert torch.equal(ours[0], image)
    assert all(torch.equal(level, other.flip(2)) for level, other in zip(ours[1:], expected[1:], strict=True))
