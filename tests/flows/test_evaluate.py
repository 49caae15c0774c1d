"""The evaluation flow on a real small store with trainings that are played: tables, report, resume, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from evaluation_workspaces import CASES, DIAGNOSIS, ROLES, TUMOUR, write_pretraining, write_workspace
from pydantic import ValidationError
from training_phantoms import DATASET, EXTENT, draw_prints

from flows.case_workers import CaseWorkers
from flows.evaluate import check_given, evaluate, fine_tune, score
from flows.evaluate_params import EvaluateParams, run_name
from infra.server import ServerInfo
from infra.settings import Settings
from models.config import TrainingConfig
from models.prediction_files import place_of
from models.records import SelectedCase, SourceFile
from models.selection import read_selection, write_selection
from models.store import open_store, open_writer
from tasks.benchmarks import BENCHMARKS
from tasks.case_map import CaseMap
from tasks.evaluation import Cohort
from tasks.finetune import Finetuning
from tasks.native_truth import SourceLabels
from tasks.scores import ScoreError, region_masks
from tasks.seen_prints import FILE, keep_fingerprints
from tasks.splits import read_split


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_workspace(folder)
    write_pretraining(folder, [k for k in range(CASES) if ROLES[k] != "test"])
    return folder


def play(folders: list[Path], world_size: int, on_progress: Any) -> None:
    """Write what a training leaves: good predictions from a pre-trained start, poor ones from scratch."""
    for folder in folders:
        config = TrainingConfig.model_validate_json((folder / "run.json").read_text())
        rng = np.random.default_rng(config.seed)
        data = open_store(config.data.store).dataset(DATASET)
        (folder / "predictions").mkdir(exist_ok=True)
        lines = []
        for case in read_selection(config.data.selection):
            if case.role != "test":
                continue
            line: dict[str, Any] = {"dataset": case.dataset, "case": case.case, "file": f"{case.case}.npz"}
            line |= place_of(data.case_info(case.row))
            noise = 0.01 if config.init_from else 0.05
            if config.objective.kind == "segmentation":
                label = data.read_label(case.row, (0, 0, 0), EXTENT)
                truth = region_masks(label, TUMOUR.regions, TUMOUR.scheme)
                masks = (truth ^ (rng.random(truth.shape) < noise)).astype(np.uint8)
                np.savez_compressed(folder / "predictions" / f"{case.case}.npz", regions=masks)
            else:
                p = float(np.clip(0.5 + 0.2 * (case.target == "patient") + rng.normal(0, 10 * noise), 0.01, 0.99))
                line |= {"prob_control": 1 - p, "prob_patient": p}
            lines.append(line)
        pd.DataFrame(lines).to_parquet(folder / "predictions" / "predictions.parquet")
        on_progress({"training": folder.name, "kind": "train", "step": 1})
        (folder / "done.json").write_text(json.dumps({"config_digest": config.content_digest(), "weights_digest": "x"}))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    published: dict[str, list[str]] = {"markdown": [], "table": []}
    for benchmark in (TUMOUR, DIAGNOSIS):
        monkeypatch.setitem(BENCHMARKS, benchmark.name, benchmark)
    monkeypatch.setattr("flows.evaluate.launch", play)
    monkeypatch.setattr("flows.results.publish_markdown", lambda key, *_: published["markdown"].append(key))
    monkeypatch.setattr("flows.results.publish_table", lambda key, *_: published["table"].append(key))
    return published


def params(workspace: Path, **changes: Any) -> EvaluateParams:
    values = {"workspace": str(workspace), "pretrained": "tiny", "seeds": 2, "epochs": 1, "replicates": 200}
    return EvaluateParams(**{**values, "benchmarks": ["blobs-tumour", "blobs-diagnosis", "adni"], **changes})


def test_tables_report_and_resume(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]]
) -> None:
    first = evaluate(params(workspace))
    assert first["trained"] == 8
    assert first["scored"] == 8 + 1 + 3
    assert first["no_data"] == ["adni"]
    scores = pd.read_parquet(workspace / "scores.parquet")
    assert set(scores["row"]) == {
        "pre-trained", "scratch", "majority", "age+sex+volume", "template overlap", "ceiling (true latents)",
    }  # fmt: skip
    for suffix in ("md", "csv", "tex", "0.png"):
        assert (workspace / "tables" / f"blobs-tumour.{suffix}").stat().st_size > 100
    curves = pd.read_csv(workspace / "tables" / "blobs-diagnosis.reliability.csv")
    assert curves.groupby(["row", "seed"])["n"].sum().eq(10).all()
    assert (workspace / "tables" / "blobs-diagnosis.1.png").stat().st_size > 1000
    assert "| no data |" in (workspace / "tables" / "adni.md").read_text()
    page = Path(first["report"]).read_text()
    for words in (
        "Not for clinical use",
        "Phantom tumour",
        "Phantom diagnosis",
        "overlays of Phantom tumour",
        "ABIDE-I",
        "Methods, for a paper",
        "Calibration of Phantom diagnosis",
        "95 % BCa bootstrap intervals [",
    ):
        assert words in page
    methods = (workspace / "report" / "methods.md").read_text()
    assert f"{DATASET} (20 subjects, 20 cases, 73 images)" in methods
    assert "A 3D UniFormer [1] was pre-trained with BrainMVP [2] (recipe brainmvp_tiny, preset recommended" in methods
    assert "subjects: 8 train, 2 val and 10 test): each row (pre-trained and scratch) was trained 2 times" in methods
    assert "2. Rui S. et al. Multi-modal Vision Pre-training" in methods
    assert registered["markdown"] == [
        "benchmark-blobs-tumour", "benchmark-blobs-diagnosis", "benchmark-adni", "leaderboard",
    ]  # fmt: skip
    confused = pd.read_csv(workspace / "tables" / "blobs-diagnosis.confusion.csv").query("row == 'scratch'")
    assert confused.groupby("seed")["cases"].sum().to_dict() == {"0": 10, "1": 10, "all": 20}
    board = (workspace / "tables" / "leaderboard.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in board[1:]} == {"pre-trained", "scratch"}
    assert '<h3 id="leaderboard">' in page

    second = evaluate(params(workspace))
    assert (second["trained"], second["scored"]) == (0, 0)
    assert second["tables"] == first["tables"]
    assert Path(second["report"]).read_text() == page
    assert len(registered["table"]) == 6, "artifacts are published again"


@pytest.mark.full
def test_scores_do_not_depend_on_where_they_are_computed(
    workspace: Path, registered: dict[str, list[str]], without_server: None, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setitem(BENCHMARKS, TUMOUR.name, TUMOUR.replace(metrics=("dice", "hd95"), lesions=None))
    asked = params(workspace, benchmarks=["blobs-tumour"], seeds=1)
    found = []
    for workers in (0, 1, 2):
        shutil.rmtree(workspace / "scores", ignore_errors=True)
        there = Settings(workers=max(workers, 1), state_dir=tmp_path)
        work = CaseWorkers(there, large=0) if workers else CaseWorkers(there)
        with monkeypatch.context() as patched:
            patched.setattr("flows.evaluate.CaseWorkers", lambda _, work=work: work)
            assert evaluate.fn(asked)["scored"] == 3
        found.append((workspace / "scores.parquet").read_bytes())
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("lost", ["adni.csv", "blobs-diagnosis.confusion.csv", "leaderboard.md"])
def test_a_deleted_result_is_written_again(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]], lost: str
) -> None:
    first = evaluate(params(workspace))
    table = workspace / "tables" / lost
    text = table.read_text()
    table.unlink()
    again = evaluate(params(workspace))
    assert table.read_text() == text
    assert again["tables"] == first["tables"]
    assert (again["trained"], again["scored"]) == (0, 0)


def test_lost_and_damaged_predictions_and_records_are_made_again(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]]
) -> None:
    first = evaluate(params(workspace))
    trainings = workspace / "trainings"
    masks = next((trainings / "blobs-tumour-scratch-seed0" / "predictions").glob("*.npz"))
    masks.write_bytes(masks.read_bytes()[:100])
    (trainings / "blobs-diagnosis-scratch-seed1" / "predictions" / "predictions.parquet").unlink()
    (workspace / "report" / "evaluation.json").write_text("{")
    again = evaluate(params(workspace))
    assert (again["trained"], again["tables"]) == (2, first["tables"])
    assert evaluate(params(workspace))["trained"] == 0


def test_one_lost_training_is_run_again_and_the_rest_is_kept(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]]
) -> None:
    first = evaluate(params(workspace))
    (workspace / "trainings" / "blobs-tumour-scratch-seed1" / "done.json").unlink()
    again = evaluate(params(workspace))
    assert again["trained"] == 1
    assert again["scored"] == 0, "the same predictions have the same scores"
    assert again["tables"] == first["tables"]


@pytest.fixture
def seen_twelve(workspace: Path) -> Iterator[None]:
    """A pre-training that has seen two of the ten test subjects."""
    before = read_selection(workspace / "trainings" / "tiny" / "selection.parquet")
    write_pretraining(workspace, list(range(12)))
    yield
    write_pretraining(workspace, [case.row for case in before])


def test_test_subjects_that_the_pretraining_saw_count_in_no_table(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]], seen_twelve: None
) -> None:
    found = evaluate(params(workspace, seeds=1))
    scores = pd.read_parquet(workspace / "scores.parquet")
    assert not set(scores["subject"]) & {"sub-10", "sub-11"}
    table = (workspace / "tables" / "blobs-diagnosis.md").read_text()
    assert "2 of 10 test subjects were in the pre-training, by id or by looks: left out of every number here" in table
    methods = (workspace / "report" / "methods.md").read_text()
    assert "seen were left out of every number: 2 of 10 of Phantom tumour and 2 of 10 of Phantom diagnosis." in methods
    assert "2 val and 10 test, of whom 8 count): each row (pre-trained and scratch) was trained once with" in methods
    assert "No pre-training has seen" not in methods
    assert "| pre-trained | 8 | 1 |" in table
    leaks = (workspace / "tables" / "blobs-diagnosis.leaks.md").read_text()
    assert "| row | n | AUROC without them | n | AUROC with them |" in leaks
    assert "| pre-trained | 8 |" in leaks
    assert "were in the pre-training, which has seen their images. The numbers without them count." in leaks
    assert "sub-10" not in leaks
    named = (workspace / "tables" / "blobs-diagnosis.leaks.csv").read_text()
    assert named.splitlines()[1:] == ["blobs,sub-10,the same id", "blobs,sub-11,the same id"]
    assert "subjects that the pre-training has seen" in Path(found["report"]).read_text()


@pytest.fixture
def seen_elsewhere(workspace: Path) -> Iterator[None]:
    """A pre-training that has seen a test subject under another id, and a crosswalk that says so."""
    path = workspace / "trainings" / "tiny" / "selection.parquet"
    before = read_selection(path)
    other = SelectedCase(dataset="elsewhere", row=0, case="x", subject="x", digest="x", role="train")
    write_selection(path, [*before, other])
    (workspace / "crosswalks").mkdir()
    lines = f"person,dataset,subject\np,elsewhere,x\np,{DATASET},sub-13\n"
    (workspace / "crosswalks" / "ids.csv").write_text(lines)
    yield
    write_selection(path, before)
    (workspace / "crosswalks" / "ids.csv").unlink()


@pytest.fixture
def copied(workspace: Path) -> Iterator[None]:
    """A pre-training of another store that has seen a test subject under another id, and kept its fingerprint."""
    url, tiny = str(workspace / "store.zarr"), workspace / "trainings" / "tiny"
    table = open_store(url).cases()
    prints = draw_prints(CASES)
    column = table.schema.get_field_index("fingerprint")
    open_writer(url).publish(table.set_column(column, "fingerprint", pa.array(prints.tolist())), "0")
    there = pa.table({"dataset": ["there"], "subject": ["x"], "case": ["x"], "row": [0], "digest": ["x"]})
    there = there.append_column("status", pa.array(["stored"])).append_column("modalities", pa.array([["t1"]]))
    one = there.append_column("fingerprint", pa.array([prints[14].tolist()]))
    before, other = read_selection(tiny / "selection.parquet"), {"case": "x", "subject": "x", "digest": "x"}
    seen = SelectedCase(dataset="there", row=0, role="train", **other)
    keep_fingerprints(tiny, SimpleNamespace(cases=lambda: one, spec=open_store(url).spec), [seen])  # type: ignore[arg-type]
    write_selection(tiny / "selection.parquet", [*before, seen])
    yield
    write_selection(tiny / "selection.parquet", before)
    (tiny / FILE).unlink(missing_ok=True)


def test_who_was_seen_in_another_store_is_found_by_looks(
    workspace: Path, registered: dict[str, list[str]], copied: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in (fine_tune, score):
        monkeypatch.setattr(f"flows.evaluate.{task.fn.__name__}", task.fn)  # without a server
    evaluate.fn(params(workspace, seeds=1, benchmarks=["blobs-diagnosis"]))
    named = (workspace / "tables" / "blobs-diagnosis.leaks.csv").read_text()
    assert named.splitlines()[1:] == ["blobs,sub-14,looks like there/x"]
    assert "copies under other ids" not in (workspace / "tables" / "blobs-diagnosis.md").read_text()
    (workspace / "trainings" / "tiny" / FILE).unlink()
    evaluate.fn(params(workspace, seeds=1, benchmarks=["blobs-diagnosis"]))
    table = (workspace / "tables" / "blobs-diagnosis.md").read_text()
    assert "- pre-trained: 1 of 11 subjects that it was trained on are not in this store, and no fingerprints" in table
    assert "copies under other ids would not be noticed." in (workspace / "report" / "methods.md").read_text()
    assert not (workspace / "tables" / "blobs-diagnosis.leaks.csv").exists()


@pytest.fixture
def without_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """For calls of `evaluate.fn`."""
    for task in (fine_tune, score):
        monkeypatch.setattr(f"flows.evaluate.{task.fn.__name__}", task.fn)


def test_a_crosswalk_tells_who_was_seen_under_another_id(
    workspace: Path, registered: dict[str, list[str]], seen_elsewhere: None, without_server: None
) -> None:
    found = evaluate.fn(params(workspace, seeds=1, benchmarks=["blobs-diagnosis"]))
    table = (workspace / "tables" / "blobs-diagnosis.md").read_text()
    assert "1 of 10 test subjects were in the pre-training, by id, by looks or by crosswalk: left out of every" in table
    assert "| pre-trained | 9 | 1 |" in table
    named = (workspace / "tables" / "blobs-diagnosis.leaks.csv").read_text()
    assert named.splitlines()[1:] == ["blobs,sub-13,the same person as elsewhere/x (crosswalk)"]
    assert "by tables of ids (digest" in (workspace / "report" / "methods.md").read_text()
    assert "crosswalks digest" in Path(found["report"]).read_text()


def test_a_pretraining_that_saw_all_test_subjects_is_refused(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]]
) -> None:
    before = read_selection(workspace / "trainings" / "tiny" / "selection.parquet")
    write_pretraining(workspace, list(range(20)))
    try:
        with pytest.raises(
            ScoreError, match=r"10 test subjects were in the pre-training, first blobs/sub-10, and none is left without"
        ):
            evaluate(params(workspace))
    finally:
        write_pretraining(workspace, [case.row for case in before])


def test_the_split_is_the_one_on_disk(workspace: Path) -> None:
    split, _ = read_split(workspace / "splits" / "default.parquet")
    assert (split["split"] == "test").sum() == 10


def test_names() -> None:
    assert run_name(EvaluateParams(pretrained="tiny", benchmarks=["adni", "vsseg"])) == "evaluate tiny on adni, vsseg"
    long = EvaluateParams(pretrained="tiny", benchmarks=["a", "b", "c", "d"])
    assert run_name(long) == "evaluate tiny on a, b, c and 1 more"
    several = EvaluateParams.model_validate({"pretrained": "tiny", "runs": [{"training": "mae"}], "benchmarks": ["a"]})
    assert run_name(several) == "evaluate tiny, mae on a"
    assert several.first == "pre-trained"


def test_the_form_says_bounds_in_words_and_refuses_the_rest() -> None:
    for name, field in EvaluateParams.model_json_schema()["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        EvaluateParams(pretrained="tiny", seed=1)
    with pytest.raises(ValidationError, match="less than or equal to 20"):
        EvaluateParams(pretrained="tiny", seeds=21)
    with pytest.raises(ValidationError, match="pattern"):
        EvaluateParams(pretrained="tiny", split="../x")


def test_a_pretraining_is_a_name_and_no_path() -> None:
    with pytest.raises(ValidationError, match="String should match pattern"):
        EvaluateParams(pretrained="../elsewhere")
    with pytest.raises(ValidationError, match="name a finished training under `pretrained`, or several under `runs`"):
        EvaluateParams()


def test_unknown_benchmarks_are_refused_before_any_work(workspace: Path, prefect_server: ServerInfo) -> None:
    with pytest.raises(KeyError, match="unknown benchmark 'nope'; known: phantom-tumour"):
        evaluate(params(workspace, benchmarks=["nope"]))


def test_a_third_row_with_template_mix_and_a_table_without_single_modalities(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def scored(
        cohort: Cohort, trainings: list[Finetuning], pretrained: Path, folder: Path, work: CaseMap
    ) -> tuple[pd.DataFrame, int]:
        asked.append(f"{cohort.benchmark.name} of {pretrained.name}")
        lines = [
            {"row": one.row, "seed": one.seed, "dropped": "t1", "filling": filling, "region": "WT"}
            | {"dataset": DATASET, "subject": case.subject, "case": case.case, "value": 0.5 + 0.01 * case.row}
            for one in trainings
            for filling in ("zero", "template")
            for case in cohort.of_role("test")
        ]
        return pd.DataFrame(lines), len(trainings)

    monkeypatch.setattr("flows.evaluate.score_missing", scored)
    more = {"benchmarks": ["blobs-tumour", "blobs-diagnosis"], "epochs": 2, "seeds": 1}
    found = evaluate(params(workspace, template_mix=True, missing_modalities=True, **more))
    assert found["trained"] == 3 + 2, "a benchmark with one modality has nothing to mix"
    assert asked == ["blobs-tumour of tiny"]
    table = (workspace / "tables" / "blobs-tumour.md").read_text()
    assert "| pre-trained+mix | 10 | 1 |" in table
    assert "Same optimiser steps and crops a step as the other rows" in table
    assert "also predicted without each one" in (workspace / "report" / "methods.md").read_text()
    assert "| pre-trained+mix | t1 | 10 | 0.645 [" in (workspace / "tables" / "blobs-tumour.missing.md").read_text()
    assert not (workspace / "tables" / "blobs-diagnosis.missing.md").exists()
    page = Path(found["report"]).read_text()
    assert "Phantom tumour without one modality" in page
    without = evaluate(params(workspace, template_mix=True, **more))
    assert without["trained"] == 0
    assert not (workspace / "tables" / "blobs-tumour.missing.md").exists()
    assert "without one modality" not in Path(without["report"]).read_text()


def test_several_pretrainings_and_networks_are_rows_of_one_table(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (TUMOUR.replace(metrics=("dice",), lesions=None), DIAGNOSIS.replace(metrics=("auroc",))):
        monkeypatch.setitem(BENCHMARKS, one.name, one)
    write_pretraining(workspace, [*range(8), 10], "mae", "mae_unet_tiny")
    runs = [{"training": "mae", "name": "MAE, U-Net"}, {"training": "tiny", "name": "BrainMVP"}]
    asked = params(
        workspace, pretrained="", runs=runs, networks=["dynunet"], benchmarks=["blobs-tumour", "blobs-diagnosis"],
        label_shares=[0.5], seeds=1,
    )  # fmt: skip
    found = evaluate(asked)
    rows = ["MAE, U-Net", "BrainMVP", "scratch", "scratch (uniformer)"]
    scores = pd.read_parquet(workspace / "scores.parquet")
    of_tumour = scores[scores["benchmark"] == "blobs-tumour"]
    assert list(dict.fromkeys(of_tumour["row"])) == [*rows, "scratch (dynunet)", "template overlap"]
    assert not (scores["subject"] == "sub-10").any(), "one of them has seen it, so it counts for none"
    tables = workspace / "tables"
    table = (tables / "blobs-tumour.md").read_text()
    for words in (
        "| BrainMVP | 9 | 1 |",
        "Difference: MAE, U-Net minus the row;",
        "p: paired bootstrap of MAE, U-Net against the row",
        "Networks: unet3d (MAE, U-Net, scratch); uniformer (BrainMVP, scratch (uniformer)); dynunet (scratch (dyn",
        "1 of 10 test subjects were in one of the pre-trainings",
    ):
        assert words in table
    assert 'blobs,sub-10,"MAE, U-Net: the same id"' in (tables / "blobs-tumour.leaks.csv").read_text()
    gains = (tables / "blobs-tumour.gains.md").read_text()
    assert "| MAE, U-Net | scratch |" in gains
    assert "| BrainMVP | scratch (uniformer) |" in gains
    assert "Left out: scratch (dynunet); these networks" in (tables / "blobs-diagnosis.md").read_text()
    labels = (tables / "blobs-diagnosis.labels.md").read_text()
    assert all(f"| 50 % | 4 | {row} |" in labels for row in rows)
    assert "| 100 % | 8 | BrainMVP | " in labels
    assert "MAE, U-Net - row" in labels
    methods = (workspace / "report" / "methods.md").read_text()
    assert "Row MAE, U-Net: A 3D U-Net with residual blocks was pre-trained with masked autoencoding" in methods
    assert "each row (MAE, U-Net, BrainMVP, scratch, scratch (uniformer) and scratch (dynunet)) was trained" in methods
    assert "Rows were compared with the row MAE, U-Net by paired bootstrap tests" in methods
    assert "scratch (uniformer) is a 3D UniFormer" in methods
    assert "Phantom tumour: what each pre-training gives" in Path(found["report"]).read_text()
    again = evaluate(asked)
    assert (again["trained"], again["scored"], again["tables"]) == (0, 0, found["tables"])


def test_fewer_labels_are_trained_scored_and_shown(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]]
) -> None:
    asked = params(workspace, benchmarks=["blobs-diagnosis"], label_shares=[0.5], seeds=1)
    found = evaluate(asked)
    assert (workspace / "trainings" / "blobs-diagnosis-labels50-scratch-seed0" / "done.json").exists()
    cases = read_selection(workspace / "trainings" / "blobs-diagnosis-labels50-scratch-seed0" / "selection.parquet")
    assert [sum(case.role == role for case in cases) for role in ("train", "val", "test")] == [4, 2, 10]
    table = (workspace / "tables" / "blobs-diagnosis.labels.md").read_text()
    assert "| 50 % | 4 | pre-trained |" in table
    assert "also trained on 50 % of the training subjects" in (workspace / "report" / "methods.md").read_text()
    assert "| 100 % | 8 | scratch |" in table
    assert "curve" in Path(found["report"]).read_text()
    assert (workspace / "tables" / "blobs-diagnosis.2.png").exists()
    again = evaluate(asked)
    assert (again["trained"], again["scored"]) == (0, 0)
    without = evaluate(params(workspace, benchmarks=["blobs-diagnosis"], seeds=1))
    assert not (workspace / "tables" / "blobs-diagnosis.labels.md").exists()
    assert "fewer labels" not in Path(without["report"]).read_text()


def test_native_scores_are_a_table_of_their_own(
    workspace: Path, prefect_server: ServerInfo, registered: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The label files lie on the stored grid here, so both tables must hold the same numbers."""
    data = open_store(str(workspace / "store.zarr")).dataset(DATASET)

    def file(_: SourceLabels, case: SelectedCase) -> SourceFile:
        path = tmp_path / f"{case.case}.nii.gz"
        if not path.exists():
            nib.save(
                nib.Nifti1Image(data.read_label(case.row, (0, 0, 0), EXTENT), data.case_info(case.row).affine), path
            )
        return SourceFile(modality="label", path=str(path), size_bytes=path.stat().st_size, etag="")

    only = {"benchmarks": ["blobs-tumour"], "seeds": 1}
    with monkeypatch.context() as patched:
        patched.setattr(
            "flows.evaluate.launch", lambda *_: pytest.fail("trained before the label files were looked for")
        )
        with pytest.raises(ScoreError, match=r"names no label file of it, so it has no native grid; evaluate without"):
            evaluate(params(workspace, native_scores=True, epochs=7, **only))
    monkeypatch.setattr(SourceLabels, "file", file)
    found = evaluate(params(workspace, native_scores=True, **only))
    assert set(found["tables"]) == {"blobs-tumour", "blobs-tumour-native"}
    scores = pd.read_parquet(workspace / "scores.parquet").set_index(["row", "case", "region", "metric"])["value"]
    names = pd.read_parquet(workspace / "scores.parquet")["benchmark"].to_numpy()
    stored, native = (scores[names == name].sort_index() for name in ("blobs-tumour", "blobs-tumour-native"))
    assert len(stored) == len(native) > 0
    np.testing.assert_allclose(native, stored.reindex(native.index))
    text = (workspace / "tables" / "blobs-tumour-native.md").read_text()
    assert "Scored on the grid of each label file, against the label as it was drawn" in text
    assert "on the grids of the label files" in Path(found["report"]).read_text()
    assert "also scored on the grids of their label files" in (workspace / "report" / "methods.md").read_text()
    evaluate(params(workspace, **only))
    assert not list((workspace / "tables").glob("blobs-tumour-native.*"))


