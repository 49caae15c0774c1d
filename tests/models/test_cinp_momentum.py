"""Momentum encoders of CINP: candidates and soft targets by the formula, the queue, resume, and two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cinp_cases import make_cinp_training, random_batch, small_config, small_objective
from connectome_stores import SPEC, Made, write_store
from training_processes import done

from models.distributed import World
from models.finished import read_training
from models.objectives import build_objective
from models.objectives.base import Batch, Clock
from models.objectives.cinp import CINP
from models.objectives.matching import encode_both
from models.trainer import train

WORLD = World(0, 1, torch.device("cpu"))
ON: dict[str, Any] = {"momentum": 0.9, "queue": 12, "batch_size": 6}
STEPS = 3


def momentum_objective(**changes: Any) -> CINP:
    made = small_objective(**{**ON, **changes})
    assert made.slow is not None
    made.slow.become(made)  # small_objective changed the weights after they were copied
    return made


def slow_steps(share: float) -> list[float]:
    """INC of some batches by plain loops: averages by hand, a list as queue, the rise of the soft targets."""
    made = momentum_objective(soft_targets=share)
    averages = {name: value.clone() for name, value in made.slow.named_parameters()}
    remembered: list[tuple[int, np.ndarray, np.ndarray]] = []
    found = []
    for step in range(STEPS):
        batch = random_batch(step)
        _move(made, step)
        for name, value in averages.items():
            averages[name] = 0.9 * value + 0.1 * made.get_parameter(name).detach()
        with torch.no_grad():
            for name, value in made.slow.named_parameters():
                value.copy_(averages[name])
            mine, slow = (encode_both(part, batch).embeddings.numpy().astype(float) for part in (made, made.slow))
        new = [(int(batch["identity"][i]), *slow[:, i]) for i in range(6) if batch["paired"][i]]
        found.append(_loss(mine, slow, batch, [*new, *remembered], share * min(1, step * 6 / 12)))
        # Twelve places are the cases of two batches; those without a connectome take one each, and are nobody.
        remembered = (new + remembered)[:10]
    return found


def _loss(mine: np.ndarray, slow: np.ndarray, batch: Batch, others: list, share: float) -> float:
    losses = []
    for anchor, candidate in ((0, 1), (1, 0)):
        for i in range(6):
            if not batch["paired"][i]:
                continue
            seen = [slow[candidate, i], *(o[1 + candidate] for o in others if o[0] != int(batch["identity"][i]))]
            logits = np.array([mine[anchor, i] @ vector / 0.07 for vector in seen])
            teacher = np.exp([slow[anchor, i] @ vector / 0.07 for vector in seen])
            target = share * teacher / teacher.sum()
            target[0] += 1 - share
            log_shares = logits - math.log(np.exp(logits).sum())
            losses.append(-float(target @ log_shares))
    return sum(losses) / len(losses)


def _move(made: CINP, step: int) -> None:
    """Change the trained weights as an optimiser would."""
    torch.manual_seed(step)
    with torch.no_grad():
        for part in (made.encoder, made.network_encoder, made.image_projection, made.network_projection):
            for value in part.parameters():
                value.add_(0.05 * torch.randn_like(value))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_contrast_equals_plain_loops_over_several_steps(share: float) -> None:
    made, found = momentum_objective(soft_targets=share), []
    made.cases = 12
    for step in range(STEPS):
        _move(made, step)
        found.append(made(random_batch(step), Clock(step, 0))["loss_contrast"].item())
        if not step:  # a second micro-batch of a step does not move the averages again
            made.slow.place.zero_()
            made(random_batch(step), Clock(step, 0))
    assert found == pytest.approx(slow_steps(share), rel=1e-4)


def test_no_gradient_reaches_the_slow_copies_and_all_others_get_one() -> None:
    made = momentum_objective()
    made(random_batch(0), Clock(0, 0))["loss"].backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is None) == name.startswith("slow."), name
    groups = made.parameter_groups(small_config().optimiser)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in made.parameters())


def test_validation_leaves_queue_and_averages_alone() -> None:
    made = momentum_objective()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.eval().validate(random_batch(0), Clock(5, 0))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_single_pair_is_contrasted_with_the_queue() -> None:
    made, batch = momentum_objective(), random_batch(0)
    lonely = {**batch, "paired": torch.tensor([0, 0, 1, 0, 0, 0])}
    assert made(lonely, Clock(0, 0))["loss_contrast"] == 0
    made(random_batch(1), Clock(1, 0))
    assert made(lonely, Clock(2, 0))["loss_contrast"] > 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list]:
    url = str(tmp_path_factory.mktemp("momentum") / "pairs.zarr")
    return url, write_store(url, [Made(f"sub-{number}") for number in range(6)])


def test_a_killed_training_ends_with_the_same_bits_and_exports_no_slow_copies(store: Any, tmp_path: Path) -> None:
    values = {"momentum": 0.9, "queue": 8, "epochs": 4, "batch_size": 2, "accumulation": 2}
    for name in ("whole", "killed"):
        config, calls = make_cinp_training(tmp_path / name, *store, **values), iter(range(100))

        def stop(name: str = name, calls: Any = calls) -> bool:
            if name == "killed" and next(calls) == 3:
                raise KeyboardInterrupt
            return False

        try:
            train(config, tmp_path / name, WORLD, stop)
        except KeyboardInterrupt:
            train(config, tmp_path / name, WORLD)
    assert done(tmp_path / "killed")["weights_digest"] == done(tmp_path / "whole")["weights_digest"]
    tensors = read_training(tmp_path / "whole").tensors
    assert not any(name.startswith("slow.") for name in tensors)
    made = small_objective(momentum=0.9)
    made.load_pretrained(tensors)
    assert torch.equal(made.slow.get_parameter("encoder.norm.weight"), tensors["encoder.norm.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 0.9, "weight_contrast": 0}, "momentum is of the contrast, and weight_contrast is 0"),
        ({"queue": 8}, "it needs momentum above 0 and gather_negatives"),
        ({"queue": 8, "momentum": 0.9, "gather_negatives": False}, "the same on all ranks: it needs momentum"),
        ({"queue": 10, "momentum": 0.9}, "a multiple of the 4 cases of an optimiser step, got 10; use 12"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(small_config(**changes), SPEC)
