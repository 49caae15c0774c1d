"""The benchmark of a step runs through on a tiny network, and the peer is what the reference computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from objective_cases import GRID, NETWORK, SPEC, make_batch, make_case, make_config

from bench import step
from bench.inputs import centred
from bench.reference import Decoder, Encoder, Reference
from bench.timing import Rounds
from models.config import BrainMVPConfig, NetworkConfig
from models.objectives.base import Clock
from models.objectives.brainmvp import BrainMVP
from models.spec import PreprocessSpec


def test_the_peer_has_the_reference_s_parameters() -> None:
    with torch.device("meta"):
        encoder, decoder = Encoder(NetworkConfig()), Decoder(NetworkConfig())
    assert sum(p.numel() for p in encoder.parameters()) == 22_038_464
    assert sum(p.numel() for p in decoder.parameters()) == 12_277_697


def test_equal_losses_and_gradients_for_equal_masks_and_weights() -> None:
    torch.manual_seed(0)
    settings = BrainMVPConfig(contrast_from_epoch=0)
    ours = BrainMVP(make_config(settings), SPEC)
    ours.template.bank.data.uniform_()
    ours.use_channels_last()
    theirs = Reference(NETWORK, GRID, settings.mask_block)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    batch = make_batch(
        ours.sampler(), [make_case(number, extent=(38, 40, 34), origin=(1, 2, 1)) for number in range(3)]
    )
    assert batch["cross"].all()
    losses = ours(batch, Clock(step=0, epoch=0))
    assert all(losses[name] > 0 for name in ("loss_reconstruction", "loss_distillation", "loss_contrast"))
    loss = theirs(batch)
    assert loss.item() == pytest.approx(losses["loss"].item(), rel=1e-6)
    losses["loss"].backward()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad.to_dense() for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    # Some gradients are 0 but for rounding (a bias before batch norm), so the largest one gives the scale.
    largest = max(gradient.abs().max().item() for name, gradient in expected.items() if not name.startswith("template"))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.full
def test_report_names_every_measure(tmp_path: Path) -> None:
    axes = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in (20, 22, 18)), indexing="ij")
    x, y, z = axes
    brain = np.where(x**2 + y**2 + z**2 < 1, 0.5 + 0.3 * x + 0.1 * y * z, 0).astype(np.float32)
    grid = (24, 26, 22)
    brain = centred(brain, grid)
    measured = step.measure(tmp_path, brain, PreprocessSpec(name="bench", grid=grid), NETWORK, 16, rounds=1, matrix=64)
    text = step.report(measured)
    for words in ("GFLOP forward a case", "floor", "forward | backward | optimiser", "peak memory", step.REFERENCE):
        assert words in text
    assert "(met)" in text
    assert all(lap.wall > 0 and set(lap.parts) == set(step.PARTS) for laps in measured.laps.values() for lap in laps)
    assert all(peak > 2**20 for peak in measured.peaks.values())
    assert step.targets(measured)[0].what == "step: ours / floor"


def test_operations_are_those_of_the_method() -> None:
    # The 1^3 convolutions of one block alone give 2 x 48^3 x (2 x 64^2 + 2 x 64 x 256) operations.
    assert 130e9 < step.forward_operations(NetworkConfig(), 96) < 145e9


def test_the_first_lap_is_not_counted_and_the_rate_is_that_of_the_products() -> None:
    laps = {step.OURS: [step.Lap(dict.fromkeys(step.PARTS, seconds), 4.0, 1.0) for seconds in (9.0, 1.0)]}
    measured = step.Measured(laps, {step.OURS: Rounds((2.0,), (2.0,))}, {step.OURS: 2**30}, 10**9)
    assert measured.rounds(step.OURS) == Rounds((4.0,), (4.0,))
    assert measured.rate == 1.5e9
