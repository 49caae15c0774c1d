"""Segmentation objective: regions, crops, augmentation, loss, sliding windows, transfer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from objective_cases import NETWORK, RECOMMENDED, SPEC, make_batch, make_case, make_config, make_means

from models.config import OptimiserConfig, Region, SegmentationConfig
from models.objectives import build_objective
from models.objectives.base import Clock
from models.objectives.segmentation import Segmentation, start_around, to_regions
from models.objectives.supervised import augment
from models.records import MODALITIES

START = Clock(step=0, epoch=0)
WHOLE, CORE = Region(name="WT", labels=(1, 2)), Region(name="TC", labels=(2,))
SETTINGS = SegmentationConfig(modalities=("t2", "flair"), regions=(WHOLE, CORE))
TWO_CHANNELS = NETWORK.replace(in_channels=2)


def _build(settings: SegmentationConfig = SETTINGS, seed: int = 0, **data: object) -> Segmentation:
    torch.manual_seed(seed)
    objective = build_objective(make_config(settings, TWO_CHANNELS, **data), SPEC)
    assert isinstance(objective, Segmentation)
    return objective


@pytest.mark.parametrize("enhancing", [4, 3], ids=["BraTS until 2021", "BraTS 2023"])
def test_regions_are_unions_of_the_schemes_labels(enhancing: int) -> None:
    scheme = {"TC": (1, enhancing), "WT": (1, 2, enhancing), "ET": (enhancing,)}
    volume = np.array([0, 1, 2, enhancing], np.uint8).reshape(1, 1, 4)
    found = to_regions(volume, [Region(name=name, labels=labels) for name, labels in scheme.items()])
    assert found.reshape(3, 4).tolist() == [[0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]]


def test_channels_follow_the_config_and_missing_ones_are_zero() -> None:
    sampler = _build().sampler()
    info, reader = make_case(0, present=("t1", "t2"))
    draw = sampler.draw(info, np.random.default_rng(0), False)
    sample = sampler.load(info, reader, draw)
    assert set(reader.asked) == {MODALITIES.index("t2")}
    assert sample["image"][0].any()
    assert not sample["image"][1].any()
    assert sample["target"].shape == (2, 32, 32, 32)


def test_crops_around_labels_contain_them_and_stay_inside() -> None:
    sampler = _build(SETTINGS.replace(foreground_share=1.0), crop=(16, 16, 16)).sampler()
    info, reader = make_case(0)
    for seed in range(20):
        draw = json.loads(json.dumps(sampler.draw(info, np.random.default_rng(seed), True)))
        assert sampler.load(info, reader, draw)["target"][0].any()
    assert start_around((0, 39, 17), (36, 40, 34), (32, 32, 32)) == [0, 8, 1]
    assert start_around((3, 3, 3), (20, 40, 34), (32, 32, 32)) == [-6, 0, 0]


def test_foreground_share_of_zero_is_uniform_and_unlabelled_cases_work() -> None:
    info, reader = make_case(0)
    reader.label[:] = 0
    sampler = _build(SETTINGS.replace(foreground_share=1.0)).sampler()
    draw = sampler.draw(info, np.random.default_rng(0), True)
    assert not sampler.load(info, reader, draw)["target"].any()
    uniform = _build(SETTINGS.replace(foreground_share=0.0)).sampler()
    assert not any(uniform.draw(info, np.random.default_rng(seed), True)["around_label"] for seed in range(20))


def test_flip_mirrors_left_and_right_of_image_and_target_only() -> None:
    sampler = _build(flip=True).sampler()
    info, reader = make_case(0)
    draw = sampler.draw(info, np.random.default_rng(0), True)
    plain, flipped = (sampler.load(info, reader, {**draw, "flip": flip}) for flip in (False, True))
    for key in ("image", "target"):
        assert np.array_equal(flipped[key], plain[key][:, ::-1])
    flips = [sampler.draw(info, np.random.default_rng(seed), True)["flip"] for seed in range(200)]
    assert 70 < sum(flips) < 130
    assert not any(sampler.draw(info, np.random.default_rng(seed), False)["flip"] for seed in range(20))
    assert not any(_build().sampler().draw(info, np.random.default_rng(seed), True)["flip"] for seed in range(20))


def test_jitter_scales_and_shifts_each_channel_but_not_the_background() -> None:
    image = np.array([0.0, 0.5, 1.0], np.float32).reshape(1, 3, 1, 1).repeat(2, axis=0)
    out = augment(image, {"flip": False, "scale": [0.1, 0.0], "shift": [-0.05, 0.2]})
    assert out.reshape(2, 3).tolist() == [pytest.approx([0, 0.5, 1.05]), pytest.approx([0, 0.7, 1.2])]
    info, _ = make_case(0)
    draw = _build(intensity_jitter=0.1).sampler().draw(info, np.random.default_rng(0), True)
    assert all(0 < abs(value) <= 0.1 for value in draw["scale"] + draw["shift"])


def test_loss_is_weighted_and_summed_over_three_outputs() -> None:
    objective = _build()
    target = torch.zeros(2, 2, 8, 8, 8)
    target[:, 0, :4] = 1
    perfect = (target * 2 - 1) * 100
    losses = objective._losses([perfect] * 3, target)
    assert losses["loss"].item() == pytest.approx(0.0, abs=1e-5)
    wrong = objective._losses([-perfect] * 3, target)
    # Dice with smooth 1: first region 1 - 1 / (n + 1), second (no voxel, all found) likewise; BCE is 100 a voxel
    assert wrong["loss_dice"].item() == pytest.approx(3.0, abs=0.01)
    assert wrong["loss_bce"].item() == pytest.approx(300.0)
    assert wrong["loss"].item() == pytest.approx(0.7 * wrong["loss_dice"].item() + 0.3 * 300, rel=1e-5)


def test_training_step_reaches_every_parameter_and_learns() -> None:
    objective = _build()
    optimiser = torch.optim.AdamW(objective.parameter_groups(OptimiserConfig(lr=1e-2)))
    batch = make_batch(objective.sampler(), [make_case(i) for i in range(2)], train=False)
    history = []
    for step in range(10):
        optimiser.zero_grad()
        losses = objective(batch, Clock(step, 0))
        losses["loss"].backward()
        assert [name for name, p in objective.named_parameters() if p.grad is None] == []
        optimiser.step()
        history.append(losses["loss"].item())
    assert history[-1] < 0.9 * history[0]


def test_validation_counts_cases_with_the_region() -> None:
    objective = _build().eval()
    cases = [make_case(i) for i in range(2)]
    cases[1][1].label[cases[1][1].label == 2] = 1
    metrics = objective.validate(make_batch(objective.sampler(), cases, train=False), START)
    assert metrics["dice_WT"][1] == 2
    assert metrics["dice_TC"][1] == 1
    assert metrics["loss"][1] == 2


@pytest.mark.parametrize("extent", [(36, 40, 34), (20, 40, 34)])
def test_prediction_has_the_stored_extent(extent: tuple[int, int, int]) -> None:
    objective = _build().eval()
    regions = objective.predict(*make_case(0, extent=extent))["regions"]
    assert regions.shape == (2, *extent)
    assert regions.dtype == np.uint8
    assert set(np.unique(regions)) <= {0, 1}


def test_pictures_show_image_truth_and_probability() -> None:
    objective = _build().eval()
    picture = objective.pictures(make_batch(objective.sampler(), [make_case(0)]), START)["segmentation"]
    assert picture.shape[1] == 4 * (3 * 34 - 2)
    assert picture.shape[0] > 4 * 32, "no titles"


def test_pretraining_transfers_encoder_and_transposed_convolutions() -> None:
    torch.manual_seed(5)
    pretraining = build_objective(make_config(RECOMMENDED), SPEC, make_means())
    tensors = pretraining.exports()
    objective = _build()
    loaded = objective.load_pretrained(tensors)
    own = objective.state_dict()
    stem = "encoder.patch_embed1.proj.weight"
    assert set(loaded) == {n for n in tensors if n.startswith("encoder.") or ".transp_conv." in n}
    assert all(torch.equal(own[name], tensors[name]) for name in loaded if name != stem)
    assert torch.allclose(own[stem], tensors[stem].expand(-1, 2, -1, -1, -1) / 2)
    assert objective.transfer is not None
    left_out = objective.transfer.left_out
    assert set(left_out) == set(tensors) - set(loaded)
    assert left_out["template.bank"] == "no such tensor here"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"embed_dims": (6, 12, 24, 40)}, r"encoder\.patch_embed1\.proj\.bias: shape \(6,\) is not \(4,\) \(87 such"),
        (
            {"depths": (1, 2, 1, 1)},
            r"encoder\.blocks2\.1\.\S+: no such tensor here \(22 such tensors, 93 are expected\)",
        ),
    ],
    ids=["other widths", "a part of it"],
)
def test_pretraining_of_another_network_is_refused(network: dict, message: str) -> None:
    pretraining = build_objective(make_config(RECOMMENDED, NETWORK.replace(**network)), SPEC, make_means())
    objective = _build()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"the pre-training has another encoder: {message}.*; use the NetworkConfig of"
    ):
        objective.load_pretrained(pretraining.exports())
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items()), "nothing is loaded"


def test_a_pretraining_with_half_of_the_encoder_is_refused() -> None:
    tensors = build_objective(make_config(RECOMMENDED), SPEC, make_means()).exports()
    part = {name: value for name, value in tensors.items() if "blocks4" not in name}
    with pytest.raises(ValueError, match=r"encoder\.blocks4\.0\.\S+: absent from the pre-training \(\d+ such tensors"):
        _build().load_pretrained(part)


def test_channels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in_channels must equal the number of modalities .* got 1, set it to 2"):
        build_objective(make_config(SETTINGS), SPEC)
    with pytest.raises(ValueError, match="the store has no modality 'bold'"):
        build_objective(make_config(SETTINGS.replace(modalities=("t1", "bold")), TWO_CHANNELS), SPEC)
