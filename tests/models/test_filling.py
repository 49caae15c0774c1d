"""Learned templates as images: the right modality, scaled as in pre-training, at the right place, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objective_cases import GRID, SPEC

from models.filling import Templates, check_geometry, templates_of
from models.records import MODALITIES
from models.template import TemplateBank

SIZE = (8, 8, 8)


@pytest.fixture
def bank() -> TemplateBank:
    """A bank whose images are all different, with values far from [0, 1]."""
    torch.manual_seed(0)
    templates = TemplateBank(GRID)
    templates.start_from(np.stack([3 * m + 7 * torch.rand(GRID).numpy() for m in range(len(MODALITIES))]))
    return templates


def of(bank: TemplateBank, *modalities: str) -> Templates:
    return templates_of({f"template.{name}": value for name, value in bank.state_dict().items()}, modalities, GRID, "p")


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_window_is_what_pre_training_sees_of_that_modality(bank: TemplateBank, modality: str) -> None:
    start = (5, 30, 12)
    seen = bank(torch.tensor([MODALITIES.index(modality)]), torch.tensor([start]), SIZE)[0].detach().numpy()
    found = of(bank, "t2", modality).window(1, start, SIZE)
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(found, seen, atol=5e-4)  # half precision


@pytest.mark.parametrize("start", [(-3, 40, 10), (36, -2, 30), (100, 0, 0), (-8, 0, 0)])
def test_outside_the_grid_a_template_is_zero(bank: TemplateBank, start: tuple[int, int, int]) -> None:
    seen = bank(torch.tensor([3]), torch.tensor([start]), SIZE)[0].detach().numpy()
    np.testing.assert_allclose(of(bank, "t2").window(0, start, SIZE), seen, atol=5e-4)


def test_templates_that_cannot_be_used_are_refused(bank: TemplateBank) -> None:
    with pytest.raises(ValueError, match=r"runs/x has no template bank \(template.bank\): it is no BrainMVP pre-train"):
        templates_of({"encoder.norm.weight": torch.ones(3)}, ("t1",), GRID, "runs/x")
    with pytest.raises(ValueError, match=r"has shape \(8, 40, 44, 36\), the store needs \(8, 40, 44, 40\)"):
        templates_of({"template.bank": bank.bank.detach()}, ("t1",), (40, 44, 40), "p")
    with pytest.raises(ValueError, match="modality 'bold' has no template; those that have: flair, t1,"):
        of(bank, "t1", "bold")
    with torch.no_grad():
        bank.bank[MODALITIES.index("pd")] = 0.5
    with pytest.raises(ValueError, match=r"never learned a template of 'pd' \(its image is flat\)"):
        of(bank, "t1", "pd")


def test_templates_of_another_grid_are_refused() -> None:
    check_geometry(SPEC, SPEC.replace(percentiles=(1.0, 99.0)), "p")
    with pytest.raises(
        ValueError, match=r"templates of p lie on another grid: spacing_mm is 4.0, in the store 2.0; pre-t"
    ):
        check_geometry(SPEC, SPEC.replace(spacing_mm=2.0), "p")
