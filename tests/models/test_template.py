"""Template windows and their exact, compact gradient against dense autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.records import MODALITIES
from models.template import EPSILON, TemplateBank, cut

GRID = (10, 12, 9)
SIZE = (6, 6, 6)


def _bank(sparse: bool = False, dtype: torch.dtype = torch.float64) -> TemplateBank:
    bank = TemplateBank(GRID, sparse).to(dtype)
    with torch.no_grad():
        bank.bank.copy_(torch.rand(bank.bank.shape, dtype=dtype, generator=torch.Generator().manual_seed(3)))
    return bank


def _dense(bank: torch.Tensor, modality: list[int], start: list[list[int]]) -> torch.Tensor:
    """The formula, with torch's own gradient; ties go to the first voxel."""
    windows = []
    for m, corner in zip(modality, start, strict=True):
        low, high = bank[m].flatten().min(0).values, bank[m].flatten().max(0).values
        normalised = (bank[m] - low) / (high - low + EPSILON)
        padded = torch.nn.functional.pad(normalised, (8,) * 6)
        x, y, z = (c + 8 for c in corner)
        windows.append(padded[x : x + SIZE[0], y : y + SIZE[1], z : z + SIZE[2]])
    return torch.stack(windows)


CASES = {
    "inside": ([2], [[1, 2, 3]]),
    "over every edge": ([0, 7], [[-3, 8, 4], [6, -2, -1]]),
    "one modality twice, overlapping": ([4, 4, 1], [[0, 0, 0], [2, 3, 1], [4, 4, 3]]),
    "partly beside the bank": ([3, 5], [[50, 0, 0], [2, 2, 2]]),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_dense_autograd(case: str, sparse: bool) -> None:
    modality, start = CASES[case]
    bank = _bank(sparse)
    weight = torch.randn(len(modality), *SIZE, dtype=torch.float64)
    windows = bank(torch.tensor(modality), torch.tensor(start), SIZE)
    (windows * weight).sum().backward()
    reference = bank.bank.detach().clone().requires_grad_()
    inside = [i for i, corner in enumerate(start) if max(corner) < 12]
    expected = _dense(reference, [modality[i] for i in inside], [start[i] for i in inside])
    (expected * weight[inside]).sum().backward()
    assert torch.allclose(windows[inside], expected)
    gradient = bank.bank.grad
    assert gradient is not None
    assert gradient.is_sparse == sparse
    assert torch.allclose(gradient.to_dense() if sparse else gradient, reference.grad, atol=1e-12)


def test_gradient_with_ties_goes_to_the_window_and_two_voxels_only() -> None:
    bank = TemplateBank(GRID)
    bank.start_from(np.zeros((len(MODALITIES), *GRID), dtype=np.float32))
    bank(torch.tensor([1]), torch.tensor([[2, 2, 2]]), SIZE).sum().backward()
    assert bank.bank.grad is not None
    touched = bank.bank.grad.nonzero()
    assert set(touched[:, 0].tolist()) == {1}
    assert len(touched) <= 6**3 + 2


def test_sparse_gradient_holds_only_window_and_extremes() -> None:
    bank = _bank(sparse=True)
    bank(torch.tensor([6, 6]), torch.tensor([[0, 0, 0], [1, 1, 1]]), SIZE).sum().backward()
    assert bank.bank.grad is not None
    assert bank.bank.grad._nnz() == 2 * (6**2 + 2)


def test_sgd_with_the_sparse_gradient_equals_dense_sgd() -> None:
    banks = [_bank(sparse) for sparse in (False, True)]
    for bank in banks:
        optimiser = torch.optim.SGD(bank.parameters(), lr=0.1)
        for step in range(3):
            optimiser.zero_grad()
            bank(torch.tensor([step, 2]), torch.tensor([[step, 0, 1], [1, 2, -2]]), SIZE).square().sum().backward()
            optimiser.step()
    assert torch.allclose(banks[0].bank, banks[1].bank, atol=1e-12)


def test_window_follows_its_start_and_is_zero_outside() -> None:
    bank = _bank()
    whole = bank.normalised()
    window = bank(torch.tensor([3]), torch.tensor([[-2, 9, 5]]), SIZE)[0]
    assert torch.allclose(window[2:, :3, :4], whole[3, :4, 9:12, 5:9])
    assert window[:2].abs().sum() == window[:, 3:].abs().sum() == window[:, :, 4:].abs().sum() == 0


def test_cut_is_zero_outside_the_image() -> None:
    image = torch.arange(8.0).reshape(2, 2, 2) + 1
    assert torch.equal(cut(image, (-1, 0, 0), (2, 1, 1)).flatten(), torch.tensor([0.0, 1.0]))
    assert cut(image, (5, 0, 0), (2, 2, 2)).sum() == 0


def test_unknown_index_and_wrong_shape_are_refused() -> None:
    bank = TemplateBank(GRID)
    with pytest.raises(IndexError, match=r"template index must be in 0\.\.7 \(flair, .*got 8"):
        bank(torch.tensor([8]), torch.zeros(1, 3, dtype=torch.long), SIZE)
    with pytest.raises(ValueError, match=r"templates must have shape \(8, 10, 12, 9\)"):
        bank.start_from(np.zeros((8, 1, 1, 1), dtype=np.float32))
