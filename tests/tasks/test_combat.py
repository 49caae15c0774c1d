"""ComBat: known answers of two packages, known shifts, nothing fitted on test cases, and the rules for odd sites."""

from __future__ import annotations

import json

import numpy as np
import pytest
from combat_reference import AGE, FEATURES, GOLDEN, SEX, SITES, TRAINING

from tasks.combat import Acquisition, Combat, fit_combat, fitted_sites, harmonised
from tasks.probes import Floats

TRAIN = np.arange(TRAINING)
NOBODY = np.zeros((len(SITES), 0))
PEOPLE = np.column_stack([AGE, SEX])
N, C = 240, 60
RNG = np.random.default_rng(11)
WHERE = tuple("ABC"[k % 3] for k in range(N))
SHIFT, SCALE = {"A": 0.0, "B": 2.0, "C": -1.0}, {"A": 1.0, "B": 2.0, "C": 0.5}
YEARS = RNG.uniform(20, 80, N) + np.array([{"A": 0, "B": 20, "C": -10}[site] for site in WHERE])
SLOPE = RNG.normal(0, 0.1, C)
NOISE = RNG.standard_normal((N, C))
SCANNED = (
    np.array([SHIFT[site] for site in WHERE])[:, None] * RNG.normal(1, 0.1, C)
    + np.array([SCALE[site] for site in WHERE])[:, None] * NOISE
    + np.outer(YEARS, SLOPE)
)
"""Features with the shifts and scales of their sites; people of site B are older."""


def fitted_alike(one: Combat, other: Combat) -> None:
    assert one.sites == other.sites
    for name in ("alpha", "beta", "centre", "sigma", "gamma", "delta"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("name", "covariates"), [("without covariates", NOBODY), ("with age and sex", PEOPLE)], ids=["plain", "covariates"]
)
def test_training_cases_come_out_as_of_neurocombat_and_new_ones_as_of_neuroharmonize(
    name: str, covariates: Floats
) -> None:
    known = json.loads(GOLDEN.read_text())[name]
    found = harmonised(FEATURES, Acquisition(SITES, covariates), TRAIN)
    for package in ("neuroCombat", "neuroHarmonize"):  # they hold the covariates in float32
        np.testing.assert_allclose(found[:TRAINING], known[package], atol=1e-6)
    np.testing.assert_allclose(found[TRAINING:], known["applied"], atol=1e-6)


