"""Intervals that cover, tests that hold their level, and rules for what cannot be computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.scores import classification_metrics
from tasks.statistics import (
    CLASSIFICATION_FORMS,
    bootstrap_interval,
    classification_metric,
    draw_subjects,
    expanded_alpha,
    holm,
    mean_metric,
    one_subject_points,
    paired_test,
)


def simulated(rng: np.random.Generator, n: int, shift: float = 1.0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    target = np.arange(n) % classes
    logits = rng.normal(size=(n, classes)) + shift * np.eye(classes)[target]
    probabilities = np.exp(logits)
    return target.astype(np.int64), probabilities / probabilities.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", CLASSIFICATION_FORMS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_weighted_forms_equal_scikit_learn_on_repeated_subjects(name: str, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target, probabilities = simulated(rng, 24, classes=classes)
    probabilities = np.round(probabilities, 1) + 1e-3  # ties
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    metric = classification_metric(name, np.arange(24), target[None], probabilities[None])
    weights = draw_subjects(24, 3, seed)
    for row, found in zip(weights, metric(weights), strict=True):
        index = np.repeat(np.arange(24), row.astype(int))
        expected = classification_metrics(target[index], probabilities[index])[name]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_seeds_are_averaged_inside_a_replicate() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((3, 20))
    weights = draw_subjects(20, 50)
    together = mean_metric(values)(weights)
    np.testing.assert_allclose(together, np.mean([mean_metric(v[None])(weights) for v in values], axis=0))
    np.testing.assert_allclose(mean_metric(values)(np.ones((1, 20)))[0], values.mean())


def test_undefined_values_are_left_out_of_the_mean() -> None:
    values = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
    assert mean_metric(values[:1])(np.ones((1, 3)))[0] == 2.0
    interval = bootstrap_interval(mean_metric(values[1:]), draw_subjects(3, 200))
    assert not np.isfinite(interval.estimate)
    assert "absent" in interval.note


def test_a_single_subject_has_no_interval() -> None:
    interval = bootstrap_interval(mean_metric(np.array([[0.7]])), draw_subjects(1, 200))
    assert interval.estimate == 0.7
    assert np.isnan(interval.low)
    assert interval.note == "one test subject: no interval"


def test_all_right_does_not_claim_certainty() -> None:
    target = np.array([0, 1] * 6)
    metric = classification_metric("accuracy", np.arange(12), target[None], np.eye(2)[target][None])
    interval = bootstrap_interval(metric, draw_subjects(12, 200))
    assert interval.estimate == 1.0
    assert interval.note == "no spread between subjects: no interval"


def test_auroc_with_a_rare_class_says_why_it_has_no_interval() -> None:
    target = np.array([[1] + [0] * 9])
    probabilities = np.column_stack([np.linspace(0.9, 0.1, 10), np.linspace(0.1, 0.9, 10)])[None]
    interval = bootstrap_interval(
        classification_metric("auroc", np.arange(10), target, probabilities), draw_subjects(10, 500)
    )
    assert interval.estimate == 0.0
    assert "of the replicates: no interval" in interval.note


def test_the_interval_widens_for_few_subjects() -> None:
    assert expanded_alpha(5) < expanded_alpha(20) < expanded_alpha(1000) < 0.05 + 1e-9
    assert abs(expanded_alpha(100_000) - 0.05) < 1e-4


def test_paired_test_finds_a_shift_that_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0.6, 0.2, size=(1, 40))
    better = base + rng.normal(0.03, 0.02, size=(1, 40))
    weights = draw_subjects(40, 1000)
    gap, p = paired_test(mean_metric(better), mean_metric(base), weights)
    assert p < 0.01
    assert gap.low > 0
    assert bootstrap_interval(mean_metric(better), weights).low < bootstrap_interval(mean_metric(base), weights).high


def test_equal_rows_have_p_one() -> None:
    values = np.random.default_rng(3).random((2, 15))
    gap, p = paired_test(mean_metric(values), mean_metric(values), draw_subjects(15, 200))
    assert (gap.estimate, p) == (0.0, 1.0)


def test_holm_keeps_order_and_ignores_what_was_not_tested() -> None:
    adjusted = holm([0.01, float("nan"), 0.04, 0.03])
    np.testing.assert_allclose([adjusted[0], adjusted[2], adjusted[3]], [0.03, 0.06, 0.06])
    assert np.isnan(adjusted[1])
    assert np.isnan(holm([float("nan")])[0])


def test_what_one_subject_is_worth() -> None:
    assert one_subject_points(57) == pytest.approx(1.754, abs=1e-3)
    with pytest.raises(ValueError, match="needs at least one subject, got 0"):
        one_subject_points(0)


def test_unknown_metric_lists_the_known() -> None:
    with pytest.raises(KeyError, match="known: accuracy, balanced_accuracy, auroc, f1"):
        classification_metric("kappa", np.arange(2), np.array([[0, 1]]), np.full((1, 2, 2), 0.5))


def coverage(trials: int, n: int, replicates: int, kind: str) -> float:
    """Return the share of simulated test sets whose interval contains the truth."""
    rng = np.random.default_rng(11)
    hits = 0
    truth = {"mean": 0.5, "auroc": None}[kind]
    if kind == "auroc":
        target, probabilities = simulated(rng, 8000)
        truth = classification_metrics(target, probabilities)["auroc"]
    for trial in range(trials):
        if kind == "mean":
            subject = rng.uniform(0, 1, size=n)
            metric = mean_metric(subject + rng.normal(0, 0.05, size=(3, n)))
        else:
            target, probabilities = simulated(rng, n)
            metric = classification_metric("auroc", np.arange(n), target[None], probabilities[None])
        interval = bootstrap_interval(metric, draw_subjects(n, replicates, trial))
        hits += interval.low <= truth <= interval.high
    return hits / trials


def test_intervals_cover_in_a_small_simulation() -> None:
    assert 0.90 <= coverage(200, 30, 400, "mean") <= 0.99


@pytest.mark.full
@pytest.mark.parametrize("kind", ["mean", "auroc"])
@pytest.mark.parametrize("n", [30, 57])
def test_intervals_cover_93_to_97_percent(kind: str, n: int) -> None:
    assert 0.93 <= coverage(2000, n, 1000, kind) <= 0.97


@pytest.mark.full
def test_the_paired_test_holds_its_level() -> None:
    rng = np.random.default_rng(5)
    found = 0
    for trial in range(1000):
        subject = rng.normal(0, 0.2, size=30)
        first, second = subject + rng.normal(0, 0.1, size=(2, 3, 30))
        found += paired_test(mean_metric(first), mean_metric(second), draw_subjects(30, 500, trial))[1] < 0.05
    assert 0.03 <= found / 1000 <= 0.075
