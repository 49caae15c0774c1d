"""The pre-training flow: frozen cases, refusal of another config, skip when done, artifacts."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from released_files import TINY_UNET, write_untrained
from training_phantoms import write_blobs

from flows.pretrain import PretrainParams, prepare, pretrain, publish, run_name, store_url, train_encoder
from infra.server import ServerInfo
from models.metrics import append_metrics
from models.selection import read_selection
from tasks.pretraining import TrainingExistsError, metrics_rows
from tasks.seen_prints import FILE, read_fingerprints
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
    assert read_fingerprints(prepared.folder)["subject"].to_pylist() == [], "those of this store are too short"
    assert (prepared.folder / FILE).exists()
    assert prepared.config.world_size == 2
    assert Path(prepared.config.data.store).is_absolute()
    assert prepared.total_steps == 2


def test_the_cases_of_a_step_and_the_precision_can_be_chosen(workspace: Path) -> None:
    asked = {"ranks": 1, "batch_size": 2, "accumulation": 3, "precision": "fp16"}
    config = prepare(params(workspace, name="chosen", **asked)).config
    assert (config.world_size, config.data.batch_size, config.accumulation, config.precision) == (1, 2, 3, "fp16")


def test_a_training_is_continued_on_other_ranks(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []

    def launch(_: object, ranks: int, *__: object, **___: object) -> None:
        launched.append(ranks)

    monkeypatch.setattr(
        "flows.pretrain.Progress", lambda *_: nullcontext(SimpleNamespace(update=lambda *_, **__: None))
    )
    for ranks in (2, 1):
        train_encoder.fn(prepare(params(workspace, name="ranks", ranks=ranks)), launch=launch)
    assert launched == [2, 1]


def test_near_duplicates_of_the_store_are_one_person(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (("blobs", "sub-0"), ("blobs", "sub-3"))
    monkeypatch.setattr("flows.pretrain.person_links", lambda workspace, url: [pair])
    people = {case.subject: case.person for case in prepare(params(workspace, name="people")).selection}
    assert people["sub-0"] == people["sub-3"] != ""
    assert {people[f"sub-{i}"] for i in (1, 2, 4, 5)} == {""}


def test_the_same_parameters_find_the_training_and_others_are_refused_with_what_differs(workspace: Path) -> None:
    first = prepare(params(workspace, name="again", epochs=2))
    assert prepare(params(workspace, name="again", epochs=2)) == first
    with pytest.raises(TrainingExistsError, match="'again' exists with another config: epochs: 2 -> 3; choose another"):
        prepare(params(workspace, name="again", epochs=3))
    with pytest.raises(TrainingExistsError, match="preset: 'recommended' -> 'paper'"):
        prepare(params(workspace, name="again", epochs=2, preset="paper"))


def test_probes_read_the_phenotypes_of_the_workspace_and_options_may_change(workspace: Path) -> None:
    diagnosis = pd.DataFrame({"dataset": "blobs", "subject": [f"sub-{i}" for i in range(8)], "session": ""})
    diagnosis["diagnosis"] = ["control", "patient"] * 4
    diagnosis.to_parquet(workspace / "phenotypes.parquet")
    first = prepare(params(workspace, name="probed", probe_target="diagnosis", probe_every=3, stage_dir="cache"))
    assert {case.subject: case.target for case in first.selection}["sub-3"] == "patient"
    assert first.config.running.probe_every == 3
    assert Path(first.config.running.stage_dir).is_absolute()
    again = prepare(params(workspace, name="probed", probe_target="diagnosis", tensorboard=True, loader_workers=2))
    assert again.selection == first.selection
    assert (again.config.running.tensorboard, again.config.data.workers) == (True, 2)
    assert prepare(params(workspace, name="plain")).config.running.probe_every == 0
    with pytest.raises(ValueError, match=r"probe_target 'iq' is no column of the phenotypes; known: .*diagnosis"):
        prepare(params(workspace, name="none", probe_target="iq"))


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


def test_a_training_starts_from_another_with_its_network(workspace: Path) -> None:
    with pytest.raises(ValueError, match="pre-training 'tiny_unet' is not finished"):
        prepare(params(workspace, name="second-stage", init_from="tiny_unet"))
    folder = write_untrained(workspace / "trainings" / "tiny_unet", network=TINY_UNET)
    config = prepare(params(workspace, name="second-stage", init_from="tiny_unet")).config
    assert (config.network, config.init_from) == (TINY_UNET, str(folder))


def test_the_form_says_bounds_in_words_and_refuses_the_rest() -> None:
    schema = PretrainParams.model_json_schema()
    for name, field in schema["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name
    assert schema["properties"]["recipe"]["enum"][:4] == [
        "brainmvp_tiny",
        "brainmvp",
        "brainmvp_unet_tiny",
        "brainmvp_unet",
    ]
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


def test_the_share_of_waiting_and_the_probes_are_published(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr("flows.pretrain.publish_markdown", lambda key, text, *_: shown.update({key: text}))
    monkeypatch.setattr("flows.pretrain.publish_table", lambda key, rows, *_: shown.update({key: rows}))
    prepared = prepare(params(workspace, name="waiting"))
    place = {"step": 1, "epoch": 0}
    append_metrics(
        prepared.folder,
        {"kind": "train", **place, "losses": {"loss": 1.0}, "seconds": 4.0, "data_wait_seconds": 1.0},
    )
    counts = {"measure": "R2", "n_train": 5, "n_val": 1}
    append_metrics(prepared.folder, {"kind": "probe", **place, **counts, "metrics": {"probe_knn": 0.25}})
    publish(prepared)
    assert "Waiting for data: 25.0% of the step time." in shown["losses-waiting"]
    assert shown["probes-waiting"] == [{**place, "measure": "R2", "knn": 0.25, "n_train": 5, "n_val": 1}]


def test_nothing_is_published_before_the_first_step(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[str] = []
    monkeypatch.setattr("flows.pretrain.publish_markdown", lambda key, *_: published.append(key))
    publish(prepare(params(workspace, name="fresh")))
    assert not published