def test_shifts_and_scales_of_sites_go_and_what_age_does_stays() -> None:
    train = np.arange(N // 2)
    found = harmonised(SCANNED, Acquisition(WHERE, YEARS[:, None]), train)
    test = np.arange(N) >= N // 2
    for values, apart in ((SCANNED, True), (found, False)):
        rest = values - np.outer(YEARS, SLOPE)
        groups = [rest[test & (np.array(WHERE) == site)] for site in "ABC"]
        means, spreads = [group.mean() for group in groups], [group.std() for group in groups]
        assert (np.ptp(means) > 2) == apart
        assert (max(spreads) / min(spreads) > 3) == apart
        if not apart:
            assert np.ptp(means) < 0.25
            assert max(spreads) / min(spreads) < 1.15
    slopes = np.polyfit(YEARS[test], found[test], 1)[0]
    assert np.corrcoef(slopes, SLOPE)[0, 1] > 0.95, "ages differ between sites, and their effect is kept"
    taken = np.polyfit(YEARS, harmonised(SCANNED, Acquisition(WHERE, np.zeros((N, 0))), np.arange(N)), 1)[0]
    assert np.abs(taken - SLOPE).mean() > 1.5 * np.abs(slopes - SLOPE).mean(), "unless age is no covariate"


def test_nothing_is_fitted_on_test_cases() -> None:
    train, test = np.arange(150), np.arange(150, N)
    own = Acquisition(WHERE, YEARS[:, None])
    wild = SCANNED.copy()
    wild[test] = 1e6
    other = Acquisition((*WHERE[:150], *["D"] * len(test)), np.where(np.arange(N)[:, None] < 150, YEARS[:, None], 1e3))
    fitted_alike(fit_combat(SCANNED[train], own.of(train)), fit_combat(wild[train], other.of(train)))
    np.testing.assert_array_equal(harmonised(SCANNED, own, train)[train], harmonised(wild, other, train)[train])
    alone = harmonised(np.vstack([SCANNED[train], SCANNED[200:201]]), own.of(np.append(train, 200)), train)
    np.testing.assert_allclose(alone[-1], harmonised(SCANNED, own, train)[200], rtol=1e-12)


def test_cases_of_unseen_unknown_and_single_sites_stay_as_they_are() -> None:
    sites = [*WHERE[:-3], "D", "E", ""]
    sites[0], sites[1] = "D", ""
    own, train = Acquisition(tuple(sites), YEARS[:, None]), np.arange(N // 2)
    assert fitted_sites([sites[case] for case in train]) == ("A", "B", "C"), "D has a single training case"
    found = harmonised(SCANNED, own, train)
    for case in (0, 1, N - 3, N - 2, N - 1):
        np.testing.assert_array_equal(found[case], SCANNED[case])
    others = np.arange(2, N // 2)
    fitted_alike(fit_combat(SCANNED[train], own.of(train)), fit_combat(SCANNED[others], own.of(others)))


def test_fewer_than_two_sites_change_nothing() -> None:
    for sites in (["A"] * N, [""] * N, ["A"] * (N - 1) + ["B"]):
        found = harmonised(SCANNED, Acquisition(tuple(sites), YEARS[:, None]), np.arange(N))
        np.testing.assert_array_equal(found, SCANNED)


def test_missing_features_stay_missing_and_count_for_nothing() -> None:
    gaps = SCANNED.copy()
    gaps[::7, :20] = np.nan
    gaps[np.array(WHERE) == "B", 20] = np.nan
    gaps[:, 21] = np.nan
    own = Acquisition(WHERE, YEARS[:, None])
    found = harmonised(gaps, own, np.arange(N))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(gaps))
    rest = (found - np.outer(YEARS, SLOPE))[:, :20]
    means = [np.nanmean(rest[np.array(WHERE) == site]) for site in "ABC"]
    assert np.ptp(means) < 0.1
    # A case without any feature is as good as none.
    kept = np.arange(N) % 7 != 0
    nothing = np.where(kept[:, None], SCANNED, np.nan)
    people = YEARS[kept].mean() * ~kept + YEARS * kept
    found = harmonised(nothing, Acquisition(WHERE, people[:, None]), np.arange(N))
    without = harmonised(SCANNED[kept], own.of(np.flatnonzero(kept)), np.arange(kept.sum()))
    np.testing.assert_allclose(found[kept], without, rtol=1e-9)


def test_flags_and_flat_features_stay_and_odd_covariates_are_left_out() -> None:
    features = SCANNED.copy()
    features[:, 0] = 3.0
    features[:, 1] = np.array(WHERE) == "A"
    features[:, 2] = np.array([SHIFT[site] for site in WHERE])
    own = Acquisition(WHERE, np.column_stack([YEARS, np.array(WHERE) == "B", np.ones(N), np.full(N, np.nan)]))
    found = harmonised(features, own, np.arange(N))
    np.testing.assert_array_equal(found[:, :3], features[:, :3])
    # What a site, a constant or nobody's value does cannot be told from the sites: age alone is kept.
    plain = harmonised(features, Acquisition(WHERE, YEARS[:, None]), np.arange(N))
    np.testing.assert_allclose(found, plain, rtol=1e-12)
    some = np.where(np.arange(N) % 10 == 0, np.nan, YEARS)[:, None]
    filled = np.where(np.isnan(some), np.nanmean(some), some)
    np.testing.assert_allclose(
        harmonised(features, Acquisition(WHERE, some), np.arange(N)),
        harmonised(features, Acquisition(WHERE, filled), np.arange(N)),
        rtol=1e-12,
    )


def test_one_feature_is_brought_to_its_sites_own_mean_and_spread() -> None:
    found = harmonised(SCANNED[:, :1], Acquisition(WHERE, np.zeros((N, 0))), np.arange(N))
    groups = [found[np.array(WHERE) == site] for site in "ABC"]
    np.testing.assert_allclose([group.mean() for group in groups], found.mean(), atol=1e-12)
    np.testing.assert_allclose([group.std() for group in groups], groups[0].std(), rtol=1e-12)
