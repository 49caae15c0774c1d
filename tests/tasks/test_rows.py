"""Rows of several pre-trainings: one from scratch for each network, nothing trained twice, refusals up front."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.config import TrainingConfig
from models.config_scratch import SCRATCH_NETWORKS
from models.recipes import RECIPES
from models.records import SelectedCase
from models.spec import SPECS
from tasks.benchmark_summary import find_any
from tasks.benchmarks import BENCHMARKS
from tasks.finetune import Finetuning, prepare, training_name
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.rows import Run, import_notes, left_out_notes, rows_for, scratch_of, training_rows
from tasks.serving import RunError, check_runs, check_templates

TUMOUR, DIAGNOSIS = BENCHMARKS["phantom-tumour"], BENCHMARKS["phantom-diagnosis"]
STORE: Any = SimpleNamespace(datasets=[], url="s.zarr")
MakeRun = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path) -> MakeRun:
    def make(
        name: str, recipe: str = "brainmvp_tiny", finished: bool = True, epochs: int | None = None, **done: Any
    ) -> Run:
        folder = tmp_path / "trainings" / name
        folder.mkdir(parents=True)
        config = RECIPES[recipe]("s.zarr", "x.parquet", name=name, **({"epochs": epochs} if epochs else {}))
        (folder / "run.json").write_text(config.model_dump_json())
        if finished:
            (folder / "done.json").write_text(json.dumps({"weights_digest": name, **done}))
        return Run(name.upper(), folder)

    return make


def test_every_network_has_one_row_from_scratch(run: MakeRun) -> None:
    runs = [run("a"), run("b", "brainmvp_unet_tiny"), run("c"), run("d", "brainmvp_unet")]
    rows = training_rows(runs, ["dynunet"], mix=True)
    assert [row.name for row in rows] == [
        "A", "B", "C", "D", "scratch", "scratch (unet3d)", "scratch (unet3d of D)", "pre-trained+mix",
        "scratch (dynunet)",
    ]  # fmt: skip
    assert scratch_of(runs) == {
        "A": "scratch", "B": "scratch (unet3d)", "C": "scratch", "D": "scratch (unet3d of D)",
    }  # fmt: skip
    settings = {row.name: row.settings["network"] for row in rows}
    assert settings["scratch (unet3d)"] == settings["B"] != settings["scratch"] == settings["A"]
    assert {row.name: row.weights for row in rows if row.start}["pre-trained+mix"] == "a"


def test_networks_that_only_segment_are_left_out_of_a_classification_with_a_word(run: MakeRun) -> None:
    rows = training_rows([run("a")], list(SCRATCH_NETWORKS), mix=True)
    assert [row.name for row in rows_for(DIAGNOSIS, rows)] == ["A", "scratch"]
    assert len(rows_for(TUMOUR, rows)) == len(rows) == 5
    (sentence,) = left_out_notes(DIAGNOSIS, list(SCRATCH_NETWORKS))
    assert sentence.startswith("Left out: scratch (swin_unetr), scratch (dynunet); these networks have no part")
    assert left_out_notes(TUMOUR, ["dynunet"]) == left_out_notes(DIAGNOSIS, []) == ()


def prepared(runs: list[Run], networks: tuple[str, ...] = (), seeds: int = 1) -> list[Finetuning]:
    cases = [
        SelectedCase(dataset="d", row=k, case=str(k), subject=str(k), digest="x", role="train" if k else "test")
        for k in range(3)
    ]
    rows = rows_for(TUMOUR, training_rows(runs, networks))
    return prepare(TUMOUR, cases, "s.zarr", runs[0].folder.parent, rows, seeds, epochs=2)


def test_all_rows_have_one_budget_and_networks_of_their_own(run: MakeRun) -> None:
    found = prepared([run("a"), run("b", "brainmvp_unet_tiny")], ("swin_unetr", "dynunet"))
    configs = {one.row: one.config for one in found}
    kinds = {row: config.network.kind for row, config in configs.items()}
    assert kinds == {
        "A": "uniformer", "B": "unet3d", "scratch": "uniformer", "scratch (unet3d)": "unet3d",
        "scratch (swin_unetr)": "swin_unetr", "scratch (dynunet)": "dynunet",
    }  # fmt: skip
    assert {config.network.in_channels for config in configs.values()} == {4}

    def budget(config: TrainingConfig) -> list[Any]:
        return [config.epochs, config.seed, config.data.crop, config.data.batch_size, config.optimiser]

    assert all(budget(config) == budget(configs["A"]) for config in configs.values())
    assert {row for row, config in configs.items() if config.init_from} == {"A", "B"}


def test_a_renamed_or_moved_row_is_not_trained_again(run: MakeRun) -> None:
    a, b = run("a"), run("b", "brainmvp_unet_tiny")
    for one in prepared([Run("pre-trained", a.folder), b]):
        (one.folder / "done.json").write_text(json.dumps({"config_digest": one.config.content_digest()}))
    again = prepared([b, a])
    assert [one.row for one in again] == ["B", "A", "scratch", "scratch (uniformer)"]
    assert all(one.finished for one in again), "two of them under the names that they had"
    assert again[1].folder.name == "phantom-tumour-pre-trained-seed0"
    assert again[2].folder.name == "phantom-tumour-scratch-unet3d-seed0"
    (b.folder / "done.json").write_text(json.dumps({"weights_digest": "other"}))
    assert [one.row for one in prepared([b, a]) if not one.finished] == ["B"]


def test_the_folder_of_a_renamed_row_is_left_to_it(run: MakeRun) -> None:
    a, b = run("a"), run("b", "brainmvp_unet_tiny")

    def finish(found: list[Finetuning]) -> None:
        for one in found:
            (one.folder / "done.json").write_text(json.dumps({"config_digest": one.config.content_digest()}))

    finish(prepared([Run("x", a.folder)]))
    rows = [Run("y", a.folder), Run("x", b.folder)]
    for found in (prepared(rows), prepared(rows)):
        folders = {one.row: one.folder.name for one in found}
        assert folders["y"] == "phantom-tumour-x-seed0", "trained when it was called so"
        assert folders["x"] == "phantom-tumour-x-seed0-2"
        assert [one.row for one in found if one.finished] == ["y", "scratch"]
    finish(prepared(rows))
    turned = prepared(rows[::-1])
    assert {one.row: one.folder.name for one in turned}["scratch"] == "phantom-tumour-scratch-unet3d-seed0"
    assert all(one.finished for one in turned)
    assert not (a.folder.parent / "superseded").exists()


def test_folders_are_named_by_letters_that_shells_take() -> None:
    assert training_name("b", "pre-trained+mix", 1) == "b-pre-trained+mix-seed1"
    assert training_name("b", "scratch (unet3d of B, large)", 0) == "b-scratch-unet3d-of-B-large-seed0"


def test_all_that_is_wrong_with_runs_is_said_at_once(run: MakeRun) -> None:
    runs = [run("flat", "anatcl_tiny"), run("begun", finished=False), run("swin")]
    swin = RECIPES["segmentation_tiny"]("s", "x", network=SCRATCH_NETWORKS["swin_unetr"]["tiny"])
    (runs[2].folder / "run.json").write_text(swin.model_dump_json())
    runs.append(Run("GONE", runs[0].folder.parent / "gone"))
    with pytest.raises(RunError) as found:
        check_runs(runs, [TUMOUR, DIAGNOSIS], STORE)
    lines = str(found.value).splitlines()
    assert lines[0].startswith("run 'BEGUN': training 'begun' is not finished: ")
    assert lines[1].startswith("run 'GONE': there is no training 'gone' in ")
    assert lines[1].endswith("finished pre-trainings: flat")
    assert lines[2] == (
        "run 'FLAT' cannot serve benchmark 'phantom-tumour': its network 'resnet3d' has no decoder, so nothing can be "
        "segmented with it"
    ), "nobody else can"
    assert lines[3].endswith("its network 'swin_unetr' is trained from scratch only; name it under `networks`")
    assert lines[4].startswith("run 'SWIN' cannot serve benchmark 'phantom-diagnosis'")
    assert len(lines) == 5
    check_runs(runs[:1], [DIAGNOSIS], STORE)


def test_a_run_is_left_out_of_what_it_cannot_serve_with_a_word(run: MakeRun) -> None:
    runs = [run("flat", "anatcl_tiny"), run("mvp")]
    serving = check_runs(runs, [TUMOUR, DIAGNOSIS], STORE)
    assert [one.name for one in serving.of(["phantom-tumour"])] == ["MVP"]
    assert [one.name for one in serving.of(["phantom-diagnosis"])] == ["FLAT", "MVP"]
    assert serving.left_out(["phantom-tumour", "phantom-diagnosis"]) == []
    assert serving.left_out(["phantom-tumour"]) == [
        "FLAT is left out: its network 'resnet3d' has no decoder, so nothing can be segmented with it."
    ]
    rows = training_rows(runs)
    assert [row.name for row in rows_for(TUMOUR, rows)] == ["MVP", "scratch (uniformer)"]
    assert [row.name for row in rows_for(DIAGNOSIS, rows)] == ["FLAT", "MVP", "scratch", "scratch (uniformer)"]
    assert left_out_notes(TUMOUR, [], runs) == ("Left out: FLAT; without a decoder nothing can be segmented.",)
    assert left_out_notes(DIAGNOSIS, [], runs) == ()


def test_repeats_of_a_pretraining_are_starts_of_one_row(run: MakeRun) -> None:
    first, second, third = run("a"), run("b"), run("c")
    whole = Run("A", first.folder, (second.folder, third.folder))
    found = [one for one in prepared([whole], seeds=2) if one.row == "A"]
    assert [one.seed for one in found] == [0, 100, 200, 1, 101, 201]
    assert [one.own_seed for one in found] == [one.config.seed for one in found] == [0, 0, 0, 1, 1, 1]
    assert [Path(one.config.init_from).name for one in found[:3]] == ["a", "b", "c"]
    assert [one.folder.name for one in found[3:5]] == ["phantom-tumour-A-seed1", "phantom-tumour-A-seed1-start1"]
    alone = prepared([first], seeds=2)
    assert {one.folder for one in alone if one.row == "A"} == {one.folder for one in found if one.seed < 100}
    assert [one.seed for one in prepared([whole], seeds=1) if one.row == "scratch"] == [0]
    check_runs([whole], [DIAGNOSIS], STORE)


def test_what_is_no_repeat_is_refused(run: MakeRun) -> None:
    first, other, begun = run("a"), run("b", epochs=7), run("c", finished=False)
    words = r"run 'A': a and b are no repetitions of one pre-training: epochs: .* -> 7; make them rows of their own"
    with pytest.raises(RunError, match=words):
        check_runs([Run("A", first.folder, (other.folder,))], [DIAGNOSIS], STORE)
    with pytest.raises(RunError, match="run 'A': training 'c' is not finished: "):
        check_runs([Run("A", first.folder, (begun.folder,))], [DIAGNOSIS], STORE)


def test_a_training_on_labels_is_no_pretraining(run: MakeRun) -> None:
    runs = [run("mvp"), run("tuned", "segmentation_tiny"), run("told", "classification_tiny")]
    with pytest.raises(RunError) as found:
        check_runs(runs, [DIAGNOSIS], STORE)
    assert str(found.value).splitlines() == [
        f"run {name!r} cannot serve benchmark 'phantom-diagnosis': it was trained on the labels of a benchmark, so it "
        "is no pre-training; name one that was not"
        for name in ("TUNED", "TOLD")
    ]


def test_a_training_without_connectomes_cannot_be_prompted_with(run: MakeRun) -> None:
    one = run("mvp")
    content = json.loads((one.folder / "run.json").read_text())
    config = {"training": content, "spec": SPECS["demo"].model_dump(mode="json")}
    (one.folder / "config.json").write_text(json.dumps(config))
    name = next(iter(PROMPT_TASKS))
    words = (
        rf"run 'MVP' cannot serve benchmark '{name}': training mvp \(recipe 'brainmvp_tiny'\) has no encoder of conn"
    )
    with pytest.raises(RunError, match=words):
        check_runs([one], [find_any(name)], STORE)


def test_learned_templates_need_a_run_that_has_them(run: MakeRun) -> None:
    mae, mvp = run("mae", "mae_tiny"), run("mvp")
    check_templates([mvp, mae], mix=True, missing=True)
    check_templates([mae, mvp], mix=False, missing=True)
    with pytest.raises(RunError, match="template bank of the first run, and 'MAE' was not pre-trained with BrainMVP"):
        check_templates([mae, mvp], mix=True, missing=False)
    with pytest.raises(RunError, match=r"none of the runs \(MAE\) was pre-trained with BrainMVP; add one"):
        check_templates([mae], mix=False, missing=True)


def test_imported_weights_are_told(run: MakeRun) -> None:
    runs = [run("a"), run("b", origin={"file": "BrainMVP_uniformer.pt"})]
    (sentence,) = import_notes(runs)
    assert sentence.startswith("B was imported from the file BrainMVP_uniformer.pt: which subjects")
