"""Intervals that cover, tests that hold their level, and rules for what cannot be computed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from studies.coverage import KINDS, NULLS, Kind, Null, cover, level
from studies.coverage_folds import cover_folds
from tasks.metrics_weighted import classification_metric
from tasks.skewness import skewed_ends
from tasks.statistics import (
    bca_tails,
    bootstrap_interval,
    draw_subjects,
    expanded_alpha,
    holm,
    mean_metric,
    one_subject_points,
    paired_test,
    rank_rows,
)


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


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_no_p_is_below_that_of_the_sign_test(n: int) -> None:
    better = np.linspace(0.7, 0.71, n)[None]
    gap, p = paired_test(mean_metric(better), mean_metric(np.full((1, n), 0.5)), draw_subjects(n, 500))
    assert gap.low > 0.1
    assert p == 2.0 ** (1 - n)
    assert (f"{n} subjects are too few" in gap.note) == (n < 6)


def test_the_p_of_a_mean_is_that_of_the_paired_t_test() -> None:
    first, second = np.random.default_rng(9).normal(0.6, 0.1, size=(2, 12)) + np.array([[0.08], [0.0]])
    _, p = paired_test(mean_metric(first[None]), mean_metric(second[None]), draw_subjects(12, 40_000))
    assert p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=0.05)


def test_one_subject_has_no_rank() -> None:
    ranks = rank_rows([mean_metric(np.array([[value]])) for value in (0.8, 0.5)], draw_subjects(1, 50))
    assert all(np.isnan(rank.place) for rank in ranks)


def test_replicates_that_are_there_already_give_the_same_numbers() -> None:
    values = np.random.default_rng(8).random((2, 3, 25))
    first, second = (mean_metric(one) for one in values)
    weights = draw_subjects(25, 300)
    drawn = first(weights), second(weights)
    assert bootstrap_interval(first, weights, replicates=drawn[0]) == bootstrap_interval(first, weights)
    assert paired_test(first, second, weights, drawn[0] - drawn[1]) == paired_test(first, second, weights)
    alone = mean_metric(np.array([[0.7]]))
    _, p = paired_test(alone, alone, draw_subjects(1, 20))
    assert np.isnan(p), "one subject: no test"


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


def test_the_tails_are_those_of_scipys_bca_interval() -> None:
    values = np.random.default_rng(4).lognormal(size=40)
    replicates = mean_metric(values[None])(draw_subjects(40, 40_000))
    left_out = mean_metric(values[None])(np.ones((40, 40)) - np.eye(40))
    found = np.quantile(replicates, bca_tails(values.mean(), replicates, left_out, 0.025))
    expected = stats.bootstrap((values,), np.mean, n_resamples=40_000, method="BCa", rng=5).confidence_interval
    np.testing.assert_allclose(found, [expected.low, expected.high], rtol=0.01)
    plain = np.quantile(replicates, [0.025, 0.975])
    assert (found > plain).all(), "moved towards the long tail"


def test_without_skew_and_bias_the_tails_are_those_of_the_percentiles() -> None:
    replicates = np.linspace(-1, 1, 2001)
    np.testing.assert_allclose(bca_tails(0.0, replicates, np.array([1.0, 2.0, 3.0]), 0.025), [0.025, 0.975], atol=1e-3)
    assert bca_tails(-5.0, replicates, np.ones(3), 0.025)[0] < 1e-6, "an estimate outside all replicates"
    assert np.isfinite(bca_tails(0.3, replicates, np.array([0.0, 1.0, np.nan]), 0.025)).all()


def test_the_effect_is_cohens_d_of_a_paired_difference() -> None:
    first, second = np.random.default_rng(6).normal([[0.7], [0.6]], 0.1, size=(2, 50))
    gap, _ = paired_test(mean_metric(first[None]), mean_metric(second[None]), draw_subjects(50, 5000))
    difference = first - second
    assert gap.standardised == pytest.approx(difference.mean() / difference.std(), rel=0.05)
    alone, _ = paired_test(mean_metric(first[None]), mean_metric(first[None]), draw_subjects(50, 200))
    assert np.isnan(alone.standardised)


def test_an_interval_of_unbounded_values_is_the_t_interval_without_skewness_and_longer_on_the_side_of_a_tail() -> None:
    even = np.concatenate([np.arange(1, 11), -np.arange(1, 11)]) / 10
    low, high = skewed_ends(*_mean_and_left_out(even))
    reach = stats.t.ppf(0.975, 19) * even.std(ddof=1) / np.sqrt(20)
    np.testing.assert_allclose([low, high], [-reach, reach])
    far = np.exp(np.linspace(-2, 2, 20))
    plain = stats.t.interval(0.95, 19, far.mean(), far.std(ddof=1) / np.sqrt(20))
    low, high = skewed_ends(*_mean_and_left_out(far))
    assert low == pytest.approx(plain[0]), "never shorter than the t interval"
    assert high > plain[1] + 0.2 * (plain[1] - plain[0])
    np.testing.assert_allclose(skewed_ends(*_mean_and_left_out(-far)), [-high, -low])
    # The end is where Hall's transformation of the t statistic is the t quantile.
    k = far.size**2 / (19 * 18) * stats.skew(far) / np.sqrt(20)
    t = (far.mean() - high) / (far.std(ddof=1) / np.sqrt(20))
    assert t + k * t**2 / 3 + k**2 * t**3 / 27 + k / 6 == pytest.approx(-stats.t.ppf(0.975, 19))
    two = skewed_ends(*_mean_and_left_out(np.array([1.0, 3.0])))
    np.testing.assert_allclose(two, stats.t.interval(0.95, 1, 2, 1))


def _mean_and_left_out(values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    return values.mean(), (values.sum() - values) / (values.size - 1), np.ones(values.size, dtype=bool)


def test_a_subject_whose_value_is_the_mean_counts() -> None:
    values = np.array([1.0, 2.0, 3.0])
    plain = stats.t.interval(0.95, 2, 2, 1 / np.sqrt(3))
    np.testing.assert_allclose(skewed_ends(*_mean_and_left_out(values)), plain)
    found = bootstrap_interval(mean_metric(values[None]), draw_subjects(3, 300), unbounded=True)
    np.testing.assert_allclose([found.low, found.high], plain)
    weights = draw_subjects(2, 300)
    gap, _ = paired_test(mean_metric(np.array([[1.0, 2.0]])), mean_metric(np.zeros((1, 2))), weights, unbounded=True)
    assert gap.note == "2 subjects are too few: no p can be below 0.5"


def test_undefined_distances_are_as_if_they_were_not_there() -> None:
    values = np.random.default_rng(1).lognormal(1, 1, 40)
    gaps = np.concatenate([values, np.full(10, np.nan)])
    whole, part = (
        bootstrap_interval(mean_metric(one[None]), draw_subjects(one.size, 300), unbounded=True)
        for one in (values, gaps)
    )
    assert part.estimate == pytest.approx(whole.estimate)
    np.testing.assert_allclose([part.low, part.high], [whole.low, whole.high])
    with pytest.raises(ValueError, match="an interval needs two subjects whose values differ, got 3 with values"):
        skewed_ends(1.0, np.ones(3), np.ones(3, dtype=bool))
    weights = draw_subjects(40, 300)
    gap, _ = paired_test(mean_metric(values[None]), mean_metric(values[None] / 2), weights, unbounded=True)
    shorter, _ = paired_test(mean_metric(values[None]), mean_metric(values[None] / 2), weights)
    np.testing.assert_allclose([gap.low, gap.high], [whole.low / 2, whole.high / 2])
    assert gap.high > shorter.high


def test_ranks_say_how_stable_the_order_is() -> None:
    rng = np.random.default_rng(7)
    base = rng.normal(0.6, 0.1, size=30)
    rows = [base + shift + rng.normal(0, 0.05, size=30) for shift in (0.2, 0.0, 0.0)]
    best, *rest = rank_rows([mean_metric(row[None]) for row in rows], draw_subjects(30, 500))
    assert (best.place, best.low, best.high, best.first) == (1, 1, 1, 1)
    assert {rank.place for rank in rest} == {2, 3}
    assert sum(rank.first for rank in (best, *rest)) == pytest.approx(1)
    tied = rank_rows([mean_metric(base[None])] * 2, draw_subjects(30, 200))
    assert [(rank.place, rank.first) for rank in tied] == [(1.5, 0.5)] * 2
    undefined = rank_rows([mean_metric(base[None]), mean_metric(np.full((1, 30), np.nan))], draw_subjects(30, 200))
    assert all(np.isnan(rank.place) for rank in undefined)


def test_intervals_cover_in_a_small_simulation() -> None:
    for kind in (*KINDS[:2], *(kind for kind in KINDS if kind.unbounded and kind.asked)):
        found = cover(kind, 57, trials=120, replicates=400)
        assert 0.88 <= found.inside <= 0.99, kind.name
        assert found.inside + found.below + found.above == pytest.approx(1)


def test_cross_validated_intervals_cover_in_a_small_simulation() -> None:
    found = cover_folds("auroc", 57, trials=40)
    assert 0.85 <= found.inside <= 1
    assert found.plain < found.inside, "folds share their training cases"
    assert found.inside + found.below + found.above == pytest.approx(1)
    assert 0.6 < found.truth < 0.75


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.asked], ids=lambda kind: kind.name)
def test_intervals_cover_93_to_97_percent(kind: Kind) -> None:
    assert cover(kind, 57, trials=1500, replicates=1000).met
    # Where few subjects hide a tail the closed form decides, and replicates only take time.
    assert not kind.unbounded or all(cover(kind, n, trials=2500, replicates=20).met for n in (20, 154))


@pytest.mark.full
def test_cross_validated_intervals_cover_93_to_97_percent() -> None:
    assert cover_folds("auroc", 57, trials=600).met


def test_equal_rows_are_rarely_called_different_in_a_small_simulation() -> None:
    found = level(NULLS[0], 7, trials=150, replicates=200)
    assert found.share < 0.1 < found.plain + 0.03


@pytest.mark.full
@pytest.mark.parametrize("null", NULLS, ids=lambda null: null.name)
def test_the_paired_test_holds_its_level(null: Null) -> None:
    for n in (null.sizes[0], 12, 30):
        assert level(null, n, trials=1000, replicates=400).share <= 0.07, n
