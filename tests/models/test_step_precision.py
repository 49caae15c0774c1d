"""The optimiser step on a GPU, as far as a CPU can tell: fp16 with torch's CPU scaler, pinned batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_phantoms import make_training, write_blobs

from models.distributed import World, open_world
from models.objectives.brainmvp import BrainMVP
from models.records import SelectedCase
from models.state import TrainingState, save_state, start_training
from models.trainer import SMALLEST_SCALE, NotFiniteError, train_step

WORLD = World(0, 1, torch.device("cpu"))
Blobs = tuple[str, list[SelectedCase]]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    url = str(tmp_path_factory.mktemp("precision") / "blobs.zarr")
    return url, write_blobs(url)


def start(blobs: Blobs, folder: Path, scale: float | None = None, **changes: Any) -> TrainingState:
    """Return a started training, with a scaler of some first scale in place of the disabled one."""
    state = start_training(make_training(folder, *blobs, **changes), folder, WORLD)
    if scale is not None:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return state


def step(state: TrainingState) -> Any:
    return train_step(state, lambda: False)


def weights(state: TrainingState) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.objective.parameters()])


def with_gradient(monkeypatch: pytest.MonkeyPatch, bad_step: int, factor: float) -> None:
    """Multiply the gradients (not the loss) of one step by a factor."""
    forward = BrainMVP.forward

    def disturbed(self: BrainMVP, batch: dict[str, Any], clock: Any) -> dict[str, torch.Tensor]:
        losses = forward(self, batch, clock)
        if clock.step == bad_step:
            losses["loss"].register_hook(lambda gradient: gradient * factor)
        return losses

    monkeypatch.setattr(BrainMVP, "forward", disturbed)


def test_the_scale_leaves_updates_clipping_and_norm_as_they_are(blobs: Blobs, tmp_path: Path) -> None:
    plain, scaled = start(blobs, tmp_path / "a"), start(blobs, tmp_path / "b", scale=2.0**10)
    for _ in range(3):
        one, two = step(plain), step(scaled)
        assert two.losses == pytest.approx(one.losses, rel=1e-5)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4), "clipped after unscaling"
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-4, atol=1e-6)
    assert scaled.scaler.get_scale() == 2.0**11, "it grows after two good steps"


def test_an_overflow_skips_the_update_and_halves_the_scale(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(blobs, tmp_path / "a", scale=2.0**10)
    with_gradient(monkeypatch, bad_step=1, factor=float("inf"))
    step(state)
    before = weights(state)
    report = step(state)
    assert torch.equal(weights(state), before)
    assert state.scaler.get_scale() == 2.0**9
    assert report.grad_norm == 0.0, "metrics.jsonl takes finite numbers only"
    assert state.step == 2, "the schedule goes on"
    step(state)
    assert not torch.equal(weights(state), before)


def test_a_loss_that_is_not_finite_ends_the_training_with_a_scaler_too(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(blobs, tmp_path / "a", scale=2.0**10)
    forward = BrainMVP.forward
    monkeypatch.setattr(BrainMVP, "forward", lambda *args: {k: v * float("nan") for k, v in forward(*args).items()})
    with pytest.raises(NotFiniteError, match="not finite at step 0"):
        step(state)


def test_gradients_that_no_scale_makes_finite_end_the_training(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the scaler would skip every update to the end, and the metrics would look healthy."""
    state = start(blobs, tmp_path / "a", scale=2 * SMALLEST_SCALE)
    with_gradient(monkeypatch, bad_step=0, factor=float("nan"))
    assert step(state).grad_norm == 0.0
    with_gradient(monkeypatch, bad_step=1, factor=float("nan"))
    with pytest.raises(NotFiniteError, match=r"not finite at step 1 .* gradient norm nan"):
        step(state)


def test_the_scale_survives_a_resume(blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    state = start(blobs, folder, scale=2.0**10)
    for _ in range(3):
        step(state)
    save_state(state)
    monkeypatch.setattr("models.state._scaler", lambda *_: torch.amp.GradScaler("cpu", growth_interval=2))
    resumed = start_training(state.config, folder, WORLD)
    assert resumed.step == 3
    assert resumed.scaler.get_scale() == state.scaler.get_scale() == 2.0**11
    assert resumed.scaler.state_dict()["_growth_tracker"] == 1


def test_a_training_without_scaler_is_continued_with_one(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 begun on a CPU, where there is no scaling, and continued on a GPU."""
    folder = tmp_path / "a"
    state = start(blobs, folder)
    save_state(state)
    monkeypatch.setattr("models.state._scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=8.0))
    assert start_training(state.config, folder, WORLD).scaler.get_scale() == 8.0


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(ValueError, match=r"4 ranks are to run on this host, which has 2 GPUs, .*; set ranks to 2"),
        open_world(),
    ):
        pass


def test_batches_are_pinned_for_a_gpu(blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = start(blobs, tmp_path / "a")
    asked: list[bool] = []
    monkeypatch.setattr("models.state.make_loader", lambda *arguments: asked.append(arguments[3]) or [])
    for device in ("cpu", "cuda"):
        assert list(replace(state, world=World(0, 1, torch.device(device))).batches) == []
    assert asked == [False, True]
