"""Two real pre-trainings and a network from scratch, compared on two kinds of benchmarks; then all is found done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_workspaces import DIAGNOSIS, TUMOUR, write_workspace

from flows.benchmark import benchmark
from flows.benchmark_params import BenchmarkParams
from flows.pretrain import pretrain
from flows.pretrain_params import PretrainParams
from infra.server import ServerInfo
from tasks.benchmark_summary import ALL
from tasks.benchmarks import BENCHMARKS
from tasks.serving import RunError

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for benchmarks in (BENCHMARKS, ALL):
        for one in (TUMOUR, DIAGNOSIS):
            monkeypatch.setitem(benchmarks, one.name, one)


def asked(workspace: Path, **changes: Any) -> BenchmarkParams:
    runs = [{"training": "brainmvp_tiny", "name": "BrainMVP"}, {"training": "mae_unet_tiny", "name": "MAE, U-Net"}]
    values = {"workspace": str(workspace), "runs": runs, "benchmarks": [TUMOUR.name, DIAGNOSIS.name], "seeds": 1}
    return BenchmarkParams.model_validate({**values, "networks": ["dynunet"], "finetune_epochs": 1, **changes})


def test_runs_are_compared_once(tmp_path: Path, prefect_server: ServerInfo, registered: None) -> None:
    write_workspace(tmp_path)
    words = r"run 'BrainMVP': there is no training 'brainmvp_tiny' in .*; finished pre-trainings: none"
    with pytest.raises(RunError, match=words):
        benchmark(asked(tmp_path))
    for recipe in ("brainmvp_tiny", "mae_unet_tiny"):
        pretrain(PretrainParams(workspace=str(tmp_path), recipe=recipe, epochs=1))
    first = benchmark(asked(tmp_path))
    assert first["trained"] == 5 + 4
    text = Path(first["summary"]).read_text()
    rows = ["BrainMVP", "MAE, U-Net", "scratch", "scratch (unet3d)", "scratch (dynunet)", "majority"]
    assert [row for row in rows if f"\n| {row} | " not in text] == []
    assert "| scratch (dynunet) | 0." in text
    again = benchmark(asked(tmp_path))
    assert (again["trained"], again["scored"]) == (0, 0)
    assert Path(again["summary"]).read_text() == text
