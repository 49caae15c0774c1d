"""Which precision a training step has on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from models import trainer
from models.distributed import World


@pytest.mark.parametrize(
    ("precision", "amx", "expected"),
    [
        ("fp32", True, torch.float32),
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float32),
        ("fp16", True, torch.float32),
    ],
)
def test_bf16_on_the_cpu_only_where_it_multiplies_bf16(
    precision: str, amx: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    state = SimpleNamespace(world=World(0, 1, torch.device("cpu")), config=SimpleNamespace(precision=precision))
    with trainer._autocast(state):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype is expected
