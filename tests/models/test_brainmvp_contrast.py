"""InfoNCE: known values, false negatives, collapse; two ranks against one process are in test_two_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def test_subjects_of_one_person_have_one_identity() -> None:
    one, other = identity_of("brats", "7", "brats/7"), identity_of("ucsf-pdgm", "12", "brats/7")
    assert one == other != identity_of("brats", "7")


def test_collapse_is_visible() -> None:
    collapsed = F.normalize(torch.ones(8, 16), dim=1)
    spread = torch.eye(8, 16)
    assert collapse_metrics(collapsed, collapsed)["embedding_rank"] == pytest.approx(1.0, abs=1e-3)
    assert collapse_metrics(collapsed, collapsed)["embedding_uniformity"] == pytest.approx(0.0, abs=1e-4)
    assert collapse_metrics(spread, spread)["embedding_rank"] == pytest.approx(8.0, abs=1e-3)
    assert collapse_metrics(spread, spread)["embedding_uniformity"] == pytest.approx(-4.0, abs=1e-3)
    assert collapse_metrics(spread, -spread)["embedding_alignment"] == pytest.approx(4.0)
