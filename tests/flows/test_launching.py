"""Where the ranks of a training run: what parameters and settings say together, and what is shown before."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from flows.launching import launch_preview, launch_settings, launcher
from flows.node_runs import launch_in_pool
from flows.pretrain import dry_run
from flows.pretrain_params import PretrainParams
from tasks.launch import launch
from tasks.launch_slurm import launch_slurm


def test_parameters_come_before_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher(launch_settings(None, None)) is launch
    monkeypatch.setenv("BRAINLOOM_LAUNCH", "pool")
    monkeypatch.setenv("BRAINLOOM_NODES", "2")
    pool = launcher(launch_settings(None, None))
    assert isinstance(pool, partial)
    assert (pool.func, pool.keywords) == (launch_in_pool, {"nodes": 2})
    monkeypatch.setenv("BRAINLOOM_SLURM_TIME", "01:00:00")
    slurm = launcher(launch_settings("slurm", 4))
    assert isinstance(slurm, partial)
    assert (slurm.func, slurm.keywords["settings"].nodes) == (launch_slurm, 4)
    with pytest.raises(ValueError, match="2 nodes need launch 'pool' or 'slurm', got 'local'"):
        launch_settings("local", None)


def test_a_preview_shows_a_command_per_node(tmp_path: Path) -> None:
    lines = launch_preview(launch_settings("pool", 2), tmp_path / "a", 4, 1).splitlines()
    assert [line[:7] for line in lines] == ["node 0:", "node 1:"]
    assert all("--nnodes 2" in line and "--nproc-per-node 2" in line for line in lines)
    assert "--standalone" in launch_preview(launch_settings(None, None), tmp_path / "a", 2, 1)


def test_a_dry_run_of_slurm_prints_its_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLOOM_SLURM_TIME", "01:00:00")
    workspace = tmp_path / "ws"
    params = PretrainParams(workspace=str(workspace), recipe="brainmvp", launch="slurm", nodes=2, name="big")
    script = dry_run(params)
    assert f"#SBATCH --output={workspace}/trainings/big/train.log" in script
    assert "--nnodes 2 --nproc-per-node 4" in script
    assert not workspace.exists()
