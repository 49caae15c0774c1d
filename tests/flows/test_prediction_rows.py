"""Predictions of others in forms and on the command line: what is refused, and what is handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from brainloom.cli_benchmark import benchmark_options
from flows.benchmark_params import BenchmarkParams
from flows.evaluate_params import EvaluateParams

ROW = {"name": "nnU-Net", "benchmark": "phantom-tumour", "folder": "there"}
TWO = ["phantom-tumour", "phantom-diagnosis"]


def params(*rows: dict[str, Any], **more: Any) -> EvaluateParams:
    return EvaluateParams(pretrained="tiny", benchmarks=TWO, predictions=list(rows), **more)


def test_the_folder_is_made_absolute_and_the_form_knows_segmentations_alone() -> None:
    (row,) = params(ROW).predictions
    assert (row.others.name, row.others.benchmark, row.others.folder) == (
        "nnU-Net",
        ROW["benchmark"],
        Path.cwd() / "there",
    )
    schema = EvaluateParams.model_json_schema()["$defs"]["PredictionRow"]["properties"]
    assert "phantom-tumour" in schema["benchmark"]["enum"]
    assert "phantom-diagnosis" not in schema["benchmark"]["enum"]
    assert "predictions" not in params().model_dump(), "digests of evaluations without any stay as they were"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"benchmark": "isles22"}, "predictions 'nnU-Net' are for 'isles22', which is not among `benchmarks`: add it"),
        (
            {"benchmark": "phantom-diagnosis"},
            "are for 'phantom-diagnosis', which is no segmentation; label maps are scored for",
        ),
        ({"name": "scratch (nnunet)"}, "starts as the names of rows from scratch do; call yours otherwise"),
        ({"name": "(scratch) dynunet"}, "starts as the names of rows from scratch do; call yours otherwise"),
        ({"name": "Native X"}, "'Native X' starts as what is kept of label_shares or native_scores; call yours"),
        ({"name": "labels10 X"}, "starts as what is kept of label_shares or native_scores; call yours otherwise"),
        ({"name": "template overlap"}, "is the name of a row that every table has; call yours otherwise"),
        ({"name": "Other"}, "two rows are called like 'Other'; names must differ in letters or digits"),
        ({"name": "=1"}, "begins as a formula of a spreadsheet does"),
    ],
)
def test_rows_that_cannot_be_are_refused(change: dict[str, str], text: str) -> None:
    runs = [{"training": "mae", "name": "other"}]
    with pytest.raises(ValidationError, match=text):
        EvaluateParams.model_validate({"runs": runs, "benchmarks": TWO, "predictions": [{**ROW, **change}]})


def test_one_name_may_stand_for_several_benchmarks() -> None:
    other = {**ROW, "benchmark": "phantom-stroke"}
    asked = EvaluateParams(pretrained="tiny", benchmarks=["phantom-tumour", "phantom-stroke"], predictions=[ROW, other])
    assert len(asked.predictions) == 2
    with pytest.raises(ValidationError, match="two rows are called like 'nnU-Net'"):
        params(ROW, ROW)


def test_predictions_beside_probes_alone_are_refused() -> None:
    asked = {"runs": [{"training": "mae"}], "benchmarks": ["openbhb-age"]}
    with pytest.raises(ValidationError, match="are for 'phantom-tumour', which is not among `benchmarks`: add it"):
        BenchmarkParams.model_validate({**asked, "predictions": [ROW]})
    with pytest.raises(ValidationError, match="are for 'openbhb-age', which is no segmentation"):
        BenchmarkParams.model_validate({**asked, "predictions": [{**ROW, "benchmark": "openbhb-age"}]})


def test_the_command_line_and_the_benchmark_hand_them_on() -> None:
    given = benchmark_options(None, ["mae"], TWO, None, None, None, ["nnU-Net = phantom-tumour:there"])
    assert given["predictions"] == [ROW]
    assert BenchmarkParams(**given).evaluate_params().predictions == params(ROW).predictions
    with pytest.raises(typer.BadParameter, match=r"--predictions 'nnU-Net=there' is not NAME=BENCHMARK:FOLDER, e\.g\."):
        benchmark_options(None, None, None, None, None, None, ["nnU-Net=there"])
