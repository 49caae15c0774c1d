"""Classification objective: crops at one place, targets, loss, probabilities, transfer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from objective_cases import GRID, NETWORK, RECOMMENDED, SPEC, make_batch, make_case, make_config, make_means

from models.config import ClassificationConfig, OptimiserConfig
from models.objectives import build_objective
from models.objectives.base import Clock
from models.objectives.classification import Classification

START = Clock(step=0, epoch=0)
SETTINGS = ClassificationConfig(modalities=("t1",), classes=("control", "patient"))


def _build(seed: int = 0, **data: object) -> Classification:
    torch.manual_seed(seed)
    objective = build_objective(make_config(SETTINGS, **data), SPEC)
    assert isinstance(objective, Classification)
    return objective


def _cases() -> list:
    return [make_case(i, target=target) for i, target in enumerate(("control", "patient", "patient", "control"))]


def test_every_case_is_cropped_at_the_same_place_of_the_template_grid() -> None:
    sampler = _build().sampler()
    for origin, extent in (((2, 2, 1), (36, 40, 34)), ((10, 0, 5), (20, 44, 20))):
        info, reader = make_case(0, origin=origin, extent=extent, target="control")
        draw = sampler.draw(info, np.random.default_rng(0), True)
        assert np.add(draw["start"], origin).tolist() == [(g - 32) // 2 for g in GRID]
        assert sampler.load(info, reader, draw)["image"].shape == (1, 32, 32, 32)


def test_targets_are_class_indices() -> None:
    batch = make_batch(_build().sampler(), _cases())
    assert batch["target"].tolist() == [0, 1, 1, 0]


def test_unknown_target_is_refused_by_name() -> None:
    info, reader = make_case(2, target="unclear")
    sampler = _build().sampler()
    with pytest.raises(ValueError, match="case test/case2 must be one of control, patient, got 'unclear'"):
        sampler.load(info, reader, sampler.draw(info, np.random.default_rng(0), True))


def test_training_learns_two_classes() -> None:
    objective = _build()
    optimiser = torch.optim.AdamW(objective.parameter_groups(OptimiserConfig(lr=3e-3)))
    batch = make_batch(objective.sampler(), _cases())
    for step in range(15):
        optimiser.zero_grad()
        losses = objective(batch, Clock(step, 0))
        losses["loss"].backward()
        assert [name for name, p in objective.named_parameters() if p.grad is None] == []
        optimiser.step()
    assert losses["loss"].item() < 0.4 < math.log(2)


def test_validation_sums_over_cases() -> None:
    objective = _build().eval()
    batch = make_batch(objective.sampler(), _cases(), train=False)
    metrics = objective.validate(batch, START)
    loss, count = metrics["loss"]
    assert count == 4
    assert loss.item() == pytest.approx(4 * objective(batch, START)["loss"].item(), rel=1e-5)
    assert metrics["accuracy"][0] == (objective.logits(batch["image"]).argmax(1) == batch["target"]).sum()


def test_prediction_needs_no_target_and_equals_the_forward_pass() -> None:
    objective = _build(flip=True, intensity_jitter=0.1).eval()
    info, reader = make_case(1, target="patient")
    batch = make_batch(objective.sampler(), [(info, reader)], train=False)
    probabilities = objective.predict(make_case(1)[0], reader)["probabilities"]
    assert probabilities.dtype == np.float32
    assert probabilities == pytest.approx(objective.logits(batch["image"]).softmax(1)[0].tolist(), abs=1e-6)


def test_pretrained_encoder_is_loaded_whole_and_the_head_is_new() -> None:
    torch.manual_seed(5)
    tensors = build_objective(make_config(RECOMMENDED), SPEC, make_means()).exports()
    objective = _build()
    assert set(objective.load_pretrained(tensors)) == {name for name in tensors if name.startswith("encoder.")}
    assert all(torch.equal(v, tensors[n]) for n, v in objective.exports().items() if n.startswith("encoder."))


def test_input_must_match_the_network() -> None:
    with pytest.raises(ValueError, match="set it to 1"):
        build_objective(make_config(SETTINGS, NETWORK.replace(in_channels=3)), SPEC)
