"""InfoNCE: known values, false negatives, and two ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing as mp

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


def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 6, 10, generator=generator)
    return images, torch.randn(10, 5, generator=generator), torch.tensor([0, 1, 2, 3, 0, 5])


def _rank(rank: int, folder: str) -> None:
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
    if rank == 0:
        torch.save({"loss": loss.detach(), "gradient": weight.grad}, Path(folder) / "result.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    images, weight, identity = _data()
    weight.requires_grad_()
    one, two = (F.normalize(view @ weight, dim=1) for view in images)
    loss = info_nce(one, two, identity, 0.5)
    loss.backward()
    assert torch.allclose(result["loss"], loss, atol=1e-6)
    assert torch.allclose(result["gradient"], weight.grad, atol=1e-6)
