"""Baselines with known answers: chance, a planted effect, an overlap that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from classifications import sklearn_metrics

from tasks.baselines import (
    AGE_SEX_VOLUME,
    TemplatePrior,
    age_sex_volume_features,
    fit_template_prior,
    foreground_ml,
    logistic,
    majority,
)

CLASSES = ("control", "patient")


def test_majority_gives_everybody_the_training_shares() -> None:
    found = majority(["control"] * 3 + ["patient"], CLASSES, 4)
    assert found.tolist() == [[0.75, 0.25]] * 4
    assert sklearn_metrics(np.array([0, 1, 0, 1]), found)["auroc"] == 0.5


def test_a_class_absent_from_training_is_an_error() -> None:
    text = r"class 'patient' is absent from the training role \(2 cases\); make another split"
    with pytest.raises(ValueError, match=f"baseline majority: {text}"):
        majority(["control"] * 2, CLASSES, 1)
    with pytest.raises(ValueError, match=text):
        logistic(np.zeros((2, 1)), ["control"] * 2, np.zeros((1, 1)), CLASSES, AGE_SEX_VOLUME)


def test_volume_is_in_millilitres() -> None:
    image = np.zeros((2, 10, 10, 10), np.float32)
    image[0, :5] = 1.0
    image[1, 4:6] = 1.0
    assert foreground_ml(image, 3.0) == pytest.approx(600 * 27 / 1000)


def test_features_of_people() -> None:
    people = pd.DataFrame({"age": [60, "n/a", None], "sex": ["F", "m", "O"], "volume_ml": [1200.0, 1300.0, 1400.0]})
    found = age_sex_volume_features(people)
    np.testing.assert_array_equal(found, [[60, 1, 1200], [np.nan, 0, 1300], [np.nan, np.nan, 1400]])
    assert np.isnan(age_sex_volume_features(people[["volume_ml"]])[:, :2]).all()


def test_logistic_regression_finds_a_planted_effect_despite_missing_values() -> None:
    rng = np.random.default_rng(0)
    target = np.arange(200) % 2
    features = np.column_stack([rng.normal(size=200) + 2 * target, rng.normal(size=200) * 1000, np.full(200, np.nan)])
    features[::17, 0] = np.nan
    names = [CLASSES[t] for t in target]
    found = logistic(features[:100], names[:100], features[100:], CLASSES, "planted")
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert sklearn_metrics(target[100:], found)["auroc"] > 0.85


def test_features_that_are_all_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match="baseline ages: every feature is missing in the training role"):
        logistic(np.full((2, 1), np.nan), list(CLASSES), np.zeros((1, 1)), CLASSES, "ages")


def masks(start: int, stop: int) -> np.ndarray:
    found = np.zeros((1, 6, 6, 6), dtype=bool)
    found[0, start:stop, 2:4, 2:4] = True
    return found


def test_prior_is_the_mean_mask_in_the_template_grid() -> None:
    # The same lesion in the template: one case starts at the grid's corner, the other is shifted by (2, 1, 0).
    cases = [(masks(2, 4), (0, 0, 0)), (np.roll(masks(2, 4), (-2, -1, 0), (1, 2, 3)), (2, 1, 0))]
    prior = fit_template_prior(lambda: cases, (8, 8, 8))
    assert prior.probability.max() == 1.0
    assert (prior.probability > 0).sum() == 8
    np.testing.assert_array_equal(prior.predict((0, 0, 0), (6, 6, 6)), masks(2, 4))
    shifted = prior.predict((2, 1, 0), (6, 6, 6))
    np.testing.assert_array_equal(shifted[0, 0:2, 1:3, 2:4], 1)


def test_threshold_has_the_highest_mean_dice() -> None:
    # Core in all four cases, rim in one: leaving out the rim is better on average.
    cases = [(masks(2, 3), (0, 0, 0))] * 3 + [(masks(1, 3), (0, 0, 0))]
    prior = fit_template_prior(lambda: cases, (6, 6, 6))
    assert 0.25 <= prior.thresholds[0] < 1.0
    np.testing.assert_array_equal(prior.predict((0, 0, 0), (6, 6, 6)), masks(2, 3))


def test_prediction_outside_the_grid_is_empty() -> None:
    prior = TemplatePrior(np.ones((1, 4, 4, 4), np.float32), (0.5,))
    found = prior.predict((-2, 0, 3), (4, 4, 4))
    assert found.shape == (1, 4, 4, 4)
    assert found[0, :2].sum() == 0
    assert found[0, 2:, :, :1].all()
    assert prior.predict((9, 9, 9), (2, 2, 2)).sum() == 0


def test_no_training_label_is_an_error() -> None:
    with pytest.raises(ValueError, match="baseline template overlap: no training case with a label"):
        fit_template_prior(list, (4, 4, 4))
