"""InfoNCE: known values, false negatives, and two ranks against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from objective_cases import RECOMMENDED, SPEC, make_batch, make_case, make_config, make_means
from torch import multiprocessing as mp

from models.config import UNet3DConfig
from models.distributed import World, average_sparse_gradients, wrap
from models.objectives.base import Batch, Clock
from models.objectives.brainmvp import BrainMVP
from models.objectives.contrast import collapse_metrics, identity_of, info_nce

DIFFERENT = torch.arange(3)


def test_values_for_three_pairs_at_temperature_one() -> None:
    same = F.normalize(torch.ones(3, 4), dim=1)
    assert info_nce(same, same, DIFFERENT, 1.0).item() == pytest.approx(1.0986, abs=1e-4)  # ln 3: nothing told apart
    orthogonal = torch.eye(3)
    assert info_nce(orthogonal, orthogonal, DIFFERENT, 1.0).item() == pytest.approx(0.5514, abs=1e-4)
    simplex = F.normalize(torch.eye(3) - 1 / 3, dim=1)
    assert info_nce(simplex, simplex, DIFFERENT, 1.0).item() == pytest.approx(0.3690, abs=1e-4)


def test_both_directions_count() -> None:
    one, two = F.normalize(torch.randn(4, 6), dim=1), F.normalize(torch.randn(4, 6), dim=1)
    target, logits = torch.arange(4), one @ two.T / 0.1
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert torch.allclose(info_nce(one, two, target, 0.1), expected, atol=1e-5)


def test_images_of_one_subject_are_no_negatives() -> None:
    one, two = F.normalize(torch.randn(3, 6), dim=1), F.normalize(torch.randn(3, 6), dim=1)
    loss = info_nce(one, two, torch.tensor([7, 7, 9]), 0.1)
    logits = one @ two.T / 0.1
    logits[0, 1] = logits[1, 0] = -torch.inf
    expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    assert torch.allclose(loss, expected, atol=1e-5)


def test_a_single_case_has_no_loss() -> None:
    one = F.normalize(torch.randn(1, 6), dim=1)
    assert info_nce(one, -one, torch.zeros(1), 0.1) == 0


def test_similarities_keep_their_precision_under_autocast() -> None:
    torch.manual_seed(0)
    one = F.normalize(torch.randn(1, 64) + 0.1 * torch.randn(8, 64), dim=1)
    two = F.normalize(one + 0.02 * torch.randn(8, 64), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (one @ two.T).dtype == torch.bfloat16
        low = info_nce(one, two, torch.arange(8), 0.1)
    assert torch.equal(low, info_nce(one, two, torch.arange(8), 0.1))


def test_identity_is_of_dataset_and_subject() -> None:
    assert identity_of("ixi", "1") == identity_of("ixi", "1")
    assert len({identity_of("ixi", "1"), identity_of("ixi", "2"), identity_of("brats", "1")}) == 3
    assert 0 <= identity_of("ixi", "1") < 2**63


def test_collapse_is_visible() -> None:
    collapsed = F.normalize(torch.ones(8, 16), dim=1)
    spread = torch.eye(8, 16)
    assert collapse_metrics(collapsed, collapsed)["embedding_rank"] == pytest.approx(1.0, abs=1e-3)
    assert collapse_metrics(collapsed, collapsed)["embedding_uniformity"] == pytest.approx(0.0, abs=1e-4)
    assert collapse_metrics(spread, spread)["embedding_rank"] == pytest.approx(8.0, abs=1e-3)
    assert collapse_metrics(spread, spread)["embedding_uniformity"] == pytest.approx(-4.0, abs=1e-3)
    assert collapse_metrics(spread, -spread)["embedding_alignment"] == pytest.approx(4.0)


# --- two ranks against one process


def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 6, 10, generator=generator)
    return images, torch.randn(10, 5, generator=generator), torch.tensor([0, 1, 2, 3, 0, 5])


def _objective() -> tuple[BrainMVP, Batch]:
    """UNET3D, whose norms do not mix cases; one case has one modality, two cases are of one subject."""
    torch.manual_seed(0)
    network = UNet3DConfig(widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), groups=2)
    settings = RECOMMENDED.replace(weight_contrast=1.0, modality_heads=True, template_gain=True, decoder_skips=True)
    config = make_config(settings, network, crop=(16, 16, 16), batch_size=2).replace(world_size=2)
    objective = BrainMVP(config, SPEC, make_means())
    batch = make_batch(objective.sampler(), [make_case(0), make_case(1, present=("t1",)), make_case(2), make_case(0)])
    return objective, batch


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
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
    objective, batch = _objective()
    model = wrap(objective, World(rank, 2, torch.device("cpu")))
    model({name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}, Clock(0, 0))["loss"].backward()
    average_sparse_gradients(objective, World(rank, 2, torch.device("cpu")))
    if rank == 0:
        whole = {name: parameter.grad.to_dense() for name, parameter in objective.named_parameters()}
        torch.save({"loss": loss.detach(), "gradient": weight.grad, "objective": whole}, Path(folder) / "result.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found, each with its half of the batch."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return torch.load(folder / "result.pt", weights_only=True)


def test_two_ranks_equal_one_process_with_the_whole_batch(two_ranks: dict[str, Any]) -> None:
    images, weight, identity = _data()
    weight.requires_grad_()
    one, two = (F.normalize(view @ weight, dim=1) for view in images)
    loss = info_nce(one, two, identity, 0.5)
    loss.backward()
    assert torch.allclose(two_ranks["loss"], loss, atol=1e-6)
    assert torch.allclose(two_ranks["gradient"], weight.grad, atol=1e-6)


def test_gradients_of_all_losses_do_not_depend_on_the_ranks(two_ranks: dict[str, Any]) -> None:
    objective, batch = _objective()
    objective(batch, Clock(0, 0))["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        error = (two_ranks["objective"][name] - parameter.grad.to_dense()).norm()
        assert error <= 1e-4 * parameter.grad.to_dense().norm(), name
