"""The template channel mix: two whole copies of a case, learned templates in the right places, consistency at stage 4.

The reference repeats channels as c0,c0,c1,c1,... and halves that, takes an auxiliary logit map for the deep feature,
ignores the weight, inserts raw templates in a fixed order and fails with one or three channels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objective_cases import GRID, NETWORK, SPEC, make_batch, make_case, make_config
from pydantic import ValidationError

from models.config import (
    BrainMVPConfig,
    ClassificationConfig,
    Region,
    SegmentationConfig,
    SupervisedConfig,
    UNet3DConfig,
)
from models.filling import Templates
from models.objectives import build_objective
from models.objectives.base import Clock
from models.objectives.supervised import Supervised
from models.records import MODALITIES

START = Clock(step=0, epoch=0)
REGIONS = (Region(name="WT", labels=(1, 2)),)
FOUR = ("t1c", "t1", "flair", "t2")  # the file order of BraTS2023, which is not the order of the bank


def templates(*modalities: str) -> Templates:
    """Images that tell modality and place: 0.1 * index of the modality + a ramp."""
    ramp = np.linspace(0, 0.05, int(np.prod(GRID))).reshape(GRID)
    return Templates(np.stack([0.1 * (1 + MODALITIES.index(m)) + ramp for m in modalities]).astype(np.float16))


def settings_of(kind: str, modalities: tuple[str, ...], **changes: Any) -> SupervisedConfig:
    if kind == "segmentation":
        return SegmentationConfig(modalities=modalities, regions=REGIONS, **changes)
    return ClassificationConfig(modalities=modalities, classes=("control", "patient"), **changes)


def build(modalities: tuple[str, ...] = FOUR, kind: str = "segmentation", data: Any = (), **changes: Any) -> Supervised:
    torch.manual_seed(0)
    network = NETWORK.replace(in_channels=len(modalities))
    settings = settings_of(kind, modalities, **{"template_mix": 3, **changes})
    config = make_config(settings_of(kind, modalities), network, **dict(data))
    objective = build_objective(config.replace(objective=settings, init_from="p"), SPEC)
    assert isinstance(objective, Supervised)
    objective.use_templates(templates(*modalities))
    return objective


def cases(count: int = 2, present: tuple[str, ...] = MODALITIES) -> list[Any]:
    return [make_case(i, present=present, target=("control", "patient")[i % 2]) for i in range(count)]


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_both_copies_are_whole_and_replaced_channels_are_their_templates_at_the_crop(kind: str) -> None:
    sampler = build(kind=kind).sampler()
    info, reader = make_case(0, target="control", origin=(3, 1, 2))
    bank = templates(*FOUR)
    for seed in range(20):
        draw = sampler.draw(info, np.random.default_rng(seed), True)
        plain = sampler.load(info, reader, {key: value for key, value in draw.items() if key != "mixed"})
        mixed = sampler.load(info, reader, draw)
        if kind == "segmentation":
            draw["start"] = sampler._around_label(info, reader, draw) if draw["around_label"] else draw["start"]
        corner = np.add(info.origin, draw["start"])
        for name, replaced in zip(("image", "second"), draw["mixed"], strict=True):
            assert mixed[name].shape == plain["image"].shape == (4, 32, 32, 32)
            for k in range(4):
                expected = bank.window(k, corner, (32, 32, 32)) if k in replaced else plain["image"][k]
                np.testing.assert_array_equal(mixed[name][k], expected)


def draws(objective: Supervised, present: tuple[str, ...] = MODALITIES, count: int = 400) -> list[list[int]]:
    """Replaced channels of all copies of many draws."""
    sampler, (info, _) = objective.sampler(), make_case(0, present=present, target="control")
    found = [sampler.draw(info, np.random.default_rng(seed), True)["mixed"] for seed in range(count)]
    assert len({tuple(map(tuple, pair)) for pair in found}) > 1
    if objective.settings.template_mix > 1:
        assert any(one != two for one, two in found), "copies are mixed independently"
    return [copy for pair in found for copy in pair]


@pytest.mark.parametrize(
    ("modalities", "most"), [(FOUR, 3), (("flair", "dwi", "adc"), 2), (("t1", "flair"), 1), ((*FOUR, "pd"), 3)]
)
def test_the_number_of_replaced_channels_is_uniform_up_to_three_or_all_but_one(
    modalities: tuple[str, ...], most: int
) -> None:
    found = draws(build(modalities))
    counts = Counter(map(len, found))
    assert set(counts) == set(range(most + 1))
    assert all(abs(counts[n] / len(found) - 1 / (most + 1)) < 0.08 for n in counts)
    chosen = Counter(k for copy in found for k in copy)
    assert set(chosen) == set(range(len(modalities)))
    assert max(chosen.values()) < 1.4 * min(chosen.values())


def test_one_image_of_the_case_stays_real() -> None:
    found = draws(build(), present=("t1c", "flair"))
    assert {tuple(copy) for copy in found} == {(), (0,), (2,)}


def test_one_channel_needs_no_copies_and_works() -> None:
    objective = build(("t1",))
    batch = make_batch(objective.sampler(), cases())
    assert set(batch) == {"image", "target"}
    assert "loss_consistency" not in objective(batch, START)


def test_cases_with_one_image_can_share_a_batch_with_others() -> None:
    objective = build()
    batch = make_batch(objective.sampler(), [make_case(0), make_case(1, present=("t1",))])
    assert batch["second"].shape == (2, 4, 32, 32, 32)
    assert not batch["image"][1, [0, 2, 3]].any()
    assert objective(batch, START)["loss"].isfinite()


def test_templates_are_flipped_with_the_images() -> None:
    sampler = build(data={"flip": True}).sampler()
    info, reader = make_case(0)
    seed = next(s for s in range(50) if sampler.draw(info, np.random.default_rng(s), True)["mixed"][0])
    draw = sampler.draw(info, np.random.default_rng(seed), True)
    plain, flipped = (sampler.load(info, reader, {**draw, "flip": flip}) for flip in (False, True))
    for name in ("image", "second", "target"):
        np.testing.assert_array_equal(flipped[name], plain[name][:, ::-1])


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_the_consistency_is_the_weighted_distance_of_stage_four(kind: str, weight: float) -> None:
    objective = build(kind=kind, weight_consistency=weight).eval()
    batch = make_batch(objective.sampler(), cases())
    losses = objective(batch, START)
    one, two = (objective.encoder(batch[name])[-1] for name in ("image", "second"))
    assert one.shape[1:] == (NETWORK.embed_dims[3], 2, 2, 2)
    distance = F.mse_loss(one, two).item()
    assert distance > 0
    assert losses["loss_consistency"].item() == pytest.approx(distance, rel=1e-4)
    rest = dict.fromkeys(("second",))
    doubled = {
        name: torch.cat([value, batch["second"] if name == "image" else value])
        for name, value in batch.items()
        if name not in rest
    }
    alone = objective(doubled, START)["loss"].item()
    assert losses["loss"].item() == pytest.approx(alone + weight * distance, rel=1e-4)


def test_the_default_weight_is_the_papers() -> None:
    assert settings_of("segmentation", FOUR).weight_consistency == 0.1


def test_gradients_of_both_copies_reach_the_encoder() -> None:
    objective = build()
    objective(make_batch(objective.sampler(), cases()), START)["loss"].backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


def test_validation_and_prediction_see_the_case_as_it_is() -> None:
    objective = build().eval()
    sampler, (info, reader) = objective.sampler(), make_case(0)
    draw = sampler.draw(info, np.random.default_rng(0), False)
    assert "mixed" not in draw
    plain = build(template_mix=0).eval()
    plain.load_state_dict(objective.state_dict())
    np.testing.assert_array_equal(objective.predict(info, reader)["regions"], plain.predict(info, reader)["regions"])


def test_without_the_mix_nothing_of_it_happens() -> None:
    objective = build(template_mix=0)
    batch = make_batch(objective.sampler(), cases())
    assert "second" not in batch
    assert "loss_consistency" not in objective(batch, START)


@pytest.mark.parametrize("missing", ["zero", "template"])
def test_absent_channels_are_zeros_or_templates_and_are_not_read(missing: str) -> None:
    objective = build(template_mix=0, missing=missing).eval()
    info, reader = make_case(0, present=("t1", "t2"), origin=(1, 2, 0))
    read = objective.channels.read(info, reader, (0, 0, 0), info.extent)
    assert set(reader.asked) == {MODALITIES.index("t1"), MODALITIES.index("t2")}
    bank = templates(*FOUR)
    for k, modality in enumerate(FOUR):
        if modality in ("t1", "t2"):
            np.testing.assert_array_equal(read[k], reader.image[MODALITIES.index(modality)])
        elif missing == "zero":
            assert not read[k].any()
        else:
            np.testing.assert_array_equal(read[k], bank.window(k, info.origin, info.extent))


def test_fine_tuning_sees_the_voxels_of_pre_training() -> None:
    """The reference clips intensities in pre-training only."""
    info, reader = make_case(0)
    pretraining = build_objective(make_config(BrainMVPConfig(weight_contrast=0)), SPEC).sampler()
    draw = pretraining.draw(info, np.random.default_rng(0), True)
    seen = pretraining.load(info, reader, draw)["image"][0]
    sampler = build((MODALITIES[draw["target"]],), foreground_share=0.0).sampler()
    own = {**sampler.draw(info, np.random.default_rng(0), False), "start": draw["start"], "around_label": False}
    np.testing.assert_array_equal(sampler.load(info, reader, own)["image"][0], seen)


def test_exports_carry_the_templates_that_were_used() -> None:
    assert build().exports()["templates"].shape == (4, *GRID)
    plain = build_objective(make_config(settings_of("segmentation", ("t1",))), SPEC)
    assert "templates" not in plain.exports()


@pytest.mark.parametrize("changes", [{"template_mix": 3}, {"missing": "template"}])
def test_templates_without_a_pre_training_are_refused(changes: dict[str, Any]) -> None:
    settings = settings_of("segmentation", FOUR, **changes)
    with pytest.raises(
        ValidationError, match=r"training test: template_mix and missing 'template' need the template b"
    ):
        make_config(settings, NETWORK.replace(in_channels=4))
    config = make_config(settings_of("segmentation", FOUR), NETWORK.replace(in_channels=4))
    objective = build_objective(config.replace(objective=settings, init_from="p"), SPEC)
    with pytest.raises(ValueError, match="need learned templates: call use_templates first"):
        objective.sampler()


def test_settings_mean_what_they_say() -> None:
    """The reference parses "False" as true."""
    data = make_config(settings_of("segmentation", ("t1",))).data.model_dump()
    assert (
        type(make_config(settings_of("segmentation", ("t1",))).data).model_validate({**data, "flip": "False"}).flip
        is False
    )
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        settings_of("segmentation", FOUR, weight_consistency=-1.0)
    with pytest.raises(ValidationError, match=r"training test: select_every chooses weights by labelled .* 'brainmvp'"):
        make_config(BrainMVPConfig(weight_contrast=0)).replace(select_every=1)


def test_the_second_backbone_is_mixed_alike() -> None:
    network = UNet3DConfig(in_channels=4, widths=(8, 16, 16, 32), blocks=(1, 1, 1, 1))
    config = make_config(settings_of("segmentation", FOUR), network)
    config = config.replace(objective=settings_of("segmentation", FOUR, template_mix=3), init_from="p")
    objective = build_objective(config, SPEC).eval()
    assert isinstance(objective, Supervised)
    objective.use_templates(templates(*FOUR))
    batch = make_batch(objective.sampler(), cases())
    one, two = (objective.encoder(batch[name])[-1] for name in ("image", "second"))
    assert objective(batch, START)["loss_consistency"].item() == pytest.approx(F.mse_loss(one, two).item(), rel=1e-4)
