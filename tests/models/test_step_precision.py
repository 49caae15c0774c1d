"""The optimiser step's fp16 scaler and its one synchronisation a step, on the CPU with torch's own CPU scaler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training_phantoms import make_training, write_blobs

from models.checkpoint import list_checkpoints, load_checkpoint
from models.distributed import World, sparse_parameters
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


def test_the_scale_survives_a_resume(blobs: Blobs, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    state = start(blobs, folder, scale=2.0**10)
    for _ in range(3):
        step(state)
    save_state(state)
    saved = load_checkpoint(list_checkpoints(folder)[0])["scaler"]
    fresh = torch.amp.GradScaler("cpu", growth_interval=2)
    fresh.load_state_dict(saved)
    assert fresh.get_scale() == state.scaler.get_scale() == 2.0**11
    assert saved["_growth_tracker"] == 1


@pytest.fixture
def lone_group(tmp_path: Path) -> Iterator[None]:
    """Give DDP a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_are_synchronised_once_a_step(
    blobs: Blobs, tmp_path: Path, accumulation: int, lone_group: None
) -> None:
    plain = start(blobs, tmp_path / "a", accumulation=accumulation)
    state = start(blobs, tmp_path / "b", accumulation=accumulation)
    ignored = sparse_parameters(state.objective)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(state.objective, ignored)
    ddp = DistributedDataParallel(state.objective)
    sent: list[bool] = []

    def count(_, bucket):  # DDP compares annotations by identity; ours are text
        sent.append(bucket.is_last())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, count)
    state.model = ddp
    for number in (1, 2):
        step(state)
        step(plain)
        assert sum(sent) == number, "one whole reduction a step, whatever the number of micro-batches"
    torch.testing.assert_close(weights(state), weights(plain), rtol=1e-5, atol=1e-7)
