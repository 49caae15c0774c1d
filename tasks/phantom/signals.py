"""Resting-state signals of the connectivity cohort: the true correlations, and what a scanner and a head make of them.

Legend: T frames, R = 68 regions of the Desikan-Killiany atlas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.anatomy import DESIKAN_KILLIANY
from tasks.phantom import effects_connectivity as effects
from tasks.phantom.effects_connectivity import GLOBAL, NETWORKS, TRAITS, ConnectivityTraits, network_of_regions

REGIONS = len(DESIKAN_KILLIANY)
AUTOREGRESSION = 0.4
"""Correlation of a signal with itself one frame before."""
THERMAL_SD: dict[str, float] = {"A": 0.25, "B": 0.3, "C": 0.4}
"""White noise by site; the signal has 1."""
PHYSIOLOGY_SD = 0.6
PHYSIOLOGY_HZ = (0.03, 0.12)
"""Breathing and (aliased) pulse, which white matter and CSF show as well."""
DRIFT_SD = 1.0
SPIKE_MM = 1.2
"""Median framewise displacement of a sudden movement."""
SPIKE_SIGNAL = 4.0
"""Signal change per mm of such a movement: common to all regions, half as much again different between them."""
HEAD_MM = 50.0
"""Radius of the sphere on which rotations are displacements: Power et al. 2012."""
MOTION: tuple[str, ...] = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
"""mm and radians, as fMRIPrep names them."""
LEFT_OVER = 0.1
"""Share of artefacts that a pipeline's cleaning leaves in the series that it publishes."""


@dataclass(frozen=True)
class Recording:
    """What one session of resting state holds, in parts."""

    neural: np.ndarray
    """(T, R): standard deviation 1, correlations as `true_correlations` says (in the limit of many frames)."""
    thermal: np.ndarray
    """(T, R)"""
    artefact: np.ndarray
    """(T, R): physiology and motion."""
    drift: np.ndarray
    """(T, R): slow, so that a high-pass filter removes it."""
    tissue: np.ndarray
    """(T, 2): mean signals of CSF and white matter, without drift."""
    motion: np.ndarray
    """(T, 6): MOTION."""

    @property
    def displacement_mm(self) -> np.ndarray:
        """Framewise displacement, (T,); NaN for the first frame. Source: Power et al. 2012."""
        steps = np.abs(np.diff(self.motion, axis=0))
        return np.concatenate([[np.nan], steps[:, :3].sum(axis=1) + HEAD_MM * steps[:, 3:].sum(axis=1)])

    def raw(self) -> np.ndarray:
        """Return the signals as scanned, (T, R)."""
        return self.neural + self.thermal + self.artefact + self.drift

    def cleaned(self) -> np.ndarray:
        """Return the signals as a pipeline publishes them, (T, R): filtered and regressed, with a little left over."""
        return self.neural + self.thermal + LEFT_OVER * self.artefact


