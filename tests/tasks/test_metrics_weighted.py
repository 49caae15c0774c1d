"""Weighted forms against scikit-learn on repeated subjects, ties and absent classes; reliability curves."""

from __future__ import annotations

import numpy as np
import pytest
from classifications import simulated, sklearn_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from tasks.benchmarks import CLASSIFICATION_METRICS
from tasks.metrics_weighted import CLASSIFICATION_FORMS, classification_metric, reliability
from tasks.statistics import draw_subjects


def score(name: str, target: np.ndarray, probabilities: np.ndarray) -> float:
    metric = classification_metric(name, np.arange(len(target)), target[None], probabilities[None])
    return float(metric(np.ones((1, len(target))))[0])


@pytest.mark.parametrize("classes", [2, 3])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_weighted_forms_equal_scikit_learn_on_repeated_subjects(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target, probabilities = simulated(rng, 24, classes=classes)
    probabilities = np.round(probabilities, 1) + 1e-3  # ties
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    weights = draw_subjects(24, 3, seed)
    arrays = (np.arange(24), target[None], probabilities[None])
    found = {name: classification_metric(name, *arrays)(weights) for name in CLASSIFICATION_FORMS}
    for k, row in enumerate(weights):
        index = np.repeat(np.arange(24), row.astype(int))
        for name, expected in sklearn_metrics(target[index], probabilities[index]).items():
            np.testing.assert_allclose(found[name][k], expected, atol=1e-12, err_msg=name)


def test_every_metric_of_a_classification_has_a_form() -> None:
    assert set(CLASSIFICATION_FORMS) == set(CLASSIFICATION_METRICS)
    with pytest.raises(KeyError, match="unknown classification metric 'kappa'; known: accuracy, balanced_accuracy"):
        classification_metric("kappa", np.arange(2), np.array([[0, 1]]), np.full((1, 2, 2), 0.5))


@pytest.mark.parametrize("name", ["auroc", "balanced_accuracy", "specificity"])
def test_a_class_absent_from_a_fold_gives_nan_not_a_guess(name: str) -> None:
    target, probabilities = np.array([1, 1, 1]), np.array([[0.2, 0.8]] * 3)
    assert np.isnan(score(name, target, probabilities))
    assert score("accuracy", target, probabilities) == 1.0
    assert score("auprc", target, probabilities) == 1.0
    assert np.isnan(score("auprc", 1 - target, probabilities))


def test_brier_and_ece_of_a_perfect_and_of_an_overconfident_row() -> None:
    target = np.array([0, 1] * 10)
    perfect = np.eye(2)[target]
    assert (score("brier", target, perfect), score("ece", target, perfect)) == (0, 0)
    sure = np.tile([0.0, 1.0], (20, 1))
    assert score("brier", target, sure) == score("ece", target, sure) == 0.5


def test_the_reliability_curve_is_scikit_learns_with_an_interval() -> None:
    target, probabilities = simulated(np.random.default_rng(1), 200)
    curve = reliability(target, probabilities)
    observed, mean = calibration_curve(target, probabilities[:, 1], n_bins=10)
    np.testing.assert_allclose(curve["observed"], observed)
    np.testing.assert_allclose(curve["mean_probability"], mean)
    assert curve["n"].sum() == 200
    assert (curve["observed_low"] <= curve["observed"]).all()
    assert (curve["observed"] <= curve["observed_high"]).all()
    gaps = (curve["observed"] - curve["mean_probability"]).abs() * curve["n"] / 200
    assert gaps.sum() == pytest.approx(score("ece", target, probabilities))


def test_three_classes_are_calibrated_by_the_most_probable_one() -> None:
    target, probabilities = simulated(np.random.default_rng(2), 60, classes=3)
    curve = reliability(target, probabilities)
    assert curve["low"].min() >= 0.3
    hits = (curve["observed"] * curve["n"]).sum()
    assert hits / 60 == pytest.approx(score("accuracy", target, probabilities))
