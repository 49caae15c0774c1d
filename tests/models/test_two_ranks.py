"""Two ranks over gloo: the losses of one process, one reduction a step, equal weights, batch norm, one case."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from objective_cases import RECOMMENDED, SPEC, make_batch, make_case, make_config, make_means
from torch import multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training_phantoms import make_training, write_blobs

from models.config import CropContrastConfig, MaskedCropsConfig, TrainingConfig, UNet3DConfig
from models.data import make_loader
from models.distributed import World, average_sparse_gradients, broadcast_buffers, wrap
from models.objectives import build_objective
from models.objectives.base import Batch, Clock, Objective
from models.objectives.contrast import info_nce
from models.sampler import StreamBatches
from models.state import TrainingState, save_state, start_training
from models.trainer import train_step

ACCUMULATION = 3
STEPS = 2
ON_CROPS = {
    "brainmvp": RECOMMENDED.replace(weight_contrast=1.0, modality_heads=True, template_gain=True, decoder_skips=True),
    "mae": MaskedCropsConfig(mask_block=8),
    "simclr_crops": CropContrastConfig(head_dim=8, temperature=0.5),
}


def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 6, 10, generator=generator)
    return images, torch.randn(10, 5, generator=generator), torch.tensor([0, 1, 2, 3, 0, 5])


def _objective(kind: str) -> tuple[Objective, Batch]:
    """UNET3D, whose norms do not mix cases; one case has one modality, two cases are of one subject."""
    torch.manual_seed(0)
    network = UNet3DConfig(widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), groups=2)
    config = make_config(ON_CROPS[kind], network, crop=(16, 16, 16), batch_size=2).replace(world_size=2)
    objective = build_objective(config, SPEC, make_means())
    batch = make_batch(objective.sampler(), [make_case(0), make_case(1, present=("t1",)), make_case(2), make_case(0)])
    return objective, batch


def _losses_of_half(rank: int, world: World) -> dict[str, Any]:
    """Loss and gradient of the contrast, and gradients of all losses, from this rank's half of a batch."""
    images, weight, identity = _data()
    weight.requires_grad_()
    mine = slice(3 * rank, 3 * rank + 3)
    one, two = (F.normalize(view[mine] @ weight, dim=1) for view in images)
    loss = info_nce(one, two, identity[mine], 0.5, across_ranks=True)
    loss.backward()
    assert weight.grad is not None
    for value in (loss.detach(), weight.grad):  # the means over ranks that the loop logs and DDP takes
        dist.all_reduce(value)
        value /= 2
    gradients = {kind: _gradients_of_half(kind, rank, world) for kind in ON_CROPS}
    return {"loss": loss.detach(), "gradient": weight.grad, "objectives": gradients}


def _gradients_of_half(kind: str, rank: int, world: World) -> dict[str, torch.Tensor]:
    objective, batch = _objective(kind)
    model = wrap(objective, world)
    model({name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}, Clock(0, 0))["loss"].backward()
    average_sparse_gradients(objective, world)
    return {name: parameter.grad.to_dense() for name, parameter in objective.named_parameters()}


def _weights(state: TrainingState) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.objective.parameters()])


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name}


def _micro_batches(state: TrainingState) -> Any:
    """The micro-batches of the first step of this rank."""
    dataset, world = state.dataset("train"), state.world
    stream = StreamBatches(len(dataset), 2, world.size, world.rank, state.config.seed, 0, state.plan.accumulation)
    return make_loader(dataset, stream, 0)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), rank, 2)
    found = _losses_of_half(rank, world)
    state = _start(Path(folder), "many", world)
    alone = copy.deepcopy(state.objective)
    calls: list[bool] = []

    def counted(group, bucket):  # DDP compares annotations by identity; ours are text
        calls.append(bucket.is_last())
        return allreduce_hook(group, bucket)

    state.model.register_comm_hook(None, counted)  # type: ignore[operator]
    found["reductions"] = []
    for number in range(STEPS):
        train_step(state, lambda: False)
        if number == 0:
            for batch in _micro_batches(state):
                alone(batch, state.clock())
            found["statistics"], found["alone"] = _buffers(state.objective), _buffers(alone)
        found["reductions"].append(sum(calls))
    found["weights"] = _weights(state)
    save_state(state)
    resumed = _start(Path(folder), "many", world)
    found["resumed at"] = resumed.step
    for one in (state, resumed):
        train_step(one, lambda: False)
    found["went on"], found["resumed"] = _weights(state), _weights(resumed)
    broadcast_buffers(state.objective, world)
    found["given"] = _buffers(state.objective)
    state.close()
    state = _start(Path(folder), "one", world)
    found["losses of one case"] = train_step(state, lambda: False).losses
    found["weights of one case"] = _weights(state)
    state.close()
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.destroy_process_group()


def _start(folder: Path, name: str, world: World) -> TrainingState:
    config = TrainingConfig.model_validate_json((folder / name / "run.json").read_text())
    return start_training(config, folder / name, world)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    url = str(folder / "blobs.zarr")
    cases = write_blobs(url)
    make_training(folder / "many", url, cases, world_size=2, accumulation=ACCUMULATION, epochs=2 * (STEPS + 1))
    make_training(folder / "one", url, cases[:1], world_size=2)
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_equal_one_process_with_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    images, weight, identity = _data()
    weight.requires_grad_()
    one, two = (F.normalize(view @ weight, dim=1) for view in images)
    loss = info_nce(one, two, identity, 0.5)
    loss.backward()
    assert torch.allclose(ranks[0]["loss"], loss, atol=1e-6)
    assert torch.allclose(ranks[0]["gradient"], weight.grad, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(ON_CROPS))
def test_gradients_of_all_losses_do_not_depend_on_the_ranks(ranks: list[dict[str, Any]], kind: str) -> None:
    objective, batch = _objective(kind)
    objective(batch, Clock(0, 0))["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        error = (ranks[0]["objectives"][kind][name] - parameter.grad.to_dense()).norm()
        assert error <= 1e-4 * parameter.grad.to_dense().norm(), name


def test_gradients_are_reduced_once_a_step_whatever_the_number_of_micro_batches(ranks: list[dict[str, Any]]) -> None:
    """The reference reduces at every micro-batch."""
    assert [found["reductions"] for found in ranks] == [[1, 2], [1, 2]]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


def test_both_ranks_resume_with_equal_weights_and_those_of_a_training_that_went_on(
    ranks: list[dict[str, Any]],
) -> None:
    """The reference resumes rank 0 alone."""
    for found in ranks:
        assert found["resumed at"] == STEPS
        assert torch.equal(found["resumed"], found["went on"])
    assert torch.equal(ranks[0]["resumed"], ranks[1]["resumed"])


def test_batch_norm_has_the_statistics_of_each_rank_and_in_the_end_those_of_the_first(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = ranks
    assert len(first["statistics"]) == 2 * len({name.rsplit(".", 1)[0] for name in first["statistics"]}) > 0
    for name, value in first["statistics"].items():
        torch.testing.assert_close(value, first["alone"][name], msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(first["given"][name], second["given"][name])
    assert any(not torch.equal(value, second["statistics"][name]) for name, value in first["statistics"].items())


def test_two_ranks_with_one_case_train_and_have_no_contrast(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["losses of one case"]["loss_contrast"] == 0
        assert found["losses of one case"]["loss_reconstruction"] > 0
    assert torch.equal(ranks[0]["weights of one case"], ranks[1]["weights of one case"])