@pytest.mark.parametrize("where", ["pool", "slurm"])
def test_every_lane_may_be_a_flow_run_or_a_job(
    workspace: Path, registered: dict[str, list[str]], without_server: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    lanes: list[list[str]] = []

    def started(folders: list[Path], world_size: int, on_progress: Any, **more: Any) -> None:
        settings = more.get("settings")
        assert more.get("nodes", settings and settings.nodes) == 1
        lanes.append([folder.name for folder in folders])
        play(folders, world_size, on_progress)

    def scored(*_: Any) -> None:
        raise InterruptedError("trained, and that is enough here")

    monkeypatch.setenv("BRAINLOOM_LAUNCH", "pool")  # of pre-trainings, as the nodes
    monkeypatch.setenv("BRAINLOOM_NODES", "4")
    monkeypatch.setenv("BRAINLOOM_SLURM_TIME", "1:00:00")
    monkeypatch.setattr("flows.launching.launch_in_pool", started)
    monkeypatch.setattr("flows.launching.launch_slurm", started)
    monkeypatch.setattr("flows.evaluate._score_all", scored)
    new = {"epochs": 8 if where == "pool" else 9}  # trained by no other test
    with pytest.raises(InterruptedError, match="trained"):
        evaluate.fn(params(workspace, benchmarks=["blobs-diagnosis"], seeds=1, launch=where, **new))
    assert sorted(lanes) == [["blobs-diagnosis-pre-trained-seed0"], ["blobs-diagnosis-scratch-seed0"]]


def test_predictions_of_others_are_rows_like_the_others(
    workspace: Path, registered: dict[str, list[str]], without_server: None, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setitem(BENCHMARKS, TUMOUR.name, TUMOUR.replace(metrics=("dice",), lesions=None))
    data, rng = open_store(str(workspace / "store.zarr")).dataset(DATASET), np.random.default_rng(0)
    for row in range(10, 20):
        label = data.read_label(row, (0, 0, 0), EXTENT)
        worse = np.where(rng.random(label.shape) < 0.02, 2, label).astype(np.uint8)
        info = data.case_info(row)
        nib.save(nib.Nifti1Image(worse, info.affine), tmp_path / f"{info.subject}.nii.gz")
    theirs = {"name": "nnU-Net", "benchmark": "blobs-tumour", "folder": str(tmp_path)}
    asked = params(workspace, benchmarks=["blobs-tumour"], seeds=1, predictions=[theirs])
    ranked: dict[str, str] = {}
    monkeypatch.setattr("flows.evaluate_report.leaderboard", lambda _s, _b, kinds, *_: ranked.update(kinds))
    found = evaluate.fn(asked)
    table = (workspace / "tables" / "blobs-tumour.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| nnU-Net (predictions of others) | 10 | – |")]
    assert float(line.split(" | ")[-1].strip(" |")) < 0.05, "tested against the first row"
    assert "- Predictions of others: nnU-Net. Label maps read from files: how, on whom and how long" in table
    assert ranked["nnU-Net"] == "others", "the leaderboard marks them"
    lines = pd.read_csv(workspace / "tables" / "blobs-tumour.csv").query("row == 'nnU-Net'")
    assert set(lines["kind"]) == {"others"}
    assert (lines["n"] == 10).all()
    assert lines.query("metric == 'dice' and region == 'mean'")["rank"].notna().all()
    page = Path(found["report"]).read_text()
    assert "overlays of Phantom tumour, nnU-Net" in page
    methods = (workspace / "report" / "methods.md").read_text()
    assert "Phantom tumour: the row nnU-Net has label maps that others predicted, read from files; how" in methods
    again = evaluate.fn(asked)
    assert (again["trained"], again["scored"], again["tables"]) == (0, 0, found["tables"])
    nib.save(nib.Nifti1Image(np.zeros(EXTENT, np.uint8), info.affine), tmp_path / f"{info.subject}.nii.gz")
    assert evaluate.fn(asked)["scored"] == 1
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), info.affine), tmp_path / f"{info.subject}.nii.gz")
    with pytest.raises(ScoreError, match=rf"'nnU-Net' for .*{info.subject}\.nii\.gz lies on another grid \(4 x 4 x 4"):
        check_given(asked)
    (tmp_path / f"{info.subject}.nii.gz").unlink()
    monkeypatch.setattr("flows.evaluate.launch", lambda *_: pytest.fail("trained before the files were looked at"))
    with pytest.raises(ScoreError, match=rf"predictions 'nnU-Net' for .*no label map for 1 of 10 .* {info.case} of"):
        evaluate.fn(asked.model_copy(update={"epochs": 7}))


def test_the_example_of_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    found = EvaluateParams.model_validate(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]))
    assert found.template_mix
    assert set(found.benchmarks) <= set(BENCHMARKS)
