"""Linear probes: held-out folds, nothing fitted on them, errors for what cannot be probed; fold statistics."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from tasks.fold_statistics import fold_interval, fold_test
from tasks.probes import ProbeError, check_targets, held_out, probe_classes, probe_numbers

N = 60
FOLD = np.arange(N) % 5
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((N, 6))
CLASS = (np.arange(N) // 5) % 2


@pytest.fixture(autouse=True)
def short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.probes.GRID", (0.1, 10.0))


def test_what_is_in_the_features_is_found_and_what_is_not_is_not() -> None:
    signal = NOISE + 3 * CLASS[:, None]
    found = probe_classes(signal, CLASS, FOLD, 2, "test")
    assert (found.argmax(axis=1) == CLASS).mean() > 0.95
    assert np.allclose(found.sum(axis=1), 1)
    chance = probe_classes(NOISE, CLASS, FOLD, 2, "test")
    assert 0.25 < (chance.argmax(axis=1) == CLASS).mean() < 0.75
    age = 40 + 10 * NOISE[:, 0]
    assert np.abs(probe_numbers(NOISE, age, FOLD, "test") - age).mean() < 1


def test_nearest_neighbours_find_what_no_line_divides() -> None:
    ring = np.column_stack([np.cos(np.arange(N) * 2.4), np.sin(np.arange(N) * 2.4)]) * (1 + 2 * CLASS)[:, None]
    line, near = (probe_classes(ring, CLASS, FOLD, 2, "test", model) for model in ("linear", "k-NN"))
    assert (near.argmax(axis=1) == CLASS).mean() > 0.95 > 0.75 > (line.argmax(axis=1) == CLASS).mean()
    assert np.allclose(near.sum(axis=1), 1)
    age = 40 + 10 * np.hypot(*ring.T)
    assert np.abs(probe_numbers(ring, age, FOLD, "test", "k-NN") - age).mean() < 2
    few = probe_classes(ring[:12], CLASS[:12], np.arange(12) % 3, 2, "test", "k-NN")
    assert few.shape == (12, 2), "no more neighbours than an inner training fold has"


def test_a_fold_is_predicted_by_models_that_have_not_seen_it() -> None:
    # Whatever the target of fold 0, its predictions stay.
    age = 40 + 10 * NOISE[:, 0]
    changed = np.where(FOLD == 0, 1e4, age)
    before, after = (probe_numbers(NOISE, target, FOLD, "test")[FOLD == 0] for target in (age, changed))
    np.testing.assert_array_equal(before, after)
    # Nor do the features of other test cases matter: standardisation and medians come from the training folds.
    wild = NOISE.copy()
    wild[np.flatnonzero(FOLD == 0)[1:]] = 1e3
    wild[FOLD == 1] = np.where(np.arange(6) == 2, np.nan, wild[FOLD == 1])
    gaps = NOISE.copy()
    gaps[FOLD == 1] = np.where(np.arange(6) == 2, np.nan, gaps[FOLD == 1])
    one, other = (probe_numbers(values, age, FOLD, "test")[0] for values in (wild, gaps))
    assert one == other


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_the_models_are_those_of_scikit_learn(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.probes.GRID", (alpha,))
    age = 40 + 10 * NOISE[:, 0]
    numbers, classes = probe_numbers(NOISE, age, FOLD, "test"), probe_classes(NOISE, CLASS, FOLD, 2, "test")
    for train, test in held_out(FOLD):
        scaler = StandardScaler().fit(NOISE[train])
        inside, outside = scaler.transform(NOISE[train]), scaler.transform(NOISE[test])
        np.testing.assert_allclose(numbers[test], Ridge(alpha=alpha).fit(inside, age[train]).predict(outside))
        logistic = LogisticRegression(C=alpha, max_iter=1000).fit(inside, CLASS[train])
        np.testing.assert_allclose(classes[test], logistic.predict_proba(outside), atol=1e-6)


def test_the_penalty_is_chosen_inside_the_training_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.random.default_rng(1).standard_normal((N, 40))
    age = many @ np.full(40, 3.0) + 40

    def error() -> float:
        return float(np.abs(probe_numbers(many, age, FOLD, "test") - age).mean())

    chosen = error()
    monkeypatch.setattr("tasks.probes.GRID", (10.0,))
    assert chosen < 0.5 * error(), "noiseless targets want the weakest penalty"


def test_targets_and_features_that_cannot_be_probed() -> None:
    rare = np.where(np.arange(N) < 3, 1, 0)
    with pytest.raises(ProbeError, match=r"p: class 'ad' \(3 subjects\) is absent from fold 3 of 5; every fold needs"):
        check_targets(FOLD, rare, ("control", "ad"), "p")
    with pytest.raises(ProbeError, match="p: class 'b' has 2 subjects; the inner cross-validation needs three"):
        check_targets(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 0, 1]), ("a", "b"), "p")
    with pytest.raises(ProbeError, match="p: 1 of 3 targets are not finite numbers; leave those cases out"):
        check_targets(FOLD[:3], np.array([1.0, np.nan, 2.0]), (), "p")
    with pytest.raises(ProbeError, match="p: the target is 40 for all 3 subjects; nothing to predict"):
        check_targets(FOLD[:3], np.full(3, 40.0), (), "p")
    with pytest.raises(ProbeError, match="row: every feature of the training folds is missing"):
        probe_numbers(np.full((N, 2), np.nan), NOISE[:, 0], FOLD, "row")
    infinite = NOISE.copy()
    infinite[3, 3] = np.inf
    with pytest.raises(ProbeError, match="row: 1 features are infinite; the encoder has diverged"):
        probe_classes(infinite, CLASS, FOLD, 2, "row")


def test_intervals_are_those_of_nadeau_and_bengio() -> None:
    values = np.array([[0.70, 0.74, 0.66, 0.71, 0.69], [0.72, 0.76, 0.64, 0.73, 0.67]])
    found = fold_interval(values, test_share=0.25, n=50)
    means = values.mean(axis=0)
    half = stats.t.ppf(0.975, 4) * np.sqrt((1 / 5 + 1 / 4) * means.var(ddof=1))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.702, 0.702 - half, 0.702 + half))
    other = values - np.array([0.1, 0.12, 0.08, 0.11, 0.09])
    gap, p = fold_test(values, other, 0.25, 50)
    t = 0.1 / np.sqrt((1 / 5 + 1 / 4) * np.array([0.1, 0.12, 0.08, 0.11, 0.09]).var(ddof=1))
    assert (gap.estimate, p) == pytest.approx((0.1, 2 * stats.t.sf(t, 4)))
    back, same = fold_test(other[:1], values, 0.25, 50)
    assert back.estimate < 0
    assert 0 < same < 1


def test_no_interval_is_claimed_where_there_is_none() -> None:
    flat = np.full((1, 5), 0.5)
    assert fold_interval(flat, 0.25, 9).note == "no spread between folds: no interval"
    assert fold_interval(np.array([[0.5]]), 0.25, 9).note == "one fold: no interval"
    gone = fold_interval(np.array([[0.5, np.nan, 0.4, 0.5, np.nan]]), 0.25, 9)
    assert (gone.note, np.isnan(gone.estimate)) == ("undefined in 2 of 5 folds", True)
    assert fold_test(flat, flat, 0.25, 9)[1] == 1.0
    assert np.isnan(fold_test(flat, flat - 0.1, 0.25, 9)[1])
