"""Lesions against hand-made answers, and all scores against the official BraTS evaluations on kept phantoms."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from brats_reference import GOLDEN, PHANTOMS

from models.scoring import dice
from tasks.benchmarks import LesionRule
from tasks.label_schemes import LABEL_SCHEMES
from tasks.metrics_lesions import Lesions, compare_lesions
from tasks.metrics_masks import region_scores
from tasks.metrics_surface import surface_distances

RULES = {"BraTS-PED": LesionRule(dilation=3, min_volume_mm3=50), "BraTS-MET": LesionRule(dilation=1, min_volume_mm3=2)}
REGIONS = {region.name: region.labels for region in LABEL_SCHEMES["brats2023"]}
EXPECTED: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))["phantoms"]
MANY_TO_MANY = {"one prediction over two lesions", "two lesions close together"}
"""Phantoms with a predicted lesion over two true ones or the reverse: the official matching gives each one partner."""


def line(*spans: tuple[int, int], length: int = 40) -> np.ndarray:
    mask = np.zeros((length, 5, 5), bool)
    for start, stop in spans:
        mask[start:stop, 1:4, 1:4] = True
    return mask


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("challenge", RULES)
@pytest.mark.parametrize("name", PHANTOMS)
def test_lesion_wise_scores_equal_those_of_brats_2023(name: str, challenge: str, region: str) -> None:
    target, prediction = (np.isin(label, REGIONS[region]) for label in PHANTOMS[name])
    found = compare_lesions(prediction, target, RULES[challenge], voxel_mm3=1.0)
    expected = EXPECTED[name][challenge][region]
    assert found.dice == pytest.approx(expected["dice"], abs=1e-12)
    missed = len(found.overlaps) - found.found
    assert (found.found, missed, found.false) == (expected["tp"], expected["fn"], expected["fp"])


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", PHANTOMS)
def test_overlap_distances_and_detection_equal_the_official_package(name: str, region: str) -> None:
    target, prediction = (np.isin(label, REGIONS[region]) for label in PHANTOMS[name])
    expected = EXPECTED[name]["official"][region]
    assert dice(prediction[None], target[None])[0] == pytest.approx(_or(expected["global_bin_dsc"], 1.0), abs=1e-6)
    if (target & prediction).any():  # without a common voxel the official package answers inf and 0
        found = surface_distances(prediction, target, (1, 1, 1))
        assert found.hd95_pooled == pytest.approx(expected["global_bin_hd95"]), "the official HD95 is the pooled form"
        # The official NSD is the mean over the two directions, at half a voxel; ours counts all voxels of both.
        shares = [float((side <= 0.5).mean()) for side in (found.to_target, found.to_prediction)]
        assert np.mean(shares) == pytest.approx(expected["global_bin_nsd"])
    if name not in MANY_TO_MANY:
        lesions = compare_lesions(prediction, target, LesionRule(), voxel_mm3=1.0)
        assert (lesions.found, lesions.false) == (expected["tp"], expected["fp"])
        assert lesions.f1 == pytest.approx(_or(expected["rq"], lesions.f1))


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def test_a_phantom_of_each_kind_is_kept() -> None:
    assert set(EXPECTED) == set(PHANTOMS)


def test_found_missed_and_false() -> None:
    found = compare_lesions(line((2, 6), (20, 24)), line((2, 6), (10, 14)), LesionRule(), 1.0)
    assert found == Lesions(overlaps=(1.0, 0.0), found=1, false=1)
    assert (found.sensitivity, found.f1) == (0.5, 0.5)
    assert found.dice == pytest.approx(1 / 3)


def test_dilation_joins_lesions_and_lets_a_near_prediction_count() -> None:
    target = line((2, 6), (8, 12))
    assert len(compare_lesions(target, target, LesionRule(), 1.0).overlaps) == 2
    joined = compare_lesions(target, target, LesionRule(dilation=1), 1.0)
    assert joined == Lesions(overlaps=(1.0,), found=1, false=0)
    near = compare_lesions(line((13, 16)), line((8, 12)), LesionRule(dilation=2), 1.0)
    assert near == Lesions(overlaps=(0.0,), found=1, false=0)


def test_small_lesions_do_not_count_but_keep_their_predictions_from_being_false() -> None:
    target = line((2, 10), (20, 21))
    rule = LesionRule(min_volume_mm3=9)
    assert compare_lesions(target, target, rule, voxel_mm3=1.0) == Lesions((1.0,), 1, 0)
    assert compare_lesions(target, target, rule, voxel_mm3=2.0) == Lesions((1.0, 1.0), 2, 0)


def test_corners_touch() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 1, 1] = mask[2, 2, 2] = True
    assert len(compare_lesions(mask, mask, LesionRule(), 1.0).overlaps) == 1


@pytest.mark.parametrize(
    ("target", "prediction", "expected"),
    [
        (False, False, {"nsd": 1, "lesion_dice": 1, "lesion_f1": 1, "volume_error": 0, "volume_error_ml": 0}),
        (False, True, {"nsd": 0, "lesion_dice": 0, "lesion_f1": 0, "false_lesions": 1, "volume_error_ml": 0.036 * 6}),
        (True, False, {"nsd": 0, "lesion_dice": 0, "lesion_f1": 0, "volume_error": 1, "lesion_sensitivity": 0}),
    ],
)
def test_rules_for_empty_masks(target: bool, prediction: bool, expected: dict[str, float]) -> None:
    masks = [line((2, 6)) & on for on in (prediction, target)]
    found = {metric: (value, note) for metric, value, note in region_scores(*masks, (1, 2, 3), 1.0, LesionRule())}
    for metric, value in expected.items():
        assert found[metric][0] == pytest.approx(value), metric
    note = {(False, False): "both empty", (False, True): "target empty"}.get((target, prediction), "prediction empty")
    for metric, (value, why) in found.items():
        assert np.isnan(value) == bool(why), metric
        assert why in ("", note)
    assert np.isnan(found["hd95"][0])
    assert np.isnan(found["lesion_sensitivity"][0]) != target


def test_without_a_rule_no_lesions_are_counted() -> None:
    mask = line((2, 6))
    metrics = [metric for metric, _, _ in region_scores(mask, mask, (1, 1, 1), 1.0, None)]
    assert metrics == ["hd95", "hd95_pooled", "nsd", "volume_error_ml", "volume_error"]
    small = {m: (v, n) for m, v, n in region_scores(mask, mask, (1, 1, 1), 1.0, LesionRule(min_volume_mm3=1e3))}
    assert small["lesion_sensitivity"][1] == "no lesion counts"