def true_correlations(traits: ConnectivityTraits, rng: np.random.Generator) -> np.ndarray:
    """Return the correlations of a person's signals, (R, R), positive definite.

    A sum of common factors (all regions; each network; each pair of fellows of both hemispheres) and of what is a
    region's own; then the person's share of random factors.
    """
    network = network_of_regions()
    common = effects.Z_PER_GLOBAL * traits.function[TRAITS.index(GLOBAL)]
    common += effects.Z_PER_YEAR * (traits.age - effects.AGE_MEAN_YEARS)
    own = np.array(traits.function[: len(NETWORKS)])
    within = np.tanh(effects.WITHIN_Z + common + effects.WITHIN_Z_PER_TRAIT * own)
    between = np.tanh(effects.BETWEEN_Z + common)
    found = np.where(network[:, None] == network[None], within[network][:, None], between)
    fellow = np.roll(np.arange(REGIONS), REGIONS // 2)
    found[np.arange(REGIONS), fellow] += effects.HOMOTOPIC * (1 - found[np.arange(REGIONS), fellow])
    np.fill_diagonal(found, 1.0)
    random = np.corrcoef(rng.standard_normal((REGIONS, effects.PERSONAL_FACTORS)))
    return np.asarray((1 - effects.PERSONAL_SHARE) * found + effects.PERSONAL_SHARE * random)


def network_means(matrix_RR: np.ndarray) -> dict[str, float]:
    """Return the mean Fisher z within each network, and between networks as `global`."""
    network = network_of_regions()
    rows, columns = np.triu_indices(REGIONS, 1)
    z = np.arctanh(matrix_RR[rows, columns])
    same = network[rows] == network[columns]
    means = {name: float(z[same & (network[rows] == n)].mean()) for n, name in enumerate(NETWORKS)}
    return {**means, GLOBAL: float(z[~same].mean())}


def record(
    traits: ConnectivityTraits, correlations_RR: np.ndarray, frames: int, tr_s: float, rng: np.random.Generator
) -> Recording:
    """Draw one session of `frames` frames, `tr_s` seconds apart."""
    neural = _autoregressive(rng, frames) @ np.linalg.cholesky(correlations_RR).T
    waves, tissue = _physiology(frames, tr_s, rng)
    motion, spikes = _motion(traits.fd_mm, frames, rng)
    thermal = THERMAL_SD[traits.site] * rng.standard_normal((frames, REGIONS))
    return Recording(neural, thermal, waves + spikes, _drift(frames, rng), tissue, motion)


def exact_series(correlations_RR: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Return a series (T, R) whose sample correlations are exactly these: for tests. Needs T > R."""
    noise = _autoregressive(rng, frames)
    white = np.linalg.qr(noise - noise.mean(axis=0))[0] * np.sqrt(frames)
    return np.asarray(white @ np.linalg.cholesky(correlations_RR).T)


def _autoregressive(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Return independent series (T, R) of standard deviation 1 with AUTOREGRESSION."""
    noise = rng.standard_normal((frames, REGIONS))
    series = np.empty_like(noise)
    series[0] = noise[0]
    for n in range(1, frames):
        series[n] = AUTOREGRESSION * series[n - 1] + np.sqrt(1 - AUTOREGRESSION**2) * noise[n]
    return series


def _physiology(frames: int, tr_s: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return what two waves of wandering phase add to the regions (T, R), and what tissue shows of them (T, 2)."""
    time = np.arange(frames) * tr_s
    wander = np.cumsum(rng.standard_normal((2, frames)) * 0.15, axis=1)
    phase = 2 * np.pi * np.array(PHYSIOLOGY_HZ)[:, None] * time + wander + rng.uniform(0, 2 * np.pi, (2, 1))
    waves = np.sqrt(2) * np.sin(phase).T  # (T, 2), standard deviation 1
    loads = PHYSIOLOGY_SD / np.sqrt(2) * (1 + 0.4 * rng.standard_normal((2, REGIONS)))
    tissue = waves @ np.array([[1.0, 0.4], [0.3, 1.0]]) + 0.1 * rng.standard_normal((frames, 2))
    return waves @ loads, tissue


def _motion(fd_mm: float, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return motion parameters (T, 6) with about this mean displacement, and the signal of the spikes (T, R)."""
    quiet = 0.6 * fd_mm
    steps = rng.standard_normal((frames, 6))
    steps *= quiet / (6 * np.sqrt(2 / np.pi)) / np.array([1, 1, 1, HEAD_MM, HEAD_MM, HEAD_MM])
    slow = np.cumsum(steps, axis=0)
    expected = (fd_mm - quiet) * frames / (2 * SPIKE_MM)  # a head moves there and back
    count = min(int(rng.poisson(expected)), frames // 5)
    when = rng.choice(np.arange(1, frames - 1), size=count, replace=False)
    size = SPIKE_MM * np.exp(0.3 * rng.standard_normal(count))
    axis = rng.integers(0, 3, count)
    slow[when, axis] += size * rng.choice([-1, 1], count)
    signal = np.zeros((frames, REGIONS))
    pattern = 1 + 0.5 * rng.standard_normal((count, REGIONS))
    signal[when] = -SPIKE_SIGNAL * size[:, None] * pattern
    return slow, signal


def _drift(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Return half a wave and a whole one over the session in each region, (T, R)."""
    place = (np.arange(frames) + 0.5) / frames
    waves = np.cos(np.pi * place[:, None] * np.array([1, 2]))
    return np.asarray(DRIFT_SD * waves @ rng.standard_normal((2, REGIONS)))
