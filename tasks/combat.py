"""ComBat: features of several sites brought to one location and scale, fitted on training cases only.

    y = alpha + X beta + gamma_site + delta_site * noise          (of each feature)

gamma and delta of a site are pooled over features by parametric empirical Bayes: gamma is normal, delta^2 inverse gamma
over the features of a site, and both are found in turn until they rest. Sources: Johnson, Li and Rabinovic,
Biostatistics 8 (2007) 118-127; for images, with covariates, Fortin et al., NeuroImage 167 (2018) 104-120. Why no
package is used is said in docs/probes.md; tests/golden/combat.json holds what neuroCombat and neuroHarmonize answer.

Legend: N cases, C features, S sites, P covariates. NaN in a feature is a missing value and stays one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.probes import Bools, Floats, Ints

RULES_VERSION = 1
"""Raised when a rule of the harmonisation changes, so that kept scores are computed again."""
SITE_MIN = 2
"""Training cases that a site needs: of a single one nobody can tell the site from the person."""
TOLERANCE = 1e-10
"""Largest change of gamma or delta^2 at which the iteration rests."""
ITERATIONS = 1000
FLAT = 1e-10
"""A feature whose residual standard deviation is below this share of its own spread has nothing to harmonise."""


@dataclass(frozen=True)
class Acquisition:
    """Where cases were scanned, and who they are: what ComBat is told beside the features."""

    sites: tuple[str, ...]
    """(N,) of every case; empty: not known."""
    covariates: Floats
    """(N, P) that are kept in the features, such as age and sex; NaN where not known."""

    def of(self, cases: Ints) -> Acquisition:
        """Return that of some cases."""
        return Acquisition(tuple(self.sites[case] for case in cases), self.covariates[cases])


@dataclass(frozen=True)
class Combat:
    """Fitted parameters."""

    sites: tuple[str, ...]
    """Those that were fitted; cases of any other stay as they are."""
    alpha: Floats
    """(C,) mean of a feature at the mean of the covariates, sites weighted by their cases."""
    beta: Floats
    """(P, C) effect of the covariates."""
    centre: Floats
    """(P,) means of the covariates, which also fill those that are not known."""
    sigma: Floats
    """(C,) standard deviation inside sites; NaN where a feature has nothing to harmonise and stays as it is."""
    gamma: Floats
    """(S, C) location of a site, in sigma."""
    delta: Floats
    """(S, C) variance of a site, in sigma^2."""

    def apply(self, features_NC: Floats, acquisition: Acquisition) -> Floats:
        """Return the features (N, C) without what their sites add; cases of sites that were not fitted keep theirs."""
        place = {site: k for k, site in enumerate(self.sites)}
        known = np.array([site in place for site in acquisition.sites], dtype=bool)
        which = [place[site] for site in acquisition.sites if site in place]
        fitted = np.isfinite(self.sigma)
        expected = self.alpha + _centred(acquisition.covariates[known], self.centre) @ self.beta
        z = (features_NC[known] - expected) / self.sigma
        found = features_NC.copy()
        moved = (z - self.gamma[which]) / np.sqrt(self.delta[which]) * self.sigma + expected
        found[known] = np.where(fitted, moved, features_NC[known])
        return found


def harmonised(features_NC: Floats, acquisition: Acquisition, train: Ints) -> Floats:
    """Return the features (N, C) of all cases by parameters that are fitted on the cases `train` alone."""
    return fit_combat(features_NC[train], acquisition.of(train)).apply(features_NC, acquisition)


def fitted_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """Return the known sites with at least SITE_MIN of these cases, sorted."""
    return tuple(sorted(site for site in set(sites) - {""} if sites.count(site) >= SITE_MIN))


def fit_combat(features_NC: Floats, acquisition: Acquisition) -> Combat:
    """Return ComBat's parameters of these cases; with fewer than two sites to compare they change nothing."""
    sites = fitted_sites(acquisition.sites)
    member_NS = np.array([[site == name for name in sites] for site in acquisition.sites], dtype=bool)
    used = member_NS.reshape(len(features_NC), len(sites)).any(axis=1)
    features, covariates = features_NC[used], acquisition.covariates[used]
    if len(sites) < 2:
        count, columns = features.shape[1], covariates.shape[1]
        mean, beta, nobody = np.zeros(count), np.zeros((columns, count)), np.zeros((0, count))
        return Combat((), mean, beta, np.zeros(columns), np.ones(count), nobody, nobody)
    centre = np.array([np.nanmean(one) if np.isfinite(one).any() else 0.0 for one in covariates.T])
    member_NS, more_NP = member_NS[used], _centred(covariates, centre)
    alpha, beta, sigma = _standardisation(features, member_NS, more_NP)
    z = (features - alpha - more_NP @ beta) / sigma
    pairs = [_site_effect(z[member]) for member in member_NS.T]
    gamma, delta = (np.stack(values) for values in zip(*pairs, strict=True))
    return Combat(sites, alpha, beta, centre, sigma, gamma, delta)


