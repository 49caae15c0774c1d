"""Scores in long form: what is computed for a case, bad predictions and labels, and what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.prediction_files import place_of
from models.records import SelectedCase
from models.scoring import dice
from models.store import StoredCase
from tasks.benchmarks import BENCHMARKS
from tasks.predictions import predictions_digest, read_probabilities, read_regions
from tasks.scores import (
    COLUMNS,
    RowKey,
    ScoreError,
    inputs_digest,
    kept_scores,
    prediction_scores,
    probability_scores,
    region_masks,
    score_case,
    scoring_seconds,
    segmentation_scores,
)

MM = (3.0, 3.0, 3.0)
TUMOUR = BENCHMARKS["phantom-tumour"]
DIAGNOSIS = BENCHMARKS["phantom-diagnosis"]
KEY = RowKey("phantom-tumour", "scratch", 0)


def case(number: int, target: str = "") -> SelectedCase:
    name = f"sub-{number}"
    return SelectedCase(
        dataset="phantom-bids", row=number, case=name, subject=name, digest="d", role="test", target=target
    )


def cube(start: int, stop: int, shape: int = 16) -> np.ndarray:
    mask = np.zeros((shape,) * 3, dtype=bool)
    mask[start:stop, 4:8, 4:8] = True
    return mask


def test_dice_of_shifted_cubes() -> None:
    # 4 voxels long, shifted by 2: half overlaps.
    assert dice(cube(4, 8)[None], cube(6, 10)[None]) == [0.5]


def test_regions_follow_the_scheme() -> None:
    label = np.array([0, 1, 2, 3]).reshape(4, 1, 1)
    et, tc, wt = region_masks(label, TUMOUR.regions, TUMOUR.scheme)[:, :, 0, 0].tolist()
    assert et == [False, False, False, True]
    assert tc == [False, True, False, True]
    assert wt == [False, True, True, True]


def test_a_perfect_prediction_scores_one() -> None:
    label = cube(4, 8).astype(np.uint8) * 3
    masks = region_masks(label, TUMOUR.regions, TUMOUR.scheme)
    entries = score_case(masks, (label, MM), TUMOUR, "sub-1")
    assert {e["metric"] for e in entries} == set(TUMOUR.metrics)
    assert [e["value"] for e in entries if e["metric"] == "dice"] == [1.0, 1.0, 1.0]
    assert [e["value"] for e in entries if e["metric"] == "hd95"] == [0.0, 0.0, 0.0]
    assert [e["value"] for e in entries if e["metric"] == "lesion_f1"] == [1.0, 1.0, 1.0]


def test_where_a_case_lies_in_its_volume_changes_nothing() -> None:
    label = cube(4, 8).astype(np.uint8) * 2
    predicted = region_masks(cube(6, 10).astype(np.uint8) * 2, TUMOUR.regions, TUMOUR.scheme)
    padded = np.pad(predicted, ((0, 0), (20, 5), (9, 9), (0, 30)))
    first = score_case(predicted, (label, MM), TUMOUR, "a")
    second = score_case(padded, (np.pad(label, ((20, 5), (9, 9), (0, 30))), MM), TUMOUR, "a")
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(second))
    values = {(e["metric"], e["region"]): e["value"] for e in first}
    assert values["dice", "WT"] == 0.5
    assert values["hd95", "WT"] == 6.0, "two voxels of 3 mm"
    assert values["volume_error_ml", "WT"] == 0.0


def test_an_empty_case_is_scored() -> None:
    nothing = np.zeros((16, 16, 16), np.uint8)
    entries = score_case(np.zeros((3, 16, 16, 16)), (nothing, MM), TUMOUR, "a")
    assert {e["note"] for e in entries} == {"", "both empty"}


@pytest.mark.parametrize(
    ("prediction", "label_value", "text"),
    [
        (np.zeros((3, 8, 8, 8)), 3, r"case sub-1: the prediction has shape \(3, 8, 8, 8\), .* needs \(3, 16, 16, 16\)"),
        (np.zeros((2, 16, 16, 16)), 3, r"needs \(3, 16, 16, 16\) \(regions, x, y, z on the grid of the label\)"),
        (np.full((3, 16, 16, 16), np.nan), 3, "case sub-1: the prediction has NaN or infinite values"),
        (np.full((3, 16, 16, 16), 0.4), 3, "case sub-1: the prediction has values other than 0 and 1; threshold it"),
        (np.zeros((3, 16, 16, 16)), 4, r"case sub-1: label values \[4\] are outside scheme 'brats2023'"),
    ],
)
def test_bad_predictions_and_labels_are_refused(prediction: np.ndarray, label_value: int, text: str) -> None:
    with pytest.raises(ScoreError, match=text):
        score_case(prediction, (cube(4, 8).astype(np.uint8) * label_value, MM), TUMOUR, "sub-1")


def test_long_form_of_a_segmentation() -> None:
    label = cube(4, 8).astype(np.uint8) * 2
    frame = segmentation_scores(
        KEY, TUMOUR, [case(1)], lambda _: np.zeros((3, 16, 16, 16), np.uint8), lambda _: (label, MM)
    )
    lines = frame.set_index(["metric", "region"])
    assert lines.loc[("dice", "WT"), "value"] == 0.0
    assert lines.loc[("dice", "ET"), "value"] == 1.0
    assert lines.loc[("hd95", "ET"), "note"] == "both empty"
    assert lines.loc[("hd95", "WT"), "note"] == "prediction empty"


def read_prediction(case: SelectedCase) -> np.ndarray:
    return np.stack([cube(4, 8 + case.row)] * 3)


def test_kept_scores_say_how_long_they_took(tmp_path: Path) -> None:
    label = cube(4, 8).astype(np.uint8) * 3
    path = tmp_path / "a.parquet"
    frame, _ = kept_scores(
        path, "x", lambda: segmentation_scores(KEY, TUMOUR, [case(1)], read_prediction, lambda _: (label, MM))
    )
    took = scoring_seconds(path)
    assert took is not None
    assert took >= 0
    kept_scores(path, "x", lambda: frame)
    assert scoring_seconds(path) == took, "read back, not computed again"
    assert scoring_seconds(tmp_path / "absent.parquet") is None


def test_probabilities_keep_case_class_and_target() -> None:
    cases = [case(1, "control"), case(2, "patient")]
    key = RowKey("phantom-diagnosis", "scratch", 0)
    frame = probability_scores(key, DIAGNOSIS, cases, np.array([[0.8, 0.2], [0.3, 0.7]]))
    assert frame["region"].tolist() == ["control", "patient"] * 2
    assert frame["target"].tolist() == ["control", "control", "patient", "patient"]
    with pytest.raises(
        ScoreError, match=r"diagnosis, row 'scratch', seed 0, case sub-1: probabilities \[nan, 1.0\] are"
    ):
        probability_scores(key, DIAGNOSIS, cases, np.array([[np.nan, 1.0], [0.3, 0.7]]))
    with pytest.raises(ScoreError, match=r"probabilities have shape \(1, 2\), need \(2, 2\)"):
        probability_scores(key, DIAGNOSIS, cases, np.array([[0.5, 0.5]]))
    with pytest.raises(ScoreError, match=r"target 'ill' is not among the classes \('control', 'patient'\)"):
        probability_scores(key, DIAGNOSIS, [case(1, "ill")], np.array([[0.5, 0.5]]))


def test_predicted_numbers_keep_case_and_target() -> None:
    key = RowKey("phantom-anat-age", "AnatCL global", 1)
    frame = prediction_scores(key, [case(1, "40.5"), case(2, "61")], np.array([38.0, 60.5]))
    assert tuple(frame.columns) == COLUMNS
    assert frame[["region", "metric"]].drop_duplicates().to_numpy().tolist() == [["", "prediction"]]
    assert frame[["case", "value", "target"]].to_numpy().tolist() == [["sub-1", 38.0, "40.5"], ["sub-2", 60.5, "61"]]
    with pytest.raises(ScoreError, match=r"phantom-anat-age, row 'AnatCL global': a prediction is not finite; the enc"):
        prediction_scores(key, [case(1, "40.5")], np.array([np.nan]))


def stored(edge: int) -> StoredCase:
    present, extent = (True,) * 4, (edge, edge, edge)
    return StoredCase(
        "phantom-bids", 1, "sub-1", "sub-1", "", present, extent, (0, 0, 0), np.eye(4), "d", True, "brats2023"
    )  # fmt: skip


def table_line(edge: int) -> dict[str, object]:
    return {"dataset": "phantom-bids", "case": "sub-1", "file": "sub-1.npz", **place_of(stored(edge))}


def test_predictions_are_read_and_missing_ones_named(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    np.savez(folder / "sub-1.npz", regions=np.ones((3, 2, 2, 2), np.uint8))
    line = table_line(2) | {"prob_control": 0.25, "prob_patient": 0.75}
    pd.DataFrame([line]).to_parquet(folder / "predictions.parquet")
    assert read_regions(tmp_path, case(1), stored(2)).shape == (3, 2, 2, 2)
    with pytest.raises(ScoreError, match=r"no prediction for 1 test cases, first \('phantom-bids', 'sub-2'\)"):
        read_regions(tmp_path, case(2), stored(2))
    assert read_probabilities(tmp_path, [case(1)], DIAGNOSIS.classes).tolist() == [[0.25, 0.75]]
    other = case(1).replace(digest="another")
    with pytest.raises(ScoreError, match=r"sub-1 was predicted as digest d, asked is the case with digest another: an"):
        read_probabilities(tmp_path, [other], DIAGNOSIS.classes)
    with pytest.raises(ScoreError, match=r"lacks the columns \['prob_MCI'\]; delete it and run evaluate again"):
        read_probabilities(tmp_path, [case(1)], ("control", "MCI"))
    (folder / "sub-1.npz").unlink()
    with pytest.raises(ScoreError, match=r"case sub-1: .*sub-1.npz is missing; run evaluate again: it is predicted"):
        read_regions(tmp_path, case(1), stored(2))
    with pytest.raises(ScoreError, match=r"predictions.parquet is missing; run evaluate again: it is predicted again"):
        read_probabilities(tmp_path / "other", [case(1)], DIAGNOSIS.classes)


def test_damaged_predictions_are_named_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "t" / "predictions"
    folder.mkdir(parents=True)
    np.savez(folder / "sub-1.npz", regions=np.ones((3, 4, 4, 4), np.uint8))
    lines = pd.DataFrame([table_line(4)])
    lines.to_parquet(folder / "predictions.parquet")
    whole = (folder / "sub-1.npz").read_bytes()
    remedy = r"delete it and run evaluate again: what is missing is predicted again"
    for content in (whole[:-40], whole.replace(bytes([1, 1, 1]), bytes([1, 2, 1]))):
        (folder / "sub-1.npz").write_bytes(content)
        with pytest.raises(ScoreError, match=rf"case sub-1: .*sub-1\.npz cannot be read .*; {remedy}"):
            read_regions(tmp_path / "t", case(1), stored(4))
    np.savez(folder / "sub-1.npz", masks=np.ones(3))
    with pytest.raises(ScoreError, match=rf"sub-1\.npz has no array 'regions'; {remedy}"):
        read_regions(tmp_path / "t", case(1), stored(4))
    pd.concat([lines, lines]).to_parquet(folder / "predictions.parquet")
    with pytest.raises(ScoreError, match=rf"t: .* has two lines of case sub-1 of phantom-bids; {remedy}"):
        read_regions(tmp_path / "t", case(1), stored(4))
    (folder / "predictions.parquet").write_bytes(b"no table")
    with pytest.raises(ScoreError, match=rf"t: .*predictions\.parquet cannot be read \(.*\); {remedy}"):
        read_probabilities(tmp_path / "t", [case(1)], DIAGNOSIS.classes)


@pytest.mark.parametrize("kept", ["cut", "garbage"])
def test_kept_scores_that_cannot_be_read_are_computed_again(tmp_path: Path, kept: str) -> None:
    path = tmp_path / "scores.parquet"
    frame = prediction_scores(RowKey("b", "r", 0), [case(1, "40")], np.array([38.0]))
    kept_scores(path, "x", lambda: frame)
    path.write_bytes(path.read_bytes()[:-20] if kept == "cut" else b"garbage")
    assert kept_scores(path, "x", lambda: frame)[1]
    assert not kept_scores(path, "x", lambda: frame)[1]


def test_unchanged_scores_are_not_computed_again(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    (folder / "a.npz").write_bytes(b"1")
    first = inputs_digest(KEY, TUMOUR, [case(1)], predictions_digest(tmp_path))
    calls: list[int] = []

    def compute() -> pd.DataFrame:
        calls.append(1)
        masks = np.zeros((3, 16, 16, 16), np.uint8)
        return segmentation_scores(KEY, TUMOUR, [case(1)], lambda _: masks, lambda _: (masks[0], MM))

    path = tmp_path / "scores.parquet"
    made, fresh = kept_scores(path, first, compute)
    again, repeated = kept_scores(path, first, compute)
    assert (fresh, repeated, len(calls)) == (True, False, 1)
    pd.testing.assert_frame_equal(made, again)
    (folder / "a.npz").write_bytes(b"2")
    second = inputs_digest(KEY, TUMOUR, [case(1)], predictions_digest(tmp_path))
    assert second != first
    assert kept_scores(path, second, compute)[1]


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ScoreError, match="nothing to score: the test set has no case"):
        segmentation_scores(KEY, TUMOUR, [], lambda _: np.zeros(1), lambda _: (np.zeros(1), MM))
