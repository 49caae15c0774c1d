"""Cohorts and fine-tunings: who is in, equal budgets, nothing stale, lanes that finish and stop."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.config import TrainingConfig
from models.records import SelectedCase
from models.schedule import plan_steps
from models.selection import read_selection
from tasks.benchmarks import BENCHMARKS
from tasks.cohort import CohortError, check_cohort, select_cases, shuffle_targets, targets_of_seed
from tasks.finetune import Finetuning, budget, prepare
from tasks.lanes import lanes, run_lanes
from tasks.rows import Run, rows_for, training_rows
from tasks.summary import PRETRAINED

TUMOUR, DIAGNOSIS = BENCHMARKS["phantom-tumour"], BENCHMARKS["phantom-diagnosis"]


def cases_of(n: int = 20) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "dataset": "phantom-bids",
                "row": k,
                "case": f"sub-{k}",
                "subject": f"sub-{k}",
                "digest": f"d{k}",
                "status": "stored",
                "modalities": ["t1", "flair"],
                "has_label": k % 2 == 0,
                "label_scheme": "brats2023",
                "diagnosis": ("control", "patient")[k // 2 % 2],
            }
            for k in range(n)
        ]
    )


def roles_of(n: int = 20) -> dict[tuple[str, str], str]:
    return {("phantom-bids", f"sub-{k}"): ("train", "train", "train", "val", "test")[k // 4 % 5] for k in range(n)}


def test_a_segmentation_takes_labelled_cases_of_its_scheme() -> None:
    found = select_cases(TUMOUR, cases_of(), roles_of())
    assert [case.row for case in found] == list(range(0, 20, 2))
    assert Counter(case.role for case in found) == {"train": 6, "val": 2, "test": 2}
    assert {case.target for case in found} == {""}


def test_a_classification_takes_cases_with_a_known_target_and_one_of_its_modalities() -> None:
    cases = cases_of()
    cases.loc[0, "diagnosis"] = None
    cases.at[1, "modalities"] = ["flair"]
    cases.loc[2, "status"] = "quarantined"
    found = select_cases(DIAGNOSIS, cases, roles_of())
    assert [case.row for case in found] == list(range(3, 20))
    assert {case.target for case in found} == {"control", "patient"}


def test_a_known_diagnosis_of_another_benchmark_is_left_out() -> None:
    cases = cases_of()
    cases.loc[[5, 9], "diagnosis"] = "other"
    found = select_cases(DIAGNOSIS.replace(others=("other",)), cases, roles_of())
    assert [case.row for case in found] == [row for row in range(20) if row not in (5, 9)]
    with pytest.raises(CohortError, match=r"column 'diagnosis' has values \['other'\] that are not among its classes"):
        select_cases(DIAGNOSIS, cases, roles_of())


def test_subjects_without_a_role_are_left_out_and_no_data_is_no_error() -> None:
    roles = {key: role for key, role in roles_of().items() if key[1] != "sub-4"}
    assert 4 not in {case.row for case in select_cases(TUMOUR, cases_of(), roles)}
    assert select_cases(BENCHMARKS["adni"], cases_of(), roles) == []


def test_cohorts_that_cannot_be_run_are_refused() -> None:
    cases = cases_of()
    with pytest.raises(
        CohortError, match=r"needs labels of scheme 'brats2023'; the 10 labelled .* have \['brats2021'\]"
    ):
        select_cases(TUMOUR, cases.assign(label_scheme="brats2021"), roles_of())
    with pytest.raises(
        CohortError, match=r"has values \['ill'\] that are not among its classes \['control', 'patient'\]"
    ):
        select_cases(DIAGNOSIS, cases.assign(diagnosis="ill"), roles_of())
    with pytest.raises(CohortError, match="needs the phenotype column 'diagnosis'"):
        select_cases(DIAGNOSIS, cases.drop(columns="diagnosis"), roles_of())
    with pytest.raises(CohortError, match="no test case among 20; make a split with larger shares"):
        select_cases(DIAGNOSIS, cases, dict.fromkeys(roles_of(), "train"))
    found = select_cases(DIAGNOSIS, cases, roles_of())
    one_class = [case for case in found if case.role != "test" or case.target == "control"]
    with pytest.raises(CohortError, match="class 'patient' is absent from the test role"):
        check_cohort(DIAGNOSIS, one_class)


def test_shuffling_keeps_classes_in_every_role_and_is_seeded() -> None:
    found = select_cases(DIAGNOSIS, cases_of(), roles_of())
    mixed = shuffle_targets(found, 1)
    assert mixed == shuffle_targets(found, 1) != shuffle_targets(found, 2)
    assert Counter((c.role, c.target) for c in mixed) == Counter((c.role, c.target) for c in found)
    assert [c.target for c in mixed] != [c.target for c in found]


def test_a_negative_control_shuffles_anew_for_every_seed(pretrained: Path) -> None:
    shuffled = BENCHMARKS["phantom-shuffled"]
    cases = select_cases(shuffled, cases_of(), roles_of())
    assert [case.target for case in cases] == [case.target for case in select_cases(DIAGNOSIS, cases_of(), roles_of())]
    targets = {}
    for one in prepared(pretrained, shuffled, cases=cases):
        kept = read_selection(one.folder / "selection.parquet")
        targets[one.row, one.seed] = [case.target for case in kept]
        assert kept == targets_of_seed(shuffled, cases, one.seed)
    assert targets["pre-trained", 0] == targets["scratch", 0] != targets["scratch", 1]
    assert targets_of_seed(DIAGNOSIS, cases, 1) == cases


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    folder = tmp_path / "trainings" / "brainmvp_tiny"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"weights_digest": "abc"}))
    return folder


def prepared(pretrained: Path, benchmark: Any = DIAGNOSIS, **changes: Any) -> list[Finetuning]:
    cases = changes.pop("cases", select_cases(benchmark, cases_of(), roles_of()))
    runs = changes.pop("runs", [Run(PRETRAINED, pretrained)])
    rows = training_rows(runs, changes.pop("networks", ()), changes.pop("template_mix", False))
    return prepare(
        benchmark,
        cases,
        "store.zarr",
        pretrained.parent,
        rows_for(benchmark, rows),
        **{"seeds": 2, "epochs": 3, **changes},
    )


@pytest.mark.parametrize("benchmark", [TUMOUR, DIAGNOSIS], ids=lambda b: b.kind)
def test_rows_differ_in_their_start_and_nothing_else(pretrained: Path, benchmark: Any) -> None:
    found = prepared(pretrained, benchmark)
    assert [(one.row, one.seed) for one in found] == [
        ("pre-trained", 0),
        ("scratch", 0),
        ("pre-trained", 1),
        ("scratch", 1),
    ]
    first, second = (json.loads(one.config.model_dump_json()) for one in found[:2])
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"name", "data", "init_from"}
    assert {key for key in first["data"] if first["data"][key] != second["data"][key]} == {"selection"}
    assert first["init_from"] == str(pretrained)
    assert first["predict"]
    for one in found:
        written = TrainingConfig.model_validate_json((one.folder / "run.json").read_text())
        assert written == one.config
        assert len(read_selection(one.folder / "selection.parquet")) == (10 if benchmark is TUMOUR else 20)
    assert "3 epochs of 6 training cases" in budget(found[0].config, 6)


def finish(training: Finetuning) -> None:
    digest = training.config.content_digest()
    (training.folder / "done.json").write_text(json.dumps({"config_digest": digest}))
    (training.folder / "predictions").mkdir(exist_ok=True)
    test = [case for case in read_selection(training.folder / "selection.parquet") if case.role == "test"]
    place = {"extent": [4, 4, 4], "affine": np.eye(4).ravel(), "prob_control": 0.5, "prob_patient": 0.5}
    lines = [{"dataset": case.dataset, "case": case.case, "digest": case.digest, **place} for case in test]
    pd.DataFrame(lines).to_parquet(training.folder / "predictions" / "predictions.parquet")


def test_finished_trainings_are_kept_and_stale_ones_set_aside(pretrained: Path) -> None:
    for one in prepared(pretrained):
        finish(one)
    assert all(one.finished for one in prepared(pretrained))
    assert not any(one.finished for one in prepared(pretrained, epochs=4))
    for one in prepared(pretrained, epochs=4):
        finish(one)
    (pretrained / "done.json").write_text(json.dumps({"weights_digest": "other"}))
    again = prepared(pretrained, epochs=4)
    assert [one.row for one in again if one.finished] == ["scratch", "scratch"]
    assert len(list((pretrained.parent / "superseded").iterdir())) == 6


def test_an_unfinished_pretraining_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pre-training 'nope' is not finished: .*done.json is missing; run pretrain"):
        prepared(tmp_path / "nope")


def test_lanes_share_the_work_and_report_in_the_callers_thread(pretrained: Path) -> None:
    import threading

    found = prepared(pretrained)
    finish(found[0])
    assert [len(lane) for lane in lanes(found, 2)] == [2, 1]
    launched: list[int] = []
    lines: list[tuple[str, bool]] = []

    def launch(folders: list[Path], world_size: int, on_progress: Any) -> None:
        launched.append(world_size)
        for folder in folders:
            on_progress({"training": folder.name, "step": 1})
            finish(next(one for one in found if one.folder == folder))

    def show(line: dict[str, Any]) -> None:
        lines.append((line["training"], threading.current_thread() is threading.main_thread()))

    assert run_lanes(found, 2, launch, show) == 3
    assert launched == [1, 1]
    assert sorted(lines) == sorted((one.folder.name, True) for one in found[1:])
    assert run_lanes(found, 2, launch, show) == 0


def test_a_finished_training_without_its_predictions_is_launched(pretrained: Path) -> None:
    found = prepared(pretrained)
    for one in found:
        finish(one)
    table = found[1].folder / "predictions" / "predictions.parquet"
    pd.read_parquet(table).iloc[1:].to_parquet(table)
    assert lanes(found, 2) == [[found[1].folder]]
    with pytest.raises(
        RuntimeError, match=r"it was predicted again, and still .* has no line of case sub-16 of phantom"
    ):
        run_lanes(found, 1, lambda *_, **__: None)
    table.unlink()
    assert lanes(found, 2) == [[found[1].folder]]


def test_a_failing_lane_lets_the_other_finish_and_an_interrupt_stops_it(pretrained: Path) -> None:
    import threading

    found = prepared(pretrained)
    done: list[str] = []

    def launch(folders: list[Path], world_size: int, on_progress: Any) -> None:
        if found[0].folder in folders:
            raise RuntimeError("diverged")
        done.extend(folder.name for folder in folders)

    with pytest.raises(RuntimeError, match="diverged"):
        run_lanes(found, 2, launch)
    assert len(done) == 2

    stopped = threading.Event()

    def endless(folders: list[Path], world_size: int, on_progress: Any) -> None:
        try:
            while True:
                on_progress({"training": folders[0].name, "step": 1})
                stopped.wait(0.01)
        except RuntimeError:
            stopped.set()
            raise

    def interrupt(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_lanes(found[:1], 1, endless, interrupt)
    assert stopped.is_set()


def test_a_training_that_ends_without_a_result_is_an_error(pretrained: Path) -> None:
    found = prepared(pretrained)
    words = r"4 trainings did not end as asked, first 'phantom-.*-pre-trained-seed0': it ended without done\.json"
    with pytest.raises(RuntimeError, match=words):
        run_lanes(found, 1, lambda *_, **__: None)
    (found[0].folder / "done.json").write_text(json.dumps({"config_digest": "of-another"}))
    with pytest.raises(RuntimeError, match=r"its done\.json belongs to another config \(of-another, asked for is "):
        run_lanes(found, 1, lambda *_, **__: None)


def test_selected_cases_are_records() -> None:
    assert all(isinstance(case, SelectedCase) for case in select_cases(TUMOUR, cases_of(), roles_of()))


@pytest.mark.parametrize(("size", "epochs"), [("tiny", 8), ("full", 300)])
def test_the_row_with_template_mix_has_the_budget_of_the_others(pretrained: Path, size: str, epochs: int) -> None:
    plain, scratch, mixed = prepared(pretrained, TUMOUR, seeds=1, epochs=epochs, size=size, template_mix=True)
    assert [plain.row, scratch.row, mixed.row] == ["pre-trained", "scratch", "pre-trained+mix"]
    assert mixed.config.objective.template_mix == 3
    assert mixed.config.objective.missing == "template"
    assert mixed.config.init_from == plain.config.init_from
    for cases in (7, 24):
        steps = {one.row: plan_steps(one.config, cases, 1).total_steps for one in (plain, scratch, mixed)}
        assert len(set(steps.values())) == 1, steps
    crops = {one.row: one.config.data.batch_size * (2 if one.row == mixed.row else 1) for one in (plain, mixed)}
    assert len(set(crops.values())) == 1, crops
    same = {"epochs": 1, "objective": plain.config.objective, "data": plain.config.data, "name": "", "select_every": 0}
    assert mixed.config.replace(**same) == plain.config.replace(**same)


def test_template_mix_needs_more_than_one_modality_and_an_even_budget(pretrained: Path) -> None:
    assert {one.row for one in prepared(pretrained, DIAGNOSIS, template_mix=True)} == {"pre-trained", "scratch"}
    with pytest.raises(
        ValueError, match=r"needs an even number of epochs and an even batch, got 9 and 4; set epochs to"
    ):
        prepared(pretrained, TUMOUR, epochs=9, template_mix=True)