def _centred(covariates_NP: Floats, centre: Floats) -> Floats:
    """Return covariates around their means; who is not known is taken as the mean."""
    return np.nan_to_num(covariates_NP - centre, nan=0.0)


def _standardisation(features_NC: Floats, member_NS: Bools, covariates_NP: Floats) -> tuple[Floats, Floats, Floats]:
    """Return alpha (C,), beta (P, C) and sigma (C,) by least squares; features that lack the same cases go together."""
    count, sites = features_NC.shape[1], member_NS.shape[1]
    alpha, sigma = np.zeros(count), np.full(count, np.nan)
    beta = np.zeros((covariates_NP.shape[1], count))
    patterns, of_pattern = np.unique(np.isfinite(features_NC), axis=1, return_inverse=True)
    for k, here in enumerate(patterns.T):
        columns = np.flatnonzero(of_pattern.ravel() == k)
        y, member = features_NC[np.ix_(here, columns)], member_NS[here].astype(np.float64)
        kept = _told_apart(member, covariates_NP[here])
        design = np.column_stack([member, covariates_NP[here][:, kept]])
        effects = np.linalg.lstsq(design, y, rcond=None)[0]
        alpha[columns] = member.sum(axis=0) @ effects[:sites] / max(len(y), 1)
        beta[np.ix_(kept, columns)] = effects[sites:]
        sigma[columns] = _spread(y, y - design @ effects)
    return alpha, beta, sigma


def _told_apart(member_NS: Floats, covariates_NP: Floats) -> Ints:
    """Return the covariates that vary beside the sites: of the others nobody can tell whose effect they are."""
    design = member_NS
    kept: list[int] = []
    for k, column in enumerate(covariates_NP.T):
        grown = np.column_stack([design, column / (np.abs(column).max(initial=0) or 1)])
        if np.linalg.matrix_rank(grown) > np.linalg.matrix_rank(design):
            design, kept = grown, [*kept, k]
    return np.array(kept, dtype=np.int64)


def _spread(y_NC: Floats, residual_NC: Floats) -> Floats:
    """Return the standard deviation of the residuals (C,); NaN for what is flat or has two values at most: a flag."""
    if not len(y_NC):
        return np.full(y_NC.shape[1], np.nan)
    found = np.sqrt(np.mean(residual_NC**2, axis=0))
    values = np.sort(y_NC, axis=0)
    flag = (np.diff(values, axis=0) > 0).sum(axis=0) < 2
    return np.where(flag | (found <= FLAT * np.abs(values).max(axis=0)), np.nan, found)


def _site_effect(z_NC: Floats) -> tuple[Floats, Floats]:
    """Return gamma and delta^2 (C,) of one site from its standardised features; 0 and 1 where it has no value."""
    n = np.isfinite(z_NC).sum(axis=0)
    filled = np.nan_to_num(z_NC, nan=0.0)
    mean = filled.sum(axis=0) / np.maximum(n, 1)
    squares = np.where(np.isfinite(z_NC), (filled - mean) ** 2, 0).sum(axis=0)
    scaled = (n >= SITE_MIN) & (squares > 0)
    variance = np.where(scaled, squares / np.maximum(n - 1, 1), 1.0)
    there = n > 0
    gamma, delta = np.zeros(len(n)), np.ones(len(n))
    gamma[there], delta[there] = _pooled(mean[there], variance[there], squares[there], n[there])
    return gamma, np.where(scaled, delta, 1.0)


def _pooled(mean: Floats, variance: Floats, squares: Floats, n: Ints) -> tuple[Floats, Floats]:
    """Return the posterior gamma and delta^2 of the features of a site; a single feature has nothing to pool with.

    The inverse gamma's a and b are those of the moments m and s^2 of delta^2; both sides of the posterior mean are
    multiplied by s^2, so that features of equal variance divide by nothing.
    """
    if len(mean) < 2:
        return mean, variance
    gamma_bar, t2 = mean.mean(), mean.var(ddof=1)
    m, s2 = variance.mean(), variance.var(ddof=1)
    gamma, delta = mean, variance
    for _ in range(ITERATIONS):
        last, last_delta = gamma, delta
        gamma = (t2 * n * mean + delta * gamma_bar) / (t2 * n + delta)
        around = squares + n * (mean - gamma) ** 2
        delta = (s2 * (0.5 * around + m) + m**3) / (s2 * (n / 2 + 1) + m**2)
        if max(np.abs(gamma - last).max(), np.abs(delta - last_delta).max()) < TOLERANCE:
            break
    return gamma, delta
