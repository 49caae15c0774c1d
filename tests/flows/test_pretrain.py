"""The pre-training flow: frozen cases, refusal of another config, skip when done, artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from training_phantoms import write_blobs

from flows.pretrain import PretrainParams, prepare, pretrain, publish, run_name, store_url
from infra.server import ServerInfo
from models.selection import read_selection
from tasks.pretraining import TrainingExistsError, metrics_rows
from tasks.splits import read_split, write_split


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_blobs(str(folder / "store.zarr"), cases=8)
    roles = ["train"] * 5 + ["val"] + ["test"] * 2
    split = pd.DataFrame({"dataset": "blobs", "subject": [f"sub-{i}" for i in range(8)], "split": roles})
    write_split(split, folder / "splits" / "default.parquet")
    return folder


def params(workspace: Path, **changes: Any) -> PretrainParams:
    return PretrainParams(workspace=str(workspace), **changes)


def test_test_subjects_are_not_in_the_selection(workspace: Path) -> None:
    prepared = prepare(params(workspace, name="cases", epochs=2))
    assert {case.subject for case in prepared.selection if case.role == "train"} == {f"sub-{i}" for i in range(5)}
    assert [case.subject for case in prepared.selection if case.role == "val"] == ["sub-5"]
    assert not {case.role for case in prepared.selection} - {"train", "val"}
    assert read_selection(prepared.folder / "selection.parquet") == prepared.selection
    assert prepared.config.world_size == 2
    assert Path(prepared.config.data.store).is_absolute()
    assert prepared.total_steps == 2


def test_the_same_parameters_find_the_training_and_others_are_refused_with_what_differs(workspace: Path) -> None:
    first = prepare(params(workspace, name="again", epochs=2))
    assert prepare(params(workspace, name="again", epochs=2)) == first
    with pytest.raises(TrainingExistsError, match="'again' exists with another config: epochs: 2 -> 3; choose another"):
        prepare(params(workspace, name="again", epochs=3))
    with pytest.raises(TrainingExistsError, match="preset: 'recommended' -> 'paper'"):
        prepare(params(workspace, name="again", epochs=2, preset="paper"))


def test_a_selection_stays_frozen_when_the_split_changes(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    frozen = prepare(params(workspace, name="frozen", split="second"))
    split, _ = read_split(workspace / "splits" / "second.parquet")
    split["split"] = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    write_split(split, workspace / "splits" / "second.parquet")
    with caplog.at_level("WARNING"):
        again = prepare(params(workspace, name="frozen", split="second"))
    assert again.selection == frozen.selection
    assert "keeps its frozen selection" in caplog.text


def test_names_and_urls() -> None:
    assert run_name(PretrainParams(workspace="w", store="/x/demo.zarr")) == "pretrain brainmvp_tiny on demo.zarr"
    assert run_name(PretrainParams(workspace="w", name="mine")) == "pretrain mine on store.zarr"
    assert store_url(PretrainParams(store="s3://bucket/demo.zarr")) == "s3://bucket/demo.zarr"


def test_the_form_says_bounds_in_words_and_refuses_the_rest() -> None:
    schema = PretrainParams.model_json_schema()
    for name, field in schema["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name
    assert schema["properties"]["recipe"]["enum"] == ["brainmvp_tiny", "brainmvp"]
    assert "from 0 to 100" in schema["properties"]["restarts"]["description"]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        PretrainParams(epoch=3)
    with pytest.raises(ValidationError, match="pattern"):
        PretrainParams(name="../elsewhere")


def test_the_validation_table_has_a_row_per_validation() -> None:
    lines = [
        {"kind": "train", "step": 1, "epoch": 0, "losses": {"loss": 1.0}},
        {"kind": "val", "step": 1, "epoch": 0, "metrics": {"psnr_model": 20.12345}},
    ]
    assert metrics_rows(lines) == [{"step": 1, "epoch": 0, "psnr_model": 20.1234}]


def test_the_flow_trains_publishes_and_finds_itself_done(
    workspace: Path, prefect_server: ServerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    monkeypatch.setattr("flows.pretrain.publish_markdown", lambda key, *_: published.append(key))
    monkeypatch.setattr("flows.pretrain.publish_table", lambda key, rows, *_: published.append(f"{key} {len(rows)}"))
    asked = params(workspace, name="whole", epochs=1, ranks=1)
    first = pretrain(asked)
    assert first["launched"]
    assert first["steps"] == json.loads((workspace / "trainings" / "whole" / "done.json").read_text())["step"] == 2
    assert first["metrics"]["psnr_model"] < 100
    assert published == ["losses-whole", "reconstruction-whole", "templates-whole", "validation-whole 1"]
    log = (workspace / "trainings" / "whole" / "train.log").stat().st_size
    second = pretrain(asked)
    assert not second["launched"]
    assert second["weights_digest"] == first["weights_digest"]
    assert (workspace / "trainings" / "whole" / "train.log").stat().st_size == log, "nothing was launched"


def test_nothing_is_published_before_the_first_step(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[str] = []
    monkeypatch.setattr("flows.pretrain.publish_markdown", lambda key, *_: published.append(key))
    publish(prepare(params(workspace, name="fresh")))
    assert not published
