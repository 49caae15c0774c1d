"""Preparing a training: what may change when it is continued, targets of probes, rows of tables."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from training_phantoms import small_config

from models.config import TrainingConfig
from models.records import SelectedCase
from tasks.pretraining import (
    TrainingExistsError,
    data_wait_share,
    metrics_rows,
    prepare_training,
    probe_rows,
    with_targets,
)

CASES = [
    SelectedCase(dataset="d", row=row, case=f"c{row}", subject=f"s{row}", digest=str(row), role="train")
    for row in range(4)
]


def config(folder: Path, **changes: object) -> TrainingConfig:
    return small_config(folder, "store.zarr", **changes)


def test_loader_processes_and_running_options_may_change_and_reach_the_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    first = config(folder)
    prepare_training(folder, first, CASES)
    other = first.replace(
        data=first.data.replace(workers=3), running={"tensorboard": True, "stage_dir": "/fast", "probe_every": 5}
    )
    assert prepare_training(folder, other, CASES).config == other
    written = json.loads((folder / "run.json").read_text())
    assert (written["data"]["workers"], written["running"]["stage_dir"]) == (3, "/fast")
    assert other.content_digest() == first.content_digest()
    with pytest.raises(TrainingExistsError, match="'a' exists with another config: epochs: 4 -> 5; choose another"):
        prepare_training(folder, other.replace(epochs=5), CASES)
    assert json.loads((folder / "run.json").read_text()) == written, "a refusal changes nothing"


def test_another_number_of_ranks_continues_with_the_cases_of_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    first = config(folder, world_size=4)
    assert prepare_training(folder, first, CASES).ranks == 4
    again = prepare_training(folder, first.replace(world_size=2, running={"tensorboard": True}), CASES)
    assert (again.ranks, again.config.world_size, again.config.running.tensorboard) == (2, 4, True)
    assert again.config.content_digest() == first.content_digest()
    written = (folder / "run.json").read_bytes()
    assert TrainingConfig.model_validate_json(written) == again.config
    with pytest.raises(ValueError, match=r"8 cases per optimiser step .* cannot be dealt to 3 ranks; use .* divides 4"):
        prepare_training(folder, first.replace(world_size=3, running={"tensorboard": False}), CASES)
    assert (folder / "run.json").read_bytes() == written, "a refusal changes nothing"


def test_a_config_from_before_there_were_running_options_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    first = config(folder)
    prepare_training(folder, first, CASES)
    old = {key: value for key, value in first.model_dump(mode="json").items() if key != "running"}
    (folder / "run.json").write_text(json.dumps(old))
    assert prepare_training(folder, first, CASES).config == first


def test_targets_come_from_a_phenotype_and_are_empty_where_it_is_unknown() -> None:
    people = pd.DataFrame(
        {
            "dataset": "d",
            "case": ["c0", "c1", "c2"],
            "age": [41.0, float("nan"), 63.5],
            "diagnosis": ["control", "", None],
        }
    )
    assert [case.target for case in with_targets(CASES, people, "age")] == ["41", "", "63.5", ""]
    assert [case.target for case in with_targets(CASES, people, "diagnosis")] == ["control", "", "", ""]
    with pytest.raises(ValueError, match="probe_target 'sex' is no column of the phenotypes; known: dataset, case"):
        with_targets(CASES, people, "sex")


def test_waiting_is_a_share_of_the_logged_steps() -> None:
    steps = [{"kind": "train", "seconds": 2.0, "data_wait_seconds": w} for w in (0.5, 0.1)]
    assert data_wait_share([*steps, {"kind": "val"}]) == pytest.approx(0.15)
    assert data_wait_share([]) is None


def test_tables_have_a_row_per_validation_and_per_probe_with_its_warning() -> None:
    metrics = {"probe_knn": 0.51239, "probe_linear": 0.6, "probe_chance": 0.5}
    lines = [
        {"kind": "val", "step": 4, "epoch": 0, "metrics": {"feature_rank": 1.23456}, "warning": "collapsed"},
        {"kind": "probe", "step": 4, "epoch": 0, "measure": "R2", "n_train": 8, "n_val": 3, "metrics": metrics},
    ]
    assert metrics_rows(lines) == [{"step": 4, "epoch": 0, "feature_rank": 1.2346, "warning": "collapsed"}]
    expected = {"step": 4, "epoch": 0, "measure": "R2", "knn": 0.5124, "linear": 0.6, "chance": 0.5}
    assert probe_rows(lines) == [{**expected, "n_train": 8, "n_val": 3}]
